"""The report page, read back as a browser reads it: its numbers are those of the folders, and what others wrote stays text."""

import base64
import hashlib
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffrl.analysis import global_ar_ness, local_ar_ness, paired_bootstrap, reveal_order
from diffrl.errors import ConfigError
from diffrl.report.charts import brief, ticks
from diffrl.report.html import Html, el
from diffrl.report.page import write_report
from diffrl.report.runs import groups_of, open_runs
from diffrl.report.samples import LEVELS, chosen_rows
from diffrl.rollout_store import SCHEMA, read_all, step_file
from tests.diffrl.board_run import Shape
from tests.diffrl.report_runs import NUM_PROBLEMS, make_rl_run, make_sft_run, write_rates

SHAPE = {seed: Shape(steps=5, groups=3, group_size=4, seed=seed) for seed in range(4)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Three seeds of one configuration, and an autoregressive run."""
    root = tmp_path_factory.mktemp("runs")
    seeds = [make_rl_run(root / f"coupled-{seed}", seed, shape=SHAPE[seed]) for seed in range(3)]
    return [*seeds, make_rl_run(root / "ar", 0, {"estimator": "causal"}, SHAPE[3], 0.7)]


@pytest.fixture
def own(folders: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[0], tmp_path / "own"))


@pytest.fixture(scope="module")
def page(folders: list[Path], tmp_path_factory) -> Element:
    return parsed(report(tmp_path_factory.mktemp("page"), *folders))


def report(tmp_path: Path, *folders: Path) -> str:
    return write_report([str(folder) for folder in folders], str(tmp_path / "report.html")).read_text()


class Reader(HTMLParser):
    """A tree of the elements; an end that fits no beginning is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.builder, self.open = TreeBuilder(), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        if tag == "meta":
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.builder.data(data)


def parsed(text: str) -> Element:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader.builder.close()


def words(element: Element) -> str:
    return "".join(element.itertext())


def table(page: Element, caption: str) -> list[list[str]]:
    """Rows of the one table whose caption begins like this; the head first."""
    (found,) = (t for t in page.iter("table") if t.attrib["aria-label"].startswith(caption))
    return [[words(cell) for cell in row] for row in found.iter("tr")]


def labels(page: Element) -> list[str]:
    return [svg.attrib["aria-label"] for svg in page.iter("svg") if "aria-label" in svg.attrib]


def correct(folder: Path, when: str, key: str) -> list[float]:
    """Share of right samples of each problem, from the file."""
    row = json.loads((folder / f"report_{when}.json").read_text())[key]
    return [c / row["num_samples"] for c in row["num_correct"]]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_families_stand_side_by_side(page, folders):
    head, *rows = table(page, "The runs")
    assert [row[head.index("family")] for row in rows] == ["diffusion"] * 3 + ["autoregressive"]
    assert [row[head.index("method")] for row in rows] == ["coupled"] * 3 + ["causal"]
    assert [row[head.index("seed")] for row in rows] == ["0", "1", "2", "0"]
    assert [row[head.index("rollouts")] for row in rows] == ["60"] * 4
    rewards = [brief(metrics(folder)[-1]["reward/mean"]) for folder in folders]
    assert [row[head.index("reward")] for row in rows] == rewards


def test_pass_rates_are_those_of_the_files(page, folders):
    head, *rows = table(page, "pass@1 on held-out")
    assert len(rows) == len(folders) and f"{NUM_PROBLEMS} problems, 8 samples" in words(page)
    first = correct(folders[0], "after", "held_out/t1.0")
    for seed, (folder, row) in zip((0, 1, 2, 0), zip(folders, rows, strict=True), strict=True):
        cells = dict(zip(head, row, strict=True))
        before, after = (correct(folder, when, "held_out/t1.0") for when in ("before", "after"))
        assert cells["before"].startswith(f"{100 * np.mean(before):.1f}% [")
        assert cells["after"].startswith(f"{100 * np.mean(after):.1f}% [")
        gain, low, high = paired_bootstrap(before, after, seed=seed)
        assert cells["gain, points"] == f"{100 * gain:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        against = f"{100 * (np.mean(after) - np.mean(first)):+.1f} ["
        assert cells["against the first, points"].startswith(against if folder != folders[0] else "—")
    head, *rows = table(page, "All pass rates")
    assert len(rows) == len(folders) * (3 * 2 + 1)  # pass@1 and pass@8 of three sets, greedy
    greedy = [dict(zip(head, row, strict=True)) for row in rows if row[1] == "held-out, greedy, pass@1"]
    assert greedy[3]["after"].startswith(f"{100 * np.mean(correct(folders[3], 'after', 'held_out/greedy')):.1f}% ")
    ends = [dict(zip(head, row, strict=True)) for row in rows if row[1] == "held-out, temperature 1.0, pass@8"]
    some = np.mean([c > 0 for c in correct(folders[1], "before", "held_out/t1.0")])
    assert ends[1]["before"].startswith(f"{100 * some:.1f}% [")


def test_an_interval_of_a_rate_covers_it_as_it_should():
    """Of problems that are all equal the interval is a point; otherwise it is about two standard errors wide."""
    from diffrl.pass_rates import PassRates
    from diffrl.report.results import interval

    assert interval(PassRates(num_samples=4, num_correct=(2,) * 9, families=("x",) * 9), 0) == (0.5, 0.5, 0.5)
    value, low, high = interval(PassRates(num_samples=1, num_correct=(1, 0) * 50, families=("x",) * 100), 0)
    assert value == 0.5 and low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)


def test_seeds_of_one_configuration_are_one_curve_with_its_spread(page, folders):
    groups = groups_of(open_runs([str(folder) for folder in folders]))
    assert [len(group.runs) for group in groups] == [3, 1]
    assert groups[0].label == "model.family diffusion, method.estimator coupled, 3 seeds" and groups[1].label == "ar"
    values = np.array([[row["reward/mean"] for row in metrics(folder)] for folder in folders])
    first, last = values[:3, 0], values[:3, -1]
    told = (
        f"Reward (reward). {groups[0].label}: {brief(first.mean())} at step 1, {brief(last.mean())} "
        f"({brief(last.min())} to {brief(last.max())}) at step 5; {groups[1].label}: {brief(values[3, 0])} at step 1, "
        f"{brief(values[3, -1])} at step 5"
    )
    assert told in labels(page)
    (reward,) = (svg for svg in page.iter("svg") if svg.attrib.get("aria-label") == told)
    kinds = Counter(path.attrib["class"] for path in reward.iter("path"))
    assert kinds == {"band s0": 1, "line s0": 1, "line s1": 1}
    _, row = table(page, "Seeds of one configuration")
    rates = [100 * np.mean(correct(folder, "after", "held_out/t1.0")) for folder in folders[:3]]
    assert row[2] == "0, 1, 2" and row[3] == f"{np.mean(rates):.1f}% [{min(rates):.1f}, {max(rates):.1f}]"


def test_a_line_goes_through_its_values(tmp_path, folders):
    """The drawn heights are those of the values: linear, the largest at the top."""
    page = parsed(report(tmp_path, folders[0]))
    (reward,) = (s for s in page.iter("svg") if s.attrib.get("aria-label", "").startswith("Reward"))
    drawn = [float(circle.attrib["cy"]) for circle in reward.iter("circle")]
    values = [row["reward/mean"] for row in metrics(folders[0])]
    slope, at = np.polyfit(values, drawn, 1)
    assert slope < 0 and drawn == pytest.approx([slope * value + at for value in values], abs=0.06)


def test_what_differs_is_listed(page, folders):
    head, *rows = table(page, "What differs")
    found = {row[0]: row[1:] for row in rows}
    assert head[1:] == [folder.name for folder in folders]
    assert found == {
        "seed": ["0", "1", "2", "0"],
        "model.family": ["diffusion"] * 3 + ["causal"],
        "method.estimator": ["coupled"] * 3 + ["causal"],
    }
    whole = [words(details) for details in page.iter("details") if "whole configuration" in words(details)]
    assert len(whole) == 4 and "\nmethod.group_size: 4\n" in whole[0]


def test_verdicts_are_counted(page, folders):
    rows = read_all(folders[3] / "rollouts").to_pylist()
    (figure,) = (f for f in page.iter("figure") if words(f[0]) == "ar")
    (passed,) = (words(key) for key in figure.iter("li") if words(key).startswith("passed "))
    shares = []
    for step in (0, 4):
        statuses = [row["statuses"] for row in rows if row["step"] == step]
        share = np.mean([s is not None and set(s) == {"passed"} for s in statuses])
        shares.append(f"{100 * share:.1f}%")
    assert re.findall(r"[\d.]+%", passed) == shares
    heights: dict[str, float] = {}
    for rect in figure[1].iter("rect"):
        heights[rect.attrib["x"]] = heights.get(rect.attrib["x"], 0.0) + float(rect.attrib["height"])
    assert len(heights) == 5 and max(heights.values()) - min(heights.values()) < 0.1  # of every step the whole


def test_rollouts_are_coloured_by_their_order(page, folders):
    rows = [row for row in read_all(folders[0] / "rollouts").to_pylist() if row["step"] == 4 and row["valid"]]
    cards = [card for card in page.iter("article") if "coupled-0" in words(card)]
    assert len(cards) == 4  # best, typical, worst; a typical one of the first step
    rewards = [row["reward"] for row in rows]
    assert f"reward {brief(max(rewards))} · " in words(cards[0]) and f"reward {brief(min(rewards))} · " in words(
        cards[2]
    )
    place = re.search(r"ordinal (\d+), sample (\d+)", words(cards[0]))
    assert place is not None
    (row,) = (r for r in rows if (r["ordinal"], r["sample_index"]) == tuple(map(int, place.groups())))
    (pre,) = (p for p in cards[0].iter("pre") if p.attrib.get("class") == "tokens")
    spans = list(pre.iter("span"))
    assert words(pre).replace("↵\n", "\n").startswith(row["completion"]) and len(spans) == row["num_tokens"]
    steps = row["step_map"][: row["num_tokens"]]
    levels = [int(span.attrib["class"].removeprefix("o")) for span in spans]
    assert min(levels) == 0 and max(levels) == LEVELS - 1
    assert [levels[n] for n in np.argsort(steps, kind="stable")] == sorted(levels)
    assert spans[0].attrib["title"] == f"step {steps[0] + 1}, probability {row['probability'][0]:.3f}"


def test_which_rollouts_are_chosen():
    reward = np.array([1.0, 2.5, 0.0, 1.0, 1.5])
    assert chosen_rows(reward, np.array([3, 5, 5, 9, 2])) == {"best": 1, "typical": 0, "worst": 2}
    assert chosen_rows(np.array([1.0]), np.array([3])) == {"best": 0}


def test_ar_ness_is_that_of_the_analysis(page, folders):
    """Of a store of few rollouts all are looked at."""
    rows = [row for row in read_all(folders[3] / "rollouts").to_pylist() if row["step"] == 4]
    orders = []
    for row in rows:
        size = row["num_tokens"]
        orders.append(reveal_order(np.array(row["step_map"][:size]), np.array(row["probability"][:size], np.float64)))
    for name, measure in (("local AR-ness@1", local_ar_ness), ("global AR-ness@1", global_ar_ness)):
        (told,) = (label for label in labels(page) if label.startswith(name))
        values = [value for order in orders if (value := measure(order, 1)) is not None]
        assert told.endswith(f"{brief(float(np.mean(values)))} at step 5")


def test_supervised_runs_have_losses(tmp_path):
    runs = [make_sft_run(tmp_path / f"sft-{seed}", seed) for seed in range(2)]
    page = parsed(report(tmp_path, *runs))
    head, *rows = table(page, "The runs")
    assert [row[head.index("family")] for row in rows] == ["diffusion"] * 2 and "rollouts" not in head
    assert [row[head.index("loss")] for row in rows] == [brief(metrics(run)[-1]["loss/diffusion"]) for run in runs]
    titles = [words(figure[0]) for figure in page.iter("figure")]
    assert titles[0] == "Loss nats per token" and not list(page.iter("article"))
    assert [words(h) for h in page.iter("h2")] == ["Results", "Curves", "Configuration"]


def test_evaluations_are_listed_as_they_are(own, tmp_path):
    """One with two temperatures, of which one has no pass@2, and one on whose problems the judge failed."""
    rate = {"mean": 0.25, "low": 0.125, "high": 0.5, "num_problems": 8}
    score = {
        "temperature": 0.0,
        "num_samples": 1,
        "num_problems": 8,
        "pass@1": rate,
        "low_trust_share": 0.125,
        "num_masked": 0,
    }
    warm = score | {"temperature": 0.4, "num_samples": 2, "pass@2": rate | {"mean": 0.375}}
    lost = score | {"pass@1": None, "num_masked": 8}
    results = {"benchmark": "humaneval", "settings": {"model": "model, sha256 00ff"}, "run": {}}
    for name, scores in (("a", [score, warm]), ("b", [lost])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results | {"scores": scores}))
    places = [str(tmp_path / name) for name in ("a", "b")]
    page = parsed(write_report([str(own)], str(tmp_path / "x.html"), places).read_text())
    head, *rows = table(page, "Benchmarks")
    assert head == [
        *("evaluation", "benchmark", "model", "temperature", "samples", "pass@1", "pass@2", "trust: low", "masked"),
    ]
    assert [row[3:] for row in rows] == [
        ["0", "1 x 8", "25.0% [12.5, 50.0]", "—", "12.5%", "0"],
        ["0.4", "2 x 8", "25.0% [12.5, 50.0]", "37.5% [12.5, 50.0]", "12.5%", "0"],
        ["0", "1 x 8", "—", "—", "12.5%", "8"],
    ]
    assert [row[:3] for row in rows] == [[place, "humaneval", "model"] for place in (places[0], *places)]
    (tmp_path / "b/results.json").write_text("[1]")
    for place, said in (
        (places[1], "does not hold what diffrl eval writes"),
        (f"{tmp_path}/c", "no results.json can be read"),
    ):
        with pytest.raises(ConfigError, match=f"^--eval: .*{said}"):
            write_report([str(own)], str(tmp_path / "y.html"), [place])


