"""`diffrl variance`: stored rollouts in the place of sampled ones, and what is refused before any weights are read."""

import json
from pathlib import Path

import numpy as np
import pytest

from diffrl.rollout_store import write_step
from diffrl.types import Judgement, Problem, Rollout, RolloutGroup, ScoredGroup
from tests.actors.conftest import Called, one_line
from tests.diffrl.tiny_folder import tiny_folder, tiny_tokenizer

WINDOW = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("lab") / "model", max_positions=256)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: two steps of two groups of three completions."""
    run = tmp_path_factory.mktemp("lab") / "run"
    for step in (0, 1):
        write_step(run / "rollouts", step, [group_of(2 * step), group_of(2 * step + 1)], [0.0] * 6)
    return run


def group_of(ordinal: int) -> ScoredGroup:
    draws = np.random.default_rng(ordinal)
    problem = Problem(id=f"p/{ordinal}", prompt=f"Return {ordinal}.", prompt_tests=(), reward_tests=("assert f()",))
    rollouts = tuple(
        Rollout(
            sample_index=index,
            seed=index,
            completion_ids_C=draws.integers(20, 60, WINDOW).astype(np.int32),
            step_map_C=np.arange(WINDOW, dtype=np.int32),
            probability_C=np.ones(WINDOW, dtype=np.float16),
            num_tokens=WINDOW - index,
            text="",
        )
        for index in range(3)
    )
    judged = Judgement(reward=0.0, format=0.0, pass_rate=0.0, statuses=("failed",), cpu_s=0.0)
    prompt_P = np.asarray([1, 2], dtype=np.int32)  # not stored: made anew from the prompt
    group = RolloutGroup(problem=problem, ordinal=ordinal, policy_version=0, prompt_ids_P=prompt_P, rollouts=rollouts)
    return ScoredGroup(group=group, judgements=(judged,) * 3)


def test_the_completions_of_a_run(model: Path, stored: Path, tmp_path: Path, called: Called):
    options = ("--rollouts", str(stored), "--draws", "3", "--masks", "1024", "--estimators", "coupled,full_mask")
    sizes = ("--problems", "2", "--samples", "2", "--lambdas", "1", "--json", f"{tmp_path}/v.json")
    status, stdout, _ = called("variance", str(model), *options, *sizes, "--step", "0")
    raw = json.loads((tmp_path / "v.json").read_text())
    assert (
        status == 0 and raw["settings"]["problems"] == ["p/0", "p/1"] and raw["settings"]["rollouts"].endswith("step 0")
    )
    assert (raw["settings"]["samples"], raw["settings"]["completion_tokens"]) == (2, WINDOW)
    full = next(row for row in raw["estimators"] if row["estimator"] == "full_mask")
    assert full["passes"] == 0.5 and full["sequence_variance"]["value"] == 0
    assert raw["truth"]["sequence_mean"] < -10 and "full_mask" in stdout  # random weights: over five nats a token


BAD = {
    "estimator": (["--estimators", "couple"], ["--estimators: 'couple' is unknown", "did you mean 'coupled'"]),
    "another family": (["--estimators", "causal"], ["--estimators: 'causal' is unknown"]),
    "lambda": (["--lambdas", "0,1"], ["--lambdas: '0,1' must be numbers from 1 to 64"]),
    "no lambda": (["--lambdas", "x"], ["--lambdas: 'x'"]),
    "range": (["--t-range", "0.8:0.2"], ["--t-range: '0.8:0.2' must be LOW:HIGH"]),
    "no range": (["--t-range", "0.2"], ["--t-range: '0.2'"]),
    "distribution": (["--t-distribution", "unifrom"], ["--t-distribution: 'unifrom'", "did you mean 'uniform'"]),
    "nothing left": (["--estimators", "coupled_normalized", "--t-range", "0.2:0.9"], ["--estimators", "t_min: 0.2"]),
    "draws": (["--draws", "1"], ["--draws: 1 must be at least 2"]),
    "samples": (["--samples", "1"], ["--samples: 1 must be at least 2"]),
    "problems": (["--problems", "0"], ["--problems: 0 must be at least 1"]),
    "too many problems": (["--problems", "1000000"], ["--problems: 1000000 must be at most"]),
    "masks": (["--masks", "100"], ["--masks: 100 must be at least 1024"]),
    "tokens": (["--tokens", "0"], ["--tokens: 0"]),
    "steps": (["--steps", "0"], ["--steps: 0"]),
    "too long": (["--tokens", "1000"], ["1000 to fill", "more than the 256"]),
    "step of nothing": (["--step", "1"], ["--step: 1 given without --rollouts"]),
    "no run": (["--rollouts", "/nowhere"], ["--rollouts: /nowhere", "folder of an RL run"]),
    "no step": (["--rollouts", "RUN", "--step", "7"], ["--step: 7 must be one of those of", "0 to 1"]),
    "too many of a run": (["--rollouts", "RUN", "--problems", "3"], ["--problems: 3 must be at most 2"]),
    "siblings of a run": (
        ["--rollouts", "RUN", "--problems", "2", "--samples", "4"],
        ["--samples: 4 must be at most 3"],
    ),
    "two sources": (["--rollouts", "RUN", "--data", "x.jsonl"], ["--data", "--rollouts"]),
    "no data": (["--data", "/nowhere.jsonl"], ["/nowhere.jsonl"]),
    "no folder for the numbers": (["--json", "/nowhere/x.json"], ["--json: /nowhere/x.json"]),
    "a file as folder": (["--out", "FILE"], ["--out", "is a file"]),
    "no weights": ([], ["model.safetensors"]),  # what all others are found out before
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_weights_are_read(
    name: str, model: Path, stored: Path, tmp_path: Path, called: Called
):
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    arguments, expected = BAD[name]
    places = {"RUN": str(stored), "FILE": str(tmp_path / "config.json")}
    one_line(called("variance", str(tmp_path), *(places.get(a, a) for a in arguments)), expected)


def test_tokens_of_another_model(model: Path, tmp_path: Path, called: Called):
    scored = group_of(0)
    scored.group.rollouts[0].completion_ids_C[0] = len(tiny_tokenizer()) + 5
    write_step(tmp_path / "rollouts", 0, [scored], [0.0] * 3)
    made = called("variance", str(model), "--rollouts", str(tmp_path), "--problems", "1", "--samples", "2")
    one_line(made, ["--rollouts", "give the run's own model"])
