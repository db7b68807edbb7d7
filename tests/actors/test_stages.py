"""Supervised stages as Ray Train jobs: equal to plain torch whatever the workers, undisturbed by kills, stopped cleanly."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.state import list_actors

from actors.stages import train_supervised
from diffrl.checkpoint import NOTE, checkpoint_path, committed_steps
from diffrl.config import PretrainConfig, SftConfig
from diffrl.config_file import dump_config, validate
from diffrl.data.microcode import microcode_exercises
from diffrl.data.rows import supervised_shards
from diffrl.data.sft import fenced
from diffrl.data.shards import collate, held_out_rows, kept_sizes, open_shards, read_part, training_parts
from diffrl.diffusion import batch_loss
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.models.folders import load_model, load_state_dict, save_model
from diffrl.models.tiny import load_tokenizer, tiny_model, train_tokenizer
from diffrl.run_folder import read_run
from diffrl.schedule import cosine_lr
from diffrl.supervised import make_optimizers, noised_batch, validation_batch
from tests.conftest import RayCluster

StageConfig = PretrainConfig | SftConfig
STEPS, BATCH, HELD_OUT, EVERY = 60, 8, 10, 20
ZERO_3 = {"zero_stage": 3, "stage3_param_persistence_threshold": 0}  # so that small models are divided too
PAIRS = [(e.prompt, fenced(e.solution)) for e in list(microcode_exercises("train"))[:90]]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random weights with its tokenizer."""
    folder = tmp_path_factory.mktemp("parent")
    tokenizer = train_tokenizer(["\n".join(pair) for pair in PAIRS], vocab_size=300)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_layers": 2}
    save_model(tiny_model(tokenizer, generator=torch.Generator().manual_seed(0), **sizes), folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of instruction tuning and of the other two stages."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "sft.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS))
    (folder / "text.txt").write_text("\n\n".join("\n".join(pair) for pair in PAIRS * 2))
    return {"sft": folder / "sft.jsonl", "pretrain": folder / "text.txt", "midtrain": folder / "text.txt"}


Make = Callable[..., StageConfig]


@pytest.fixture(scope="module")
def make(parent: Path, data: dict[str, Path]) -> Make:
    """A small stage; keywords replace keys inside the sections of the same name."""

    def config_of(run_dir: Path, stage: str = "sft", **sections: dict) -> StageConfig:
        rows: dict[str, Any] = {"source": "text", "path": str(data[stage]), "sequence_length": 48}
        if stage == "sft":
            rows = {"source": "files", "path": str(data[stage]), "max_prompt_tokens": 80, "completion_tokens": 60}
            rows["condition_steps"] = 10
        raw: dict[str, Any] = {
            "stage": stage,
            "run_dir": str(run_dir),
            "model": {"path": str(parent)},
            "data": rows,
            "optim": {"lr": 3e-3, "warmup_ratio": 0.1, "grad_norm": 0.5},
            "train": {"steps": STEPS, "batch_size": BATCH},
            "workers": {"threads": 1},
            "checkpoint": {"every": 8, "keep": 2},
            "validation": {"rows": HELD_OUT, "every": EVERY},
        }
        if stage == "midtrain":
            raw["optim"]["muon_lr"] = 0.01
        if stage == "pretrain":
            raw["adaptation"] = {"anneal_steps": 30, "random_length_frac": 0.2, "unnoised_prefix_frac": 0.2}
        for name, section in sections.items():
            raw[name] = {**raw[name], **section}
        config = validate(raw, "test")
        assert isinstance(config, StageConfig)
        return config

    return config_of