def test_the_page_needs_nothing_else(tmp_path, folders):
    text = report(tmp_path, *folders)
    page = parsed(text)
    assert text == report(tmp_path, *folders)  # equal folders, equal pages
    (style,) = page.iter("style")
    digest = base64.b64encode(hashlib.sha256(words(style).encode()).digest()).decode()
    (policy,) = (m.attrib["content"] for m in page.iter("meta") if "http-equiv" in m.attrib)
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in words(style) and "@import" not in words(style)
    attributes = {name for element in page.iter() for name in element.attrib}
    assert not attributes & {"src", "srcset", "style", "action"} and not any(
        name.startswith("on") for name in attributes
    )
    assert {e.tag for e in page.iter()}.isdisjoint({"script", "link", "img", "iframe", "object", "form", "base"})
    ids = {e.attrib["id"] for e in page.iter() if "id" in e.attrib}
    assert {a.attrib["href"] for a in page.iter("a")} <= {f"#{name}" for name in ids}


HOSTILE = "<script>alert(1)</script></pre><img src=x onerror=alert(2)>&lt;b&gt; \u202eesrever \x1b[31m \"'"


def test_hostile_text_stays_text(own, tmp_path):
    file = step_file(own / "rollouts", 4)
    rows = pq.read_table(file).to_pylist()
    for row in rows:
        row |= {"prompt": HOSTILE, "completion": HOSTILE, "detail": HOSTILE, "problem_id": HOSTILE}
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    shutil.rmtree(own / "model")  # then there is the text alone
    (own / "config.yaml").write_text((own / "config.yaml").read_text() + f"note: {json.dumps(HOSTILE)}\n")
    named = own.rename(own.parent / "<img src=x onerror=alert(3)>")
    text = report(tmp_path, named)
    page = parsed(text)
    tags = {e.tag for e in page.iter()}
    assert tags.isdisjoint({"script", "img"}) and not any(
        name.startswith("on") for e in page.iter() for name in e.attrib
    )
    expected = HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\x1b", "␛")
    pres = [words(pre) for pre in page.iter("pre")]
    assert pres.count(expected) == 6 and any(f"note: {expected}" in pre for pre in pres)  # prompt and text of three
    assert "no tokenizer: text alone" in words(page) and "\x1b" not in text


