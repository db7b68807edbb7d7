"""Checkpoints of a supervised stage as folders, and the state of optimizers that act as one."""

import copy
from contextlib import closing
from pathlib import Path

import torch

from actors.engine import JointOptimizer
from diffrl.checkpoint import NOTE, Progress, checkpoint_path, committed_steps, last_step, prune
from diffrl.run_folder import MetricsFile


def make_checkpoints(folder: Path, steps: dict[int, bool]) -> None:
    """One for each step; those that are true are committed."""
    for step, committed in steps.items():
        path = checkpoint_path(folder, step)
        path.mkdir(parents=True)
        (path / "weights.pt").touch()
        if committed:
            (path / NOTE).touch()


def test_only_committed_checkpoints_count(tmp_path: Path):
    assert committed_steps(tmp_path) == [] and last_step(tmp_path) == 0
    make_checkpoints(tmp_path, {2: True, 10: True, 4: True, 12: False})
    assert committed_steps(tmp_path) == [2, 4, 10] and last_step(tmp_path) == 10


def test_the_newest_and_the_best_stay(tmp_path: Path):
    make_checkpoints(tmp_path, {2: True, 4: True, 6: True, 7: False, 8: True, 10: True})
    prune(tmp_path, keep=2, best_step=4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000004",
        "step-000008",
        "step-000010",
    ]
    prune(tmp_path, keep=1, best_step=None)
    assert committed_steps(tmp_path) == [10]


def test_metrics_are_cut_back_to_a_checkpoint(tmp_path: Path):
    with closing(MetricsFile(tmp_path)) as metrics:
        metrics.write({"step": 0})
        progress = Progress(step=1, metrics_bytes=metrics.sync())
        before = metrics.path.read_bytes()
        metrics.write({"step": 1})
        metrics.cut(Progress.from_note(progress.note()).metrics_bytes)
        assert metrics.path.read_bytes() == before
        metrics.write({"step": 1})
        assert metrics.path.read_bytes() == before + b'{"step": 1}\n'


def optimizer_of(model: torch.nn.Sequential) -> JointOptimizer:
    embedding, linear = model
    return JointOptimizer(
        [torch.optim.AdamW(embedding.parameters(), lr=0.1), torch.optim.Muon([linear.weight], lr=0.2)]
    )


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()


def test_optimizers_as_one_go_on_from_a_saved_state():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3, bias=False))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    optimizer = optimizer_of(model)
    steps(model, optimizer, 2)
    other = copy.deepcopy(model)
    resumed = optimizer_of(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, resumed):
        assert [group["lr"] for group in one.param_groups] == [0.1, 0.2]
        for group in one.param_groups:
            group["lr"] *= 0.5
    steps(model, optimizer, 1)
    steps(other, resumed, 1)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
    kept = [parameter.detach().clone() for parameter in other.parameters()]
    for group in resumed.param_groups:
        group["lr"] = 0.0  # reaches each of the two
    steps(other, resumed, 1)
    assert all(torch.equal(a, b) for a, b in zip(kept, other.parameters(), strict=True))
