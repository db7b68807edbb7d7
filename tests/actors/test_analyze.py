"""`diffrl analyze`: a model that is sampled, a run that is read, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffrl.analysis import global_ar_ness, local_ar_ness, reveal_order
from diffrl.config.analyze import AnalyzeConfig
from diffrl.config_file import load_as
from diffrl.rollout_store import read_all, step_file
from diffrl.sampler.params import reveal_counts
from tests.actors.conftest import WINDOW, Called, one_line
from tests.conftest import RayCluster
from tests.diffrl.board_run import Shape, make_run
from tests.diffrl.test_added_tokens import qwen
from tests.diffrl.tiny_folder import tiny_folder

SMALL = (
    *("problems.source=microcode", "problems.num_prompt_tests=0", "problems.limit=3", "num_samples=2", "pass_k=[1,2]"),
    *("max_k=3", "sampling.completion_tokens=12", "sampling.steps=12", "temperatures=[0.3,2]", "temperature=0.3"),
    "sandbox.backend=process",
)


def rows_of(out: Path, name: str) -> list[dict]:
    return json.loads((out / f"{name}.json").read_text())["rows"]


def test_a_model_beside_the_rollouts_of_a_run(tmp_path: Path, called: Called):
    """Two calls into one folder: the first one's is moved aside. Random weights pass nothing, so nothing is lost by speed."""
    model, run = tiny_folder(tmp_path / "policy", max_positions=256), make_run(tmp_path / "run", Shape(steps=3))
    math, out = tmp_path / "math.jsonl", tmp_path / "out"
    math.write_text(json.dumps({"question": "What is 2 + 2?", "answer": "2 + 2 = 4\n#### 4"}) + "\n")
    arguments = ("analyze", str(model), str(run), *SMALL, f"math.path={math}", f"out={out}")
    status, stdout, stderr = called(*arguments)
    assert status == 0, stderr
    *lines, last = stdout.splitlines()
    assert last.endswith(f"-> {out}/summary.md") and last.startswith("9 tables, 8 plots in ")
    verdicts = [line for line in lines if line.startswith(("seen ", "not seen ", "undecided "))]
    assert any("temperature lowers AR-ness: policy, global@1 " in line for line in verdicts)
    assert any("RL lowers AR-ness: run rollouts, local@1 " in line for line in verdicts)
    assert any(line.startswith("not seen   temperature raises pass@k: policy, pass@2 +0.000") for line in verdicts)
    assert "before and after RL: not compared" in stdout and "policy: 0.0% of its math samples" in stdout
    files = {path.name for path in out.iterdir()}
    assert {
        "summary.md",
        "config.yaml",
        "analysis.json",
        "claims.json",
        "math.svg",
        "steps.png",
        "training.svg",
    } <= files

    steps = {row["steps"]: row for row in rows_of(out, "steps")}
    passes = {number: sum(count > 0 for count in reveal_counts(12, number, 1e-3)) for number in (12, 6, 3)}
    assert {number: row["passes"] for number, row in steps.items()} == passes and passes[12] == 11
    assert all(row["speedup"] == pytest.approx(11 / row["passes"]) for row in steps.values())
    assert [row["look"] for row in rows_of(out, "entropy_sink")] == [1, 2, 3]
    assert len(rows_of(out, "entropy_sink")[0]["probability"]) == 12
    (order, _) = rows_of(out, "decoding_order")
    assert (order["num_positions"], order["num_steps"]) == (12, 12) and len(order["share"]) == 12

    stored = read_all(run / "rollouts").to_pylist()
    orders = {}
    for row in stored:
        size = row["num_tokens"]
        order = reveal_order(row["step_map"][:size], row["probability"][:size])
        orders.setdefault(row["ordinal"], []).append(order)
    told = {(row["kind"], row["k"]): row for row in rows_of(out, "ar_ness") if row["source"] == "run rollouts"}
    for kind, of in (("local", local_ar_ness), ("global", global_ar_ness)):
        means = [np.mean([of(order, 2) or 0.0 for order in group]) for group in orders.values()]
        assert told[kind, 2]["mean"] == pytest.approx(np.mean(means)) and told[kind, 2]["problems"] == len(orders) == 9

    status, stdout, stderr = called("analyze", str(run), f"out={out}")
    assert status == 0 and stdout.splitlines()[-1].startswith("4 tables, 3 plots in "), stderr
    assert (tmp_path / "out.1/math.svg").is_file() and not (out / "math.svg").exists()
    assert {row["source"] for row in rows_of(out, "ar_ness")} == {"run rollouts"}


