"""A grid's runs and names, what is refused, and what is summed up of finished ones."""

import json

import pytest

from diffrl.config_file import parse_value
from diffrl.errors import ConfigError
from diffrl.sweep import Cell, Finished, as_json, as_markdown, cells_of, draw, groups_of


def test_a_grid():
    cells = cells_of(["method.estimator=coupled,full_mask", "seed=0,1"])
    assert [cell.name for cell in cells] == [
        *(
            "estimator-coupled_seed-0",
            "estimator-coupled_seed-1",
            "estimator-full_mask_seed-0",
            "estimator-full_mask_seed-1",
        )
    ]
    assert cells[1].overrides == ['method.estimator="coupled"', "seed=1"]
    assert [cell.group for cell in cells] == ["estimator-coupled"] * 2 + ["estimator-full_mask"] * 2
    assert [cell.group for cell in cells_of(["seed=3,4"])] == ["all", "all"]


def test_values_are_yaml():
    """Those with commas in brackets of their own; what a run reads is what was meant."""
    cells = cells_of(["x=1e-6,true,null,[a, b],{k: 2}"])
    assert [cell.settings["x"] for cell in cells] == [1e-6, True, None, ["a", "b"], {"k": 2}]
    for cell in cells:
        (override,) = cell.overrides
        assert parse_value(override.partition("=")[2]) == cell.settings["x"]
        assert set(cell.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.+"), cell.name


BAD = {
    "nothing": ([], "--over: not given"),
    "no values": (["seed="], "--over: 'seed=' must be KEY=VALUE,VALUE"),
    "no key": (["=1"], "--over: '=1' must be KEY=VALUE,VALUE"),
    "no sign": (["seed"], "--over: 'seed' must be KEY=VALUE,VALUE"),
    "no YAML": (["seed=[1"], "--over: 'seed=[1' must be KEY=VALUE,VALUE"),
    "a date": (["x=2026-01-01"], "quote what YAML reads otherwise"),
    "a value twice": (["seed=1,1"], "--over: seed: 1 is there twice"),
    "a key twice": (["seed=1", "seed=2"], "--over: seed is there twice"),
    "its own key": (["run_dir=a,b"], "run_dir is the sweep's own"),
    "too many": (["seed=" + ",".join(map(str, range(1001)))], "1001 runs are more than 1000"),
    "one name": (["x=a b,a-b"], "two runs would be called x-a-b"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_grids_are_one_line(name):
    texts, expected = BAD[name]
    with pytest.raises(ConfigError) as raised:
        cells_of(texts)
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def finished(estimator: str, seed: int, rewards: list[float], **others: float) -> Finished:
    rows = [{"step": step, "reward/mean": value} for step, value in enumerate(rewards)]
    rows += [{"step": len(rewards) - 1, key: value} for key, value in others.items()]
    return Finished(cell=Cell(settings={"method.estimator": estimator, "seed": seed}), seconds=10.0 + seed, rows=rows)


RUNS = [
    finished("coupled", 0, [float(n) for n in range(20)], **{"eval/pass@1": 0.5}),
    finished("coupled", 1, [float(n + 2) for n in range(20)], **{"eval/pass@1": 0.7}),
    finished("full_mask", 0, [1.0, 3.0]),
]


def test_what_runs_came_to():
    """By hand: the last tenth of 20 values are two; the range and deviation are over seeds."""
    coupled, full = groups_of(RUNS)
    reward = coupled.metrics["reward/mean"]
    assert (reward.final.mean, reward.final.low, reward.final.high) == (19.5, 18.5, 20.5)
    assert reward.final.deviation == pytest.approx(2**0.5)
    assert (reward.curve.mean, coupled.metrics["eval/pass@1"].final.mean) == (10.5, 0.6)
    assert len(reward.points) == 20 and reward.points[0][0] == 1
    assert (reward.points[0][1].low, reward.points[0][1].mean, reward.points[0][1].high) == (0.0, 1.0, 2.0)
    assert coupled.num_runs == 2 and coupled.seconds is not None and coupled.seconds.mean == 10.5
    assert full.metrics["reward/mean"].final.mean == 3.0 and full.metrics["reward/mean"].final.deviation is None
    assert set(full.metrics) == {"reward/mean"}  # it was never evaluated


def test_words_and_picture(tmp_path):
    groups = groups_of(RUNS)
    head, _, first, second = as_markdown(groups).splitlines()
    assert "reward/mean, final | reward/mean, curve | eval/pass@1, final" in head
    assert first.startswith("| method.estimator coupled | 2 | 10.5 ±0.71 [10..11] | 19.5 ±1.4 [18.5..20.5] | 10.5 ")
    assert second.startswith("| method.estimator full_mask | 1 | 10 | 3 | 2 | - | - |")
    raw = json.loads(json.dumps(as_json(RUNS, groups)))
    assert raw["groups"][0]["metrics"]["reward/mean"]["final"]["mean"] == 19.5 and len(raw["runs"]) == 3
    assert draw(groups, tmp_path / "a.svg", title="t") and "estimator-coupled" in (tmp_path / "a.svg").read_text()
    assert not draw(groups, tmp_path / "b.svg", title="t", metrics=["loss/kl"]) and not (tmp_path / "b.svg").exists()
