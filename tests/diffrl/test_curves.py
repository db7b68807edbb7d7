"""What is drawn, read back from the figure, and the file that a run's folder gets."""

import json
import struct
from pathlib import Path

import pytest

from diffrl.curves import RL, SUPERVISED, draw, series_of, trend, write_curves
from diffrl.metrics import METRICS, find

RL_ROWS = [
    {
        "step": step,
        "reward/mean": 1.0 + step / 10,
        "reward/part/pass_rate": 0.5 + step / 10,
        "reward/part/format": 0.5,
        "group/pass@1": step / 100,
        "loss/kl": 1e-3 * step,
        "optim/grad_norm": 0.2,
    }
    for step in range(60)
]


def write(folder: Path, rows: list[dict], rest: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)
    return folder


def size_of(png: Path | None) -> tuple[int, int]:
    assert png is not None
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_every_line_is_of_a_metric_and_every_axis_names_its_unit():
    for panel in (*RL, *SUPERVISED):
        assert all(find(line.key) for line in panel.lines)
    series = {line.key: series_of(RL_ROWS, line.key) for panel in RL for line in panel.lines}
    figure = draw(RL, series, "a/rl")
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["reward", "chance", "nats per token", "L2 norm"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["steps"] * 4
    assert all(metric.unit and metric.help for metric in METRICS)


def test_lines_are_the_numbers_of_the_run():
    rows = [*RL_ROWS, {"step": 19, "eval/pass@1": 0.25}, {"step": 39, "eval/pass@1": 0.5}]
    series = {line.key: series_of(rows, line.key) for panel in RL for line in panel.lines}
    rewards, rates, *_ = draw(RL, series, "a/rl").axes
    shown = {line.get_label(): line for line in rewards.get_lines()}
    assert list(shown["reward/mean"].get_xdata()) == list(range(1, 61))
    raw = [line for line in rewards.get_lines() if line.get_alpha()]  # behind the trends
    assert list(raw[0].get_ydata()) == [row["reward/mean"] for row in RL_ROWS]
    dots = {line.get_label(): line for line in rates.get_lines()}["eval/pass@1"]
    assert list(dots.get_xdata()) == [20, 40] and list(dots.get_ydata()) == [0.25, 0.5] and dots.get_marker() == "o"
    colors = {line.get_color() for line in rewards.get_lines() if not line.get_alpha()}
    assert colors == {"#0072B2", "#E69F00", "#009E73"}


def test_a_trend_is_the_mean_of_neighbours():
    assert trend([1.0, 5.0, 3.0]) == [1.0, 5.0, 3.0]  # too few to be smoothed
    values = [float(i % 2) for i in range(40)]
    assert trend(values)[10] == pytest.approx(sum(values[9:12]) / 3)
    assert trend(values)[0] == pytest.approx(sum(values[:2]) / 2)


def test_steps_that_were_done_again_count_once_and_what_is_not_finite_is_left_out():
    rows = [{"step": s, "loss/diffusion": v} for s, v in [(0, 3.0), (1, 2.0), (2, None), (1, 2.5), (3, float("nan"))]]
    assert series_of(rows, "loss/diffusion") == ([1, 2], [3.0, 2.5])


def test_the_file_of_an_rl_run_and_of_a_supervised_stage(tmp_path: Path):
    assert write_curves(tmp_path) is None, "no metrics.jsonl"
    assert write_curves(write(tmp_path, [{"step": 0, "validation/nll": 1.0}])) is None, "nothing to draw"
    path = write_curves(write(tmp_path, RL_ROWS, rest='{"step": 60, "rew'))  # a line that is being written
    assert path == tmp_path / "curves.png" and size_of(path) == (1100, 730)
    stage = [{"step": step, "loss/diffusion": 5.0 - step, "optim/grad_norm": None} for step in range(3)]
    assert write_curves(write(tmp_path, stage)) == path and size_of(path) == (1100, 390)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_one_step_is_shown_as_a_dot():
    series = {line.key: series_of(RL_ROWS[:1], line.key) for panel in RL for line in panel.lines}
    assert draw(RL, series, "a/rl").axes[0].get_lines()[0].get_marker() == "o"