@pytest.fixture(scope="module")
def calm(ray_cluster: RayCluster, make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a stage in one worker that nothing happened to."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    train_supervised(make(folder))
    return folder


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """All lines without times: step, then its validation where there is one."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def assert_close(folder: Path, other: Path) -> None:
    left, right = metrics_of(folder), metrics_of(other)
    assert [row.keys() for row in left] == [row.keys() for row in right]
    for row, expected in zip(left, right, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6), (row, expected)


def assert_same(folder: Path, other: Path) -> None:
    assert metrics_of(folder) == metrics_of(other)
    for name in ("model", "best"):
        assert (folder / name / "model.safetensors").read_bytes() == (other / name / "model.safetensors").read_bytes()


def test_a_stage_equals_plain_torch(calm: Path, make: Make, tmp_path: Path, parent: Path):
    """The same batches, noise, schedule and clipping, written out; and its validation."""
    config = make(tmp_path / "run")
    assert isinstance(config, SftConfig)
    tokenizer = load_tokenizer(parent)
    shards = supervised_shards(config, tokenizer, tmp_path / "rows")
    manifest = open_shards(shards)
    model = load_model(parent)
    model.num_tokens = len(tokenizer)
    (adamw,) = make_optimizers(model, config.optim)
    kept = kept_sizes(manifest, HELD_OUT)
    parts = training_parts(manifest, seed=config.seed, first=0, stop=STEPS * BATCH, held_out=HELD_OUT)
    stream = [row for part in parts for row in read_part(shards, part, num_kept=kept[part.file])]
    held_out = held_out_rows(shards, manifest, HELD_OUT)
    layout: dict[str, Any] = {"length": manifest.length, "pad_token_id": manifest.pad_token_id, "pad_weight": 1.0}
    got = metrics_of(calm)
    for step in range(STEPS):
        rows = collate(stream[step * BATCH : (step + 1) * BATCH], **layout)
        batch = noised_batch(rows, config, step=step, mask_token_id=model.mask_token_id)
        adamw.zero_grad()
        loss, _ = batch_loss(model.train(), batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_norm)
        lr = cosine_lr(step, total=STEPS, peak=config.optim.lr, warmup=round(0.1 * STEPS), min_ratio=0.1)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        row = got.pop(0)
        assert row["step"] == step and row["optim/lr"] == lr
        assert row["loss/diffusion"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["optim/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        if (step + 1) % EVERY == 0:
            rows = collate(held_out, **layout)
            noised = validation_batch(rows, config, mask_token_id=model.mask_token_id)
            with torch.no_grad():
                expected = batch_loss(model.eval(), noised)[0].item()
            row = got.pop(0)
            assert row["step"] == step and row["validation/diffusion"] == pytest.approx(expected, rel=1e-5)
    assert got == []
    exported, trained = load_state_dict(calm / "model"), model.backbone.state_dict()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-4, atol=1e-5)


WORKERS = {
    "2 workers": {"num_workers": 2},
    "2 workers, ZeRO 1": {"num_workers": 2, "zero_stage": 1},
    "2 workers, ZeRO 3": {"num_workers": 2, **ZERO_3},
    "2 workers, ZeRO 2": {"num_workers": 2, "zero_stage": 2},
    "1 worker, ZeRO 1": {"zero_stage": 1},
    "1 worker, ZeRO 2": {"zero_stage": 2},
    "1 worker, ZeRO 3": ZERO_3,
    "4 workers": {"num_workers": 4},
    "2 workers, offload": {"num_workers": 2, "offload": "all", **ZERO_3},
    "recompute": {"recompute": True},
}


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param(case, id=name, marks=[] if index < 3 else pytest.mark.slow)
        for index, (name, case) in enumerate(WORKERS.items())
    ],
)
def test_workers_change_nothing(calm: Path, make: Make, tmp_path: Path, workers: dict):
    train_supervised(make(tmp_path / "run", workers={"threads": 1, **workers}, train={"rows_per_micro_batch": 3}))
    assert_close(tmp_path / "run", calm)
    for name in ("model", "best"):
        left, right = load_state_dict(tmp_path / "run" / name), load_state_dict(calm / name)
        assert left.keys() == right.keys()
        for key, tensor in left.items():
            torch.testing.assert_close(tensor, right[key], rtol=1e-3, atol=1e-4)


def test_what_a_run_leaves_behind(calm: Path):
    losses = {row["step"] + 1: row["validation/diffusion"] for row in metrics_of(calm) if "validation/nll" in row}
    assert list(losses) == [20, 40, 60]
    best = min(losses, key=losses.__getitem__)
    assert committed_steps(calm) == sorted({56, 60, best})
    assert {path.name for path in (calm / "checkpoints").iterdir()} == {f"step-{n:06d}" for n in {56, 60, best}}
    note = json.loads((checkpoint_path(calm, 60) / NOTE).read_text())
    assert (note["best_step"], note["best_loss"]) == (best, losses[best])
    assert note["metrics_bytes"] == (calm / "metrics.jsonl").stat().st_size
    model, weights = load_model(calm / "model"), load_model(calm / "best")
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), weights.parameters(), strict=True))
    assert same == (best == STEPS)
    assert load_tokenizer(calm / "best").vocab_size == load_tokenizer(calm / "model").vocab_size
    assert read_run(calm)["attempt"] == 1 and not (calm / "ray_train").exists()


# Kills


def lines(folder: Path) -> int:
    """Complete lines of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def train_workers() -> set[int]:
    """Process ids of the Ray Train workers of this cluster."""
    here = ray.get_runtime_context().gcs_address
    found = list_actors(address=here, filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    return {int(actor["pid"]) for actor in found if actor["pid"]}


class Watch(threading.Thread):
    """Calls `act` with the workers' process ids as soon as metrics.jsonl has `count` lines; `at`: how many there were."""

    def __init__(self, folder: Path, count: int, act: Callable[[set[int]], None]):
        super().__init__(daemon=True)
        self.folder, self.count, self.act = folder, count, act
        self.before = train_workers()
        self.at: int | None = None
        self.start()

    def run(self) -> None:
        deadline, pids = time.monotonic() + 200, set()
        while not pids and time.monotonic() < deadline:
            pids = train_workers() - self.before
            time.sleep(0.1)
        while lines(self.folder) < self.count and time.monotonic() < deadline:
            time.sleep(0.005)
        self.at = lines(self.folder)
        self.act(pids)


def kill(pids: set[int]) -> None:
    os.kill(max(pids), signal.SIGKILL)


def killed_worker(config: StageConfig, count: int) -> None:
    """The stage, one of whose workers is killed after `count` lines of metrics."""
    watch = Watch(Path(config.run_dir), count, kill)
    train_supervised(config)
    watch.join()
    assert watch.at is not None and count <= watch.at < STEPS


def killed_driver(config: StageConfig, count: int, cluster: RayCluster) -> None:
    """The stage, started again with --resume auto after its driver was killed after `count` lines of metrics."""
    folder = Path(config.run_dir)
    file = folder.with_suffix(".yaml")
    file.write_text(dump_config(config))
    command = [sys.executable, "-m", "actors.cli", "train", str(file), "--resume", "auto"]
    with folder.with_suffix(".log").open("w") as log:
        driver = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": cluster.address}, stdout=log, stderr=log)
        try:
            while lines(folder) < count and driver.poll() is None:
                time.sleep(0.005)
        finally:
            driver.kill()
            driver.wait()
    assert count <= lines(folder) < STEPS, folder.with_suffix(".log").read_text()[-2000:]
    train_supervised(config, resume="auto")
    assert read_run(folder)["attempt"] == 2


def test_a_killed_worker_changes_nothing(calm: Path, make: Make, tmp_path: Path):
    config = make(tmp_path / "run")
    killed_worker(config, random.Random(1).randrange(10, 40))
    assert_same(tmp_path / "run", calm)


@pytest.mark.slow
def test_a_killed_driver_changes_nothing(calm: Path, make: Make, tmp_path: Path, ray_cluster: RayCluster):
    config = make(tmp_path / "run")
    killed_driver(config, random.Random(2).randrange(10, 40), ray_cluster)
    assert_same(tmp_path / "run", calm)
    assert not list(tmp_path.glob("run.*/"))  # nothing was moved aside


def freeze(pids: set[int]) -> None:
    os.kill(max(pids), signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_frozen_worker_is_replaced(calm: Path, make: Make, tmp_path: Path, capfd, num_workers: int):
    """Alone it is missed by Ray Train; of two, the other one waits in a collective and says where."""
    config = make(tmp_path / "run", workers={"threads": 1, "num_workers": num_workers, "stall_s": 60.0})
    watch = Watch(Path(config.run_dir), 20, freeze)
    train_supervised(config)
    watch.join()
    assert_close(tmp_path / "run", calm)
    told = capfd.readouterr().err
    assert re.search(r"^workers were lost after step \d+; new ones go on from step \d+$", told, re.MULTILINE)
    reports = list((tmp_path / "run" / "stalls").glob("*.txt"))
    assert len(reports) == num_workers - 1
    for report in reports:
        assert "in all_reduce" in report.read_text()
        assert f"a worker was stuck and has been ended; its stacks: {report}" in told


def test_workers_without_a_place_end_the_stage(ray_cluster: RayCluster, make: Make, tmp_path: Path):
    """All places are there, but another one has them."""
    workers = {"cpus_per_worker": 8.0, "num_workers": 2, "start_s": 2.0, "max_failures": 1}
    taken = placement_group([{"CPU": 1.0}])
    ray.get(taken.ready())
    with pytest.raises(RunStoppedError) as caught:
        train_supervised(make(tmp_path / "run", workers=workers))
    remove_placement_group(taken)
    message = str(caught.value)
    assert message.startswith("workers.start_s: in 2 seconds the cluster had no room for 2 workers with 8 CPUs ")
    assert message.endswith("--resume auto") and "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "midtrain", "sft"])
def test_kills_in_a_row_change_nothing(ray_cluster: RayCluster, make: Make, tmp_path: Path, stage: str):
    """Two for each stage: a worker of two is killed, in the next run also the driver; before and after checkpoints."""
    rng = random.Random(f"kills/{stage}")
    workers = {"threads": 1, "num_workers": 2}
    train_supervised(make(tmp_path / "calm", stage, workers=workers))
    killed_worker(make(tmp_path / "worker", stage, workers=workers), rng.randrange(1, 45))
    assert_same(tmp_path / "worker", tmp_path / "calm")
    killed_driver(make(tmp_path / "driver", stage, workers=workers), rng.randrange(1, 45), ray_cluster)
    assert_same(tmp_path / "driver", tmp_path / "calm")


@pytest.mark.slow
def test_workers_that_keep_dying_end_the_run(ray_cluster: RayCluster, make: Make, tmp_path: Path):
    config = make(tmp_path / "run", workers={"threads": 1, "max_failures": 0})
    watch = Watch(tmp_path / "run", 10, kill)
    with pytest.raises(RunStoppedError, match=r"^workers.max_failures: more than 0 times .* --resume auto$"):
        train_supervised(config)
    watch.join()
    assert committed_steps(tmp_path / "run")


# Ends


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(calm: Path, make: Make, tmp_path: Path):
    """No file of the worker may grow beyond 64 KB, so the next checkpoint cannot be written, and nothing is tried again."""

    def fill(pids: set[int]) -> None:
        (pid,) = pids
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))

    folder = tmp_path / "run"
    watch = Watch(folder, 10, fill)
    with pytest.raises(RunStoppedError, match=r"step-0000\d\d cannot be written \(rank 0: .* earlier saves are whole"):
        train_supervised(make(folder))
    watch.join()
    assert committed_steps(folder) and len(list((folder / "checkpoints").iterdir())) == len(committed_steps(folder))
    train_supervised(make(folder), resume="auto")
    assert_same(folder, calm)


def test_steps_that_are_not_finite_are_counted_and_end_the_run(ray_cluster: RayCluster, make: Make, tmp_path: Path):
    config = make(tmp_path / "run", optim={"lr": 1e30, "weight_decay": 0.0}, train={"max_bad_steps": 3})
    with pytest.raises(RunStoppedError, match=r"^train.max_bad_steps: the loss or gradient of 3 steps in a row"):
        train_supervised(config)
    rows = metrics_of(tmp_path / "run")
    assert [row["optim/bad_steps"] for row in rows[-4:]] == [0, 1, 1, 1]
    assert rows[-1]["loss/diffusion"] is None and rows[-1]["optim/grad_norm"] is None


def test_a_finished_run_is_left_alone(calm: Path, make: Make, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in calm.rglob("*")}
    train_supervised(make(calm), resume="auto")
    assert "is finished; nothing was started" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in calm.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optim": {"lr": 1e-4}},
            r"^optim.lr: 0.0001 must be 0.003, with which the run in .* was started, to resume it",
        ),
        ({"workers": {"num_workers": 2}}, r"^workers.num_workers: 2 must be 1, with which"),
        ({"validation": {"rows": 3}}, r"^validation.rows: 3 must be 10, with which"),
    ],
)
def test_another_config_is_not_resumed(calm: Path, make: Make, change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        train_supervised(make(calm, **change), resume="auto")


# Before Ray starts


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever connects fails."""
    monkeypatch.setattr("actors.stages.connect", lambda *args, **kwargs: pytest.fail("Ray was asked for"))
    yield


def test_a_parent_of_another_architecture_is_refused(no_ray: None, make: Make, parent: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    for file in parent.iterdir():
        (other / file.name).symlink_to(file)
    (other / "config.json").unlink()
    hf_config = json.loads((parent / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**hf_config, "model_type": "gpt2"}))
    with pytest.raises(
        ConfigError, match=r"^model.path: .*other: model_type 'gpt2' is not supported; supported: Dream"
    ):
        train_supervised(make(tmp_path / "run", model={"path": str(other)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"validation": {"rows": 90}}, r"^validation.rows: 90 must be less than the 90 rows of the data$"),
        (
            {"data": {"completion_tokens": 2000}},
            r"data.completion_tokens: 2080 positions, more than the model's context of \d+; be at most \d+$",
        ),
        (
            {"workers": {"gpus_per_worker": 1.0}},
            r"^workers.gpus_per_worker: 1 ask for 1 GPUs and this machine has 0",
        ),
    ],
)
def test_what_does_not_fit_is_said_first(no_ray: None, make: Make, tmp_path: Path, sections: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        train_supervised(make(tmp_path / "run", **sections))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_it_would_do(no_ray: None, make: Make, tmp_path: Path, capsys, parent: Path):
    train_supervised(make(tmp_path / "run", train={"steps": None, "epochs": 2}), dry_run=True)
    num_parameters = sum(p.numel() for p in load_model(parent).parameters())
    said = capsys.readouterr().out
    assert said.startswith("ready: 90 rows (10 held out) with ")
    assert said.endswith(f" tokens, {num_parameters:,} parameters, 20 steps, 1 worker (ZeRO 0); nothing was started\n")
    assert not (tmp_path / "run").exists()
