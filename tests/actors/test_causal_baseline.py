"""The autoregressive baseline through the same driver, judge and workers: tuned, three steps of GRPO, evaluated."""

from pathlib import Path

import pytest
import torch

from actors.driver import train
from actors.evaluate import read_report
from actors.evaluate_folder import evaluate_folder
from diffrl.config import ProblemsConfig, SandboxConfig
from diffrl.config.pipeline import EvaluationConfig, ExactSampling
from diffrl.models.folders import load_model
from diffrl.rollout_store import read_all
from diffrl.types import Problem
from tests.actors.conftest import Called, rl_config, tune
from tests.actors.test_families import assert_a_sound_run, rows_of

FAMILY = {"family": "causal"}


@pytest.fixture(scope="module")
def tuned_causal(ray_cluster, problems: list[Problem], tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2}
    return tune(tmp_path_factory.mktemp("causal"), problems, {**FAMILY, "tiny": sizes}, steps=120)


@pytest.fixture(scope="module")
def run_dir(tuned_causal: Path, problems_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo") / "run"
    held_out = {"source": "microcode", "split": "held_out", "num_prompt_tests": 0}
    train(
        rl_config(
            tuned_causal,
            problems_file,
            folder,
            model=FAMILY,
            method={"estimator": "causal"},
            sync={"every": 1},
            report={"num_problems": 4, "num_train_problems": 2, "problems": held_out},
        )
    )
    return folder


def test_three_steps_of_grpo(run_dir: Path, tuned_causal: Path):
    assert_a_sound_run(run_dir)
    rows = rows_of(run_dir)
    assert all(row["sync/logprob_absdiff_max"] < 1e-4 for row in rows)  # the samplers have the learner's policy
    rollouts = read_all(run_dir / "rollouts").to_pylist()
    assert len(rollouts) == 3 * 4 * 4
    assert all(row["step_map"] == list(range(40)) for row in rollouts)
    before, after = (
        load_model(folder / "model", causal=True).state_dict() for folder in (tuned_causal.parent, run_dir)
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
    before, after = (read_report(run_dir / f"report_{when}.json") for when in ("before", "after"))
    assert before.keys() == after.keys() and len(before["held_out/t1.0"].num_correct) == 4


def test_number_of_workers_changes_nothing(run_dir: Path, tuned_causal: Path, problems_file: Path, tmp_path: Path):
    train(
        rl_config(
            tuned_causal,
            problems_file,
            tmp_path / "run",
            model=FAMILY,
            method={"estimator": "causal"},
            rollout={"num_workers": 2},
            judge={"num_workers": 2},
        )
    )
    ours, theirs = (
        [(row["completion_ids"], row["reward"]) for row in read_all(folder / "rollouts").to_pylist()]
        for folder in (tmp_path / "run", run_dir)
    )
    assert ours == theirs


def test_the_model_is_evaluated_and_asked(run_dir: Path, problems: list[Problem], called: Called):
    config = EvaluationConfig(
        problems=ProblemsConfig(source="microcode", num_prompt_tests=0),
        num_samples=2,
        temperature=1.0,
        sampling=ExactSampling(completion_tokens=40, steps=40, top_p=None),
        sandbox=SandboxConfig(backend="process"),
    )
    rates = evaluate_folder(run_dir / "model", config, problems)
    assert 0 < sum(rates.num_correct) <= 2 * len(problems)
    status, out, err = called(
        "generate", str(run_dir / "model"), problems[0].prompt, "--tokens", "40", "--temperature", "0"
    )
    assert status == 0 and "def f(" in out and "40 tokens" in err
    status, out, err = called("generate", str(run_dir / "model"), "def f(x): return <fill:3>", "--infill")
    assert status == 2 and "is autoregressive and fills no holes" in err, (out, err)