def test_workers_share_the_problems_and_change_nothing(
    ray_cluster: RayCluster, tuned_model: Path, problems_file: Path, tmp_path: Path, called: Called
):
    """A model that solves some problems, so that verdicts count; here, and by two Ray tasks."""
    window = WINDOW["completion_tokens"]
    settings = (
        *("problems.source=problems", f"problems.path={problems_file}", "problems.num_prompt_tests=0"),
        *("num_samples=4", "pass_k=[1,4]", f"sampling.completion_tokens={window}", "sampling.steps=20", "speedups=[2]"),
        *("temperatures=[1]", "temperature=1", "cpus_per_worker=0.25", "sandbox.backend=process"),
    )
    for number in (0, 2):
        out = ("num_workers", number), ("out", tmp_path / str(number))
        status, _, stderr = called("analyze", str(tuned_model), *settings, *(f"{key}={value}" for key, value in out))
        assert status == 0, stderr
    names = sorted(path.name for path in (tmp_path / "0").glob("*.json") if path.name != "analysis.json")
    assert "steps.json" in names
    for name in names:
        assert (tmp_path / "0" / name).read_text() == (tmp_path / "2" / name).read_text(), name
    rates = {row["k"]: row["mean"] for row in rows_of(tmp_path / "2", "pass_at_k")}
    assert 0 < rates[1] < 1 and rates[1] <= rates[4]


def without_steps(run: Path, empty: bool) -> None:
    """The first file's step maps: none, or of another kind of policy."""
    file = step_file(run / "rollouts", 0)
    table = pq.read_table(file)
    rows = [{**row, "step_map": [] if empty else [-1] * len(row["step_map"])} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)


def test_the_quickstart_is_sampled_at_five_settings():
    file = Path(__file__).parents[2] / "configs" / "quickstart_analysis.yaml"
    config = load_as(AnalyzeConfig, file)
    assert config.settings() == [(0.2, 30), (0.2, 15), (0.2, 7), (0.6, 30), (1.2, 30)]
    for temperature, steps in config.settings():
        params = config.at(temperature, steps).params()
        assert (params.temperature, params.steps, params.top_p, params.is_exact) == (temperature, steps, None, True)


def test_bad_input_is_one_line(tmp_path: Path, called: Called):
    model = str(tiny_folder(tmp_path / "policy", max_positions=64))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/thesis.txt").write_text("x")
    (tmp_path / "math.jsonl").write_text('{"question": "2 + 2?", "answer": "#### 4"}\n{"question": "3 + 3?"}\n')
    (tmp_path / "new/rollouts").mkdir(parents=True)
    stage = tmp_path / "pipeline/sft"
    tiny_folder(stage / "model")
    qwen(tmp_path / "ar")
    small = (model, *SMALL)
    for arguments, expected in (
        ((str(tmp_path / "nowhere"),), ["SOURCE", "no folder at", "nowhere"]),
        ((str(tmp_path / "kept"),), ["SOURCE", "neither a model's folder nor a run"]),
        ((str(stage),), ["SOURCE", f"give {stage}/model"]),
        ((str(stage.parent),), ["SOURCE", f"give {stage}/model"]),
        ((str(tmp_path / "new"),), ["SOURCE", "no rollouts yet"]),
        (("seed=1",), ["SOURCE", "none given"]),
        ((model, *small), ["SOURCE", "given twice"]),
        ((model,), ["problems: missing", "problems.source"]),
        ((str(tmp_path / "ar"), *SMALL), ["SOURCE", "is autoregressive", "diffusion model"]),
        ((*small, "num_sample=4"), ["num_sample: unknown key", "did you mean 'num_samples'?"]),
        ((*small, "sampling.step=4"), ["sampling.step: unknown key", "'steps'"]),
        ((*small, "pass_k=[1,3]"), ["pass_k: 3", "num_samples 2"]),
        ((*small, "max_k=12"), ["max_k: 12", "sampling.completion_tokens 12"]),
        ((*small, "speedups=[13]"), ["speedups: 13", "sampling.steps 12"]),
        ((*small, "speedups=[4]"), ["speedups: [4]", "hold 2"]),
        ((*small, "temperatures=[0]"), ["temperatures.0: 0"]),
        ((*small, "sampling.completion_tokens=60"), ["60 to fill", "more than the 64", "microcode/"]),
        ((*small, "math.path=/nowhere.jsonl"), ["math.path", "/nowhere.jsonl"]),
        ((*small, f"math.path={tmp_path}/math.jsonl"), ["math.path", "line 2", "'answer'"]),
        ((*small, f"out={tmp_path}/kept"), ["out:", "something else than an analysis"]),
        ((*small, "--config", "/nowhere.yaml"), ["config", "/nowhere.yaml"]),
    ):
        one_line(called("analyze", *arguments), expected)
    status, stdout, stderr = called("analyze", model, "--confg", "x.yaml")
    assert status == 2 and stdout == "" and "--confg" in stderr and "--config" in stderr


@pytest.mark.parametrize("empty", [True, False])
def test_a_run_without_step_maps_is_refused(empty: bool, tmp_path: Path, called: Called):
    run = make_run(tmp_path / "run", Shape(steps=1))
    without_steps(run, empty)
    made = called("analyze", str(run), f"out={tmp_path}/out")
    one_line(made, ["SOURCE", "step_000000.parquet", "no step map", "diffusion model"])
    assert not (tmp_path / "out").exists()