def test_whatever_is_put_into_an_element_is_escaped():
    assert el("p", "a < b", None, el("br"), 3, title='"', data_x=None) == '<p title="&quot;">a &lt; b<br>3</p>'
    assert isinstance(el("p"), Html) and el("b", el("i", "&")) == "<b><i>&amp;</i></b>"


def test_half_written_files_are_read_as_far_as_they_go(own, tmp_path):
    file = step_file(own / "rollouts", 2)
    file.write_bytes(file.read_bytes()[:700])
    with (own / "metrics.jsonl").open("a") as lines:
        lines.write('no json\n{"step": 5, "reward/me')
    (own / "report_after.json").write_text('{"held_out/t1.0": {"num_samp')
    page = parsed(report(tmp_path, own))
    (notes,) = (s for s in page.iter("section") if s.attrib["id"] == "notes")
    told = [words(item) for item in notes.iter("li")]
    assert any("step_000002.parquet: cannot be read" in note for note in told)
    assert any("report_after.json cannot be read" in note for note in told)
    assert any("metrics.jsonl: 1 lines cannot be read" in note for note in told)
    head, row = table(page, "The runs")
    assert (row[head.index("steps")], row[head.index("rollouts")]) == ("5", "48")
    head, row = table(page, "pass@1 on held-out")
    assert row[head.index("after")] == row[head.index("gain, points")] == "—" and row[head.index("before")] != "—"


