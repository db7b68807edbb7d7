"""From samples to measures, claims, tables, plots and summary: with planted orders, of which the answers are known."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from diffrl.analysis.claims import (
    CODE_MATH,
    RL_ORDER,
    RL_STEPS,
    SINK,
    TEMPERATURE_ORDER,
    TEMPERATURE_PASS,
    compared,
)
from diffrl.analysis.plots import PLOTS, write_plots
from diffrl.analysis.results import MathResult, ModelResult, RunResult, claims_of, tables_of
from diffrl.analysis.samples import (
    Looks,
    Measures,
    Sample,
    measure,
    order_distance,
    order_map,
)
from diffrl.analysis.summary import PICTURES, claim_lines, summary

WINDOW, MAX_K = 8, 3


def sample(
    step_map: list[int],
    *,
    problem: str = "a",
    ids: list[int] | None = None,
    passed: bool | None = True,
    tokens: int = 0,
) -> Sample:
    return Sample(
        problem_id=problem,
        ids_C=np.array(ids or range(len(step_map))),
        step_map_C=np.array(step_map),
        probability_C=np.full(len(step_map), 0.5),
        num_tokens=tokens or len(step_map),
        passed=passed,
    )


def test_measures_of_a_problem_are_means_over_its_samples():
    """Left to right, and its mirror; other tokens at one place of four."""
    right, left = sample([0, 1, 2, 3]), sample([3, 2, 1, 0], ids=[0, 1, 2, 9], passed=False)
    found = measure([right, left], max_k=2, pass_ks=(1, 2, 3))
    assert found.problem_ids == ("a",) and found.num_samples == 2
    values = {name: float(column[0]) for name, column in found.values.items()}
    assert np.isnan(values.pop("pass@3")), "more than there are samples"
    assert values == {
        **{"local@1": 0.5, "global@1": (1 + 1 / 4) / 2, "local@2": 0.5, "global@2": (1 + 2 / 4) / 2},
        **{"pass@1": 0.5, "pass@2": 1.0, "order_diversity": 1.0, "token_diversity": 0.25, "distinct": 1.0},
        **{"passes": 4.0, "tokens": 4.0},
    }


def test_only_the_text_counts_and_what_was_not_judged_is_left_out():
    """Two of four positions are text, revealed from left to right; both come in the second of two steps."""
    found = measure(
        [sample([1, 1, 0, 0], tokens=2, passed=None), sample([1, 1, 0, 0], tokens=2)], max_k=1, pass_ks=(1,)
    )
    assert {name: float(c[0]) for name, c in found.values.items()} == {
        **{"local@1": 1.0, "global@1": 1.0, "pass@1": 1.0, "order_diversity": 0.0, "token_diversity": 0.0},
        **{"distinct": 0.5, "passes": 2.0, "tokens": 2.0},
    }
    single = measure([sample([0], tokens=1)], max_k=1, pass_ks=(1,))
    assert single.column("local@1") == {} and single.column("order_diversity") == {}, "nothing to measure"
    assert single.column("global@1") == {"a": 1.0} and single.column("unknown") == {}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([0, 1, 2], [0, 1, 2], 0.0), ([0, 1, 2], [2, 1, 0], 1.0), ([0, 1, 2], [0, 2, 1], 1 / 3), ([2, 0, 1, 3], [1, 0], 1.0),
     ([0], [0], None)],
)  # fmt: skip
def test_order_distance_is_the_share_of_pairs_in_another_order(first, second, expected):
    assert order_distance(first, second) == expected and order_distance(second, first) == expected


def test_order_map_is_a_distribution_over_steps_for_each_position():
    found = order_map([sample([0, 1, 1]), sample([2, 1, 0], tokens=2)])
    assert (found.num_positions, found.num_steps, found.text_tokens) == (3, 3, 2.5)
    assert found.share == ((0.5, 0.0, 0.5), (0.0, 1.0, 0.0), (0.5, 0.5, 0.0))
    wide = order_map([sample(list(range(128)))])
    assert np.allclose(wide.share, np.eye(64)), "two positions and two steps a bin"


def scores(*values: float) -> dict[str, float]:
    return {f"p{n}": value for n, value in enumerate(values)}


@pytest.mark.parametrize(
    ("gain", "wanted", "verdict"),
    [
        ([0.2, 0.3, 0.1, 0.2], "higher", "seen"),
        ([0.2, 0.3, 0.1, 0.2], "lower", "not seen"),
        ([-0.2, -0.3, -0.1, -0.2], "lower", "seen"),
        ([0.5, -0.5, 0.4, -0.4], "higher", "undecided"),
        ([0.0, 0.0, 0.0, 0.0], "higher", "not seen"),
        ([0.0, 0.0, 0.0, 0.0], "lower", "not seen"),
    ],
)
def test_verdicts(gain, wanted, verdict):
    found = compared("c", "s", "m", wanted, ("x", scores(0, 0, 0, 0)), ("y", scores(*gain)), seed=0)
    assert found is not None and found.verdict == verdict and found.row()["verdict"] == verdict
    assert found.low <= found.gain <= found.high and found.count == 4


def test_pairs_are_problems_that_both_have():
    found = compared("c", "s", "m", "lower", ("x", {"a": 0.5, "b": 0.9}), ("y", {"b": 0.4, "c": 0.0}), seed=0)
    assert found is not None and (found.count, found.mean_before, found.mean_after, found.gain) == (1, 0.9, 0.4, -0.5)
    assert compared("c", "s", "m", "lower", ("x", {"a": 0.5}), ("y", {"c": 0.0}), seed=0) is None
    free = compared("c", "s", "m", "lower", ("x", {"a": 0.5}), ("y", {"c": 0.0, "d": 0.2}), seed=0, paired=False)
    assert free is not None and (free.count, free.gain) == (1, -0.4)


# Whole analyses: a model that is left to right as often as planted, and right as often as planted.


def cell(share_ordered: float, share_right: float, *, width: int = 1, seed: int = 0, problems: int = 24) -> Measures:
    rng = np.random.default_rng(seed)
    samples = []
    for problem in range(problems):
        for _ in range(4):
            ordered = rng.random() < share_ordered
            order = np.arange(WINDOW) if ordered else rng.permutation(WINDOW)
            samples.append(
                sample(
                    [int(s) // width for s in np.argsort(order)],
                    problem=f"p{problem}",
                    ids=[int(i) for i in rng.integers(9, size=WINDOW)] if not ordered else None,
                    passed=bool(rng.random() < share_right),
                )
            )
    return measure(samples, max_k=MAX_K, pass_ks=(1, 2, 4))


def model(name: str, ordered: float, half: float, *, math: bool = False, sink: float = 0.9) -> ModelResult:
    """Right at full steps: 0.9 of all at the main temperature, a tenth of that at the low one."""
    probability = np.full((2, WINDOW), 0.2, np.float32)
    probability[0, :2], probability[1, 0] = sink, np.nan
    return ModelResult(
        name=name,
        cells={
            (0.4, 8): cell(ordered, 0.9, seed=1),
            (0.4, 4): cell(ordered, half, width=2, seed=2),
            (0.2, 8): cell(1.0, 0.09, seed=3),
            (1.4, 8): cell(0.1, 0.5, seed=4),
        },
        main=(0.4, 8),
        order=order_map([sample(list(range(WINDOW))), sample([7, *range(7)])]),
        looks={f"p{n}": Looks(probability_KC=probability, entropy_KC=1 - probability) for n in range(24)},
        math=MathResult(measures=cell(1.0, 0.0, seed=5), right=0.25) if math else None,
    )


def run() -> RunResult:
    """Ten steps that go from left to right to any order."""
    steps = tuple((step, cell(1 - step / 9, 0.5, seed=10 + step, problems=6)) for step in range(10))
    return RunResult(name="rl rollouts", overall=cell(0.5, 0.5, seed=6), order=order_map([sample([1, 0])]), steps=steps)


def test_planted_claims_are_seen_and_the_opposite_is_not():
    before, after = model("sft", 0.9, 0.1), model("rl", 0.2, 0.85, math=True)
    found = {(c.claim, c.source, c.measure): c.verdict for c in claims_of([before, after, run()], seed=0)}
    for name in ("sft", "rl"):
        assert found[TEMPERATURE_ORDER, name, "global@1"] == found[TEMPERATURE_ORDER, name, "local@1"] == "seen"
        assert found[TEMPERATURE_PASS, name, "pass@4"] == "seen"
        assert found[SINK, name, "probability of the most probable token"] == "seen"
    assert found[RL_ORDER, "sft -> rl", "global@1"] == found[RL_ORDER, "rl rollouts", "local@1"] == "seen"
    assert found[RL_STEPS, "sft -> rl", "pass@1 at 8 less at 4 steps"] == "seen"
    assert found[CODE_MATH, "rl", "global@1"] == "seen" and (CODE_MATH, "sft", "global@1") not in found
    turned = {(c.claim, c.measure): c.verdict for c in claims_of([after, before], seed=0) if "->" in c.source}
    assert set(turned.values()) == {"not seen"} and len(turned) == 3
    flat = [c.verdict for c in claims_of([model("x", 0.5, 0.5, sink=0.1)], seed=0) if c.claim == SINK]
    assert flat == ["not seen"]


def test_tables_hold_the_numbers_and_are_json():
    first = model("sft", 0.9, 0.1)
    results = [first, model("rl", 0.2, 0.85, math=True), run()]
    tables = tables_of(results, claims_of(results, seed=0), max_k=MAX_K, seed=0)
    assert json.loads(json.dumps(tables, allow_nan=False)) == tables
    assert set(PICTURES) == set(PLOTS) == set(tables) - {"claims"}
    full, half = (first.cells[0.4, n].values["pass@1"].mean() for n in (8, 4))
    rows = {(r["source"], r["steps"], r["measure"]): r for r in tables["steps"]["rows"]}
    assert rows["sft", 4, "loss"]["mean"] == pytest.approx(full - half) and rows["sft", 4, "loss"]["speedup"] == 2
    assert rows["sft", 8, "loss"]["mean"] == 0 and rows["sft", 8, "loss"]["speedup"] == 1
    assert {(r["temperature"], r["k"]) for r in tables["pass_at_k"]["rows"]} == {
        (t, k) for t in (0.2, 0.4, 1.4) for k in (1, 2, 4)
    }
    first, second = (row for row in tables["entropy_sink"]["rows"] if row["source"] == "rl")
    assert first["probability"] == pytest.approx([0.9, 0.9, *[0.2] * 6]) and second["probability"][0] is None
    only_run = tables_of([run()], [], max_k=MAX_K, seed=0)
    assert set(only_run) == {"ar_ness", "decoding_order", "training"}, "no table without rows"


def test_plots_show_the_tables_with_words_on_every_axis(tmp_path: Path):
    results = [model("sft", 0.9, 0.1), model("rl", 0.2, 0.85, math=True), run()]
    tables = tables_of(results, claims_of(results, seed=0), max_k=MAX_K, seed=0)
    for name, plot in PLOTS.items():
        for axes in plot(tables[name]).axes:
            assert axes.get_ylabel() and (axes.get_xlabel() or axes.get_label() == "<colorbar>"), name
    local = PLOTS["ar_ness"](tables["ar_ness"]).axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in local.get_lines()}
    rows = [r for r in tables["ar_ness"]["rows"] if (r["source"], r["kind"]) == ("rl", "local")]
    assert lines["rl"] == [r["mean"] for r in rows] and set(lines) == {"sft", "rl", "rl rollouts"}
    styles = {(line.get_color(), line.get_marker()) for line in local.get_lines()}
    assert len(styles) == 3, "told apart by colour and by mark"

    few = {name: tables[name] for name in ("decoding_order", "steps", "claims")}
    written = write_plots(tmp_path, few)
    assert {path.name for path in written} == {
        f"{n}.{kind}" for n in ("decoding_order", "steps") for kind in ("svg", "png")
    }
    one = {"steps": tables["steps"]}
    first = {path: path.read_bytes() for path in written if path.stem == "steps"}
    assert {path: path.read_bytes() for path in write_plots(tmp_path, one)} == first, "the same tables, the same bytes"
    words = " ".join(ElementTree.parse(tmp_path / "steps.svg").getroot().itertext())
    assert "lost against full steps" in words and "speed-up" in words and "sft" in words


def test_summary_says_each_claim_with_its_interval_and_what_is_missing():
    results = [model("sft", 0.9, 0.1), model("rl", 0.2, 0.85, math=True)]
    claims = claims_of(results, seed=0)
    tables = tables_of(results, claims, max_k=MAX_K, seed=0)
    text = summary(tables, [("sft", "a model"), ("rl", "another")], ["math: none"])
    for claim in claims:
        line = next(
            line for line in text.splitlines() if f"| {claim.claim} | {claim.source} | {claim.measure} |" in line
        )
        assert f"**{claim.verdict}**" in line and f"[95% {claim.low:+.3f}..{claim.high:+.3f}]" in line
    assert "- math: none" in text and all(f"({name}.svg)" in text for name in PICTURES if name in tables)
    lines = claim_lines(tables)
    assert len(lines) == len(claims) and lines[0].startswith("seen       temperature lowers AR-ness: sft, local@1 -")