def test_runs_of_other_problems_are_not_compared(own, folders, tmp_path):
    text = (own / "config.yaml").read_text().replace("split: held_out", "split: validation")
    (own / "config.yaml").write_text(text)
    write_rates(own, "after", {"held_out/t1.0": [8, 0]})
    page = parsed(report(tmp_path, folders[3], own))
    head, _, row = table(page, "pass@1 on held-out")
    cells = dict(zip(head, row, strict=True))
    assert cells["after"].startswith("50.0% [0.0, 100.0]")
    assert cells["against the first, points"] == cells["gain, points"] == "—"  # nor before with after


def test_runs_of_one_seed_are_not_averaged(own, folders):
    assert [len(group.runs) for group in groups_of(open_runs([str(folders[0]), str(own)]))] == [1, 1]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path, "RUN: {} is not there; give the folder of a run"),
        (lambda path: (path.mkdir(), path)[1], "RUN: {} is not the folder of a run"),
        (
            lambda path: (path.mkdir(), (path / "run.json").write_text("{}"), path)[2],
            "RUN: {} has no step, rollout or report",
        ),
    ],
)
def test_what_is_no_run_is_said_in_a_line(tmp_path, make, said):
    folder = make(tmp_path / "x")
    with pytest.raises(ConfigError) as caught:
        write_report([str(folder)], str(tmp_path / "report.html"))
    assert str(caught.value).startswith(said.format(folder)) and "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_where_no_page_can_be_written(own, tmp_path):
    for out, said in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.html", "there is no folder")):
        with pytest.raises(ConfigError, match=f"^--out: .*{said}"):
            write_report([str(own)], str(out))
    with pytest.raises(ConfigError, match="given twice"):
        write_report([str(own), f"{own}/../{own.name}"], str(tmp_path / "x.html"))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (3, 3, [1, 2, 3, 4, 5]),
        (-0.02, 0.031, [-0.02, 0, 0.02, 0.04]),
        (0, 0, [-0.5, -0.25, 0, 0.25, 0.5]),
    ],
)
def test_ticks_are_round_and_reach_around(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_numbers_are_brief():
    values = (0, 0.000012, 0.01234, 0.5, 12.345, 45600, -3.14159, 2.5e7)
    assert [brief(v) for v in values] == ["0", "1.2e-05", "0.0123", "0.5", "12.3", "45,600", "-3.14", "2.5e+07"]
