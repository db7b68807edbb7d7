"""The board's data, API and web server, on small runs that the project's own writers made."""

import http.client
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.cli import board as board_command
from diffrl import rollout_store
from diffrl.board import index, orders, suspicion
from diffrl.board.api import Board
from diffrl.board.query import in_order
from diffrl.board.reading import token_texts
from diffrl.board.run import open_run
from diffrl.board.server import BoardOptions, BoardServer, open_board, token_for
from diffrl.errors import ConfigError
from diffrl.rollout_store import read_all, read_step, step_file
from tests.diffrl.board_run import Shape, add_step, make_run, tokenizer

SHAPE = Shape()
TOKEN = "a-token-of-ours-1234"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a", SHAPE)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "b", Shape(seed=1), steps=(0, 1))


@pytest.fixture
def own_folder(run_folder, tmp_path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def board_of(*folders: Path) -> Board:
    board = Board([open_run(str(folder)) for folder in folders])
    for run in board.runs:
        run.refresh()
        while run.scan():
            pass
    return board


def ask(board: Board, name: str, **query: object) -> Any:
    return board.answer(name, {key: str(value) for key, value in query.items()})


def table(folder: Path) -> list[dict[str, Any]]:
    return read_all(folder / "rollouts").to_pylist()


def reference(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(f"{row['step']}/{row['ordinal']}/{row['sample_index']}" for row in rows)


def keys(answer: dict[str, Any]) -> list[str]:
    return sorted(row["key"] for row in answer["rows"])


def test_the_names_of_columns_are_the_stores():
    assert set(index.COLUMNS) <= set(rollout_store.SCHEMA.names)
    assert str(rollout_store.SCHEMA_VERSION) == index.SCHEMA_VERSION
    assert index.VERSION_KEY in (rollout_store.SCHEMA.metadata or {})
    assert index.FILE_NAME.fullmatch(step_file("x", 7).name)


def test_the_board_needs_no_torch():
    code = "import sys, diffrl.board.server; print(*{'torch', 'transformers', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


# What is shown


def test_rows_say_what_the_files_hold(run_folder):
    board = board_of(run_folder)
    answer = ask(board, "rollouts", size=200)
    rows = {f"{row['step']}/{row['ordinal']}/{row['sample_index']}": row for row in table(run_folder)}
    assert answer["total"] == len(rows) == SHAPE.steps * SHAPE.groups * SHAPE.group_size
    for shown in answer["rows"]:
        row = rows[shown["key"]]
        assert (shown["problem"], shown["length"]) == (row["problem_id"], row["num_tokens"])
        assert shown["reward"] == (pytest.approx(row["reward"]) if row["valid"] else None)
        assert shown["staleness"] == row["step"] - row["policy_version"]
        assert shown["trust"] == ("low" if row["low_trust"] else "high")
        statuses = row["statuses"]
        if statuses is None:
            assert shown["verdict"] == "not judged"
        elif "passed" in statuses:
            assert shown["verdict"] == ("passed" if set(statuses) == {"passed"} else "some passed")
        else:
            assert shown["verdict"] == statuses[0]


@pytest.mark.parametrize(
    ("query", "keeps"),
    [
        ({"step_min": 1, "step_max": 2}, lambda row: 1 <= row["step"] <= 2),
        ({"reward_min": 0.6, "reward_max": 2}, lambda row: row["valid"] and 0.6 <= row["reward"] <= 2),
        ({"verdict": "passed"}, lambda row: set(row["statuses"] or "x") == {"passed"}),
        ({"verdict": "failed,error"}, lambda row: row["statuses"] and "passed" not in row["statuses"]),
        ({"trust": "low"}, lambda row: row["low_trust"]),
        ({"staleness_min": 1}, lambda row: row["step"] > row["policy_version"]),
        ({"length_max": 25, "trust": "high"}, lambda row: row["num_tokens"] <= 25 and not row["low_trust"]),
        ({"problem": "MICRO"}, lambda row: True),
        ({"problem": "no such"}, lambda row: False),
    ],
)  # fmt: skip
def test_filters_keep_what_they_say(run_folder, query, keeps):
    expected = [row for row in table(run_folder) if keeps(row)]
    answer = ask(board_of(run_folder), "rollouts", size=200, **query)
    assert keys(answer) == reference(expected) and answer["total"] == len(expected)


@pytest.mark.parametrize("sort", ["step", "problem", "reward", "staleness", "length", "advantage"])
@pytest.mark.parametrize("direction", ["asc", "desc"])
def test_order_and_pages(run_folder, sort, direction):
    board = board_of(run_folder)
    rows = []
    for page in (1, 2, 3, 4):
        answer = ask(board, "rollouts", sort=sort, dir=direction, size=15, page=page)
        assert (answer["page"], answer["num_pages"]) == (page, 4)
        rows += answer["rows"]
    assert keys({"rows": rows}) == reference(table(run_folder))
    values = [row[sort] for row in rows if row[sort] is not None]
    assert values == sorted(values, reverse=direction == "desc")
    assert [row[sort] for row in rows][: len(values)] == values  # what has no value stands last
    assert ask(board, "rollouts", size=15, page=99)["page"] == 4


@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_the_order_is_that_of_a_stable_sort(kind, falling):
    values = np.random.default_rng(0).integers(-5, 5, 999).astype(kind)
    if kind is np.float32:
        values[::7], values[::11], values[::13] = np.nan, -0.0, np.inf
    rows = np.arange(999) * 3
    expected = rows[np.argsort(-values if falling else values, kind="stable")]
    assert in_order(values, rows, falling=falling).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "query", "said"),
    [
        ("rollouts", {"step_min": "x"}, "step_min: 'x' must be a number"),
        ("rollouts", {"verdict": "pased"}, "verdict: 'pased' is unknown, did you mean 'passed'"),
        ("rollouts", {"sort": "seed"}, "sort: 'seed' is unknown"),
        ("rollouts", {"size": "100000"}, "size: 100000 must be from 1 to 200"),
        ("rollouts", {"page": "1.5"}, "page: '1.5' must be a whole number"),
        ("rollouts", {"run": "1"}, "run: 1 must be one of 0"),
        ("rollout", {"step": "0", "ordinal": "0", "sample": "99"}, "no sample 99"),
        ("rollout", {"step": "77", "ordinal": "0", "sample": "0"}, "no sample 0"),
        ("problem", {"id": "mbpp/1"}, "'mbpp/1' has no rollouts"),
        ("pairs", {}, "start it with two"),
        ("nothing", {}, "there is no 'nothing'"),
    ],
)
def test_questions_that_make_no_sense(run_folder, name, query, said):
    with pytest.raises((ValueError, LookupError)) as caught:
        board_of(run_folder).answer(name, query)
    assert said in caught.value.args[0]


def test_one_rollout_in_full(run_folder):
    board = board_of(run_folder)
    (expected,) = (r for r in table(run_folder) if (r["step"], r["ordinal"], r["sample_index"]) == (2, 7, 1))
    answer = ask(board, "rollout", step=2, ordinal=7, sample=1)
    row = answer["row"]
    for name in (
        "prompt",
        "completion",
        "statuses",
        "family",
        "detail",
        "details",
        "tests",
        "policy_version",
        "format",
        "pass_rate",
    ):
        assert row[name] == expected[name], name
    assert row["seed"] == str(expected["seed"])
    size = expected["num_tokens"]
    assert row["tokens"]["ids"] == expected["completion_ids"][:size]
    assert row["tokens"]["steps"] == expected["step_map"][:size]
    assert row["tokens"]["probability"] == pytest.approx(expected["probability"][:size], abs=1e-4)
    assert "".join(row["tokens"]["texts"][:-1]) == expected["completion"]
    assert answer["weights"] == {"pass_rate": 2.0, "format": 0.5}
    assert [s["sample"] for s in answer["siblings"]] == [0, 1, 2, 3]
    assert all(s["key"].startswith("2/7/") for s in answer["siblings"])
    assert answer["siblings"][1]["completion"] == expected["completion"]


def test_without_a_tokenizer_there_are_ids_and_no_texts(own_folder, tmp_path):
    shutil.rmtree(own_folder / "model")
    row = ask(board_of(own_folder), "rollout", step=0, ordinal=0, sample=0)["row"]
    assert row["tokens"]["texts"] is None and row["tokens"]["ids"] and row["completion"]
    tokenizer().save_pretrained(tmp_path / "elsewhere")
    (own_folder / "config.yaml").write_text(f"model: {{path: {tmp_path / 'elsewhere'}}}\n")
    assert ask(board_of(own_folder), "rollout", step=0, ordinal=0, sample=0)["row"]["tokens"]["texts"]


def test_a_character_of_several_tokens_stands_at_the_last_of_them():
    text = "né 🙂"
    made = tokenizer().backend_tokenizer
    texts = token_texts(made, made.encode(text, add_special_tokens=False).ids)
    assert "".join(texts) == text and texts[-1] == "🙂" and "" in texts
    assert token_texts(made, made.encode("🙂", add_special_tokens=False).ids[:2])[-1] == "\ufffd"


def test_problems_and_their_history(run_folder):
    board = board_of(run_folder)
    rows = table(run_folder)
    answer = ask(board, "problems")
    names = {row["problem_id"] for row in rows}
    assert {row["problem"] for row in answer["rows"]} == names and answer["total"] == len(names)
    name = rows[0]["problem_id"]
    own = [row for row in rows if row["problem_id"] == name]
    (listed,) = (row for row in answer["rows"] if row["problem"] == name)
    judged = [row["reward"] for row in own if row["valid"]]
    assert (listed["count"], listed["reward"]) == (len(own), pytest.approx(np.mean(judged), abs=1e-5))
    history = ask(board, "problem", id=name)
    assert keys(history) == reference(own)
    assert history["curve"]["x"] == sorted({row["step"] for row in own})
    first = [row["reward"] for row in own if row["valid"] and row["step"] == history["curve"]["x"][0]]
    assert history["curve"]["y"][0] == pytest.approx(np.mean(first), abs=1e-5)
    assert history["rows"][0]["step"] == max(row["step"] for row in own)


def test_curves_are_the_lines_of_the_metrics(run_folder):
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    answer = ask(board_of(run_folder), "metrics", names="reward/mean,no/such")
    assert answer["names"] == sorted(set(lines[0]) - {"step"})
    assert answer["runs"][0]["reward/mean"] == {"x": [0, 1, 2, 3], "y": [line["reward/mean"] for line in lines]}
    assert answer["runs"][0]["no/such"] == {"x": [], "y": []}


def test_two_runs_meet_at_problems_and_steps(run_folder, other_folder):
    board = board_of(run_folder, other_folder)
    first, second = table(run_folder), table(other_folder)
    answer = ask(board, "pairs")
    common = {(r["step"], r["problem_id"]) for r in first} & {(r["step"], r["problem_id"]) for r in second}
    assert {(row["step"], row["problem"]) for row in answer["rows"]} == common and common
    gaps = [abs(row["first"] - row["second"]) for row in answer["rows"]]
    assert gaps == sorted(gaps, reverse=True)
    step, name = answer["rows"][0]["step"], answer["rows"][0]["problem"]
    pair = ask(board, "pair", step=step, problem=name)
    for side, rows in zip(pair["sides"], (first, second), strict=True):
        own = [r for r in rows if (r["step"], r["problem_id"]) == (step, name)]
        assert [r["completion"] for r in side["rows"]] == [r["completion"] for r in own]
    assert ask(board, "rollouts", run=1)["total"] == len(second)


def test_orders_are_those_of_the_analysis(run_folder):
    answer = ask(board_of(run_folder), "orders")
    assert answer["steps"] == [0, 1, 2, 3] and answer["unscanned"] == 0
    assert np.shape(answer["when"]) == (4, orders.NUM_BINS)
    rows = read_step(step_file(run_folder / "rollouts", 1)).to_pylist()
    maps = [np.array(row["step_map"][: row["num_tokens"]]) for row in rows]
    chances = [np.array(row["probability"][: row["num_tokens"]]) for row in rows]
    for name, measure, k in orders.AR_NESS:
        values = [measure(orders.reveal_order(m, p), k) for m, p in zip(maps, chances, strict=True)]
        assert answer["ar_ness"][name][1] == pytest.approx(np.mean([v for v in values if v is not None]))


def test_a_completion_from_left_to_right_is_a_rising_map():
    long = orders.step_order(0, [np.arange(100)], [np.ones(100)])
    short = orders.step_order(0, [np.arange(10)], [np.ones(10)])
    for order in (long, short):
        assert order.ar_ness == (1.0, 1.0, 1.0)
        assert list(order.when) == sorted(order.when, key=lambda v: v or 0.0) and None not in order.when
    assert orders.step_order(0, [np.zeros(0, int)], [np.zeros(0)]).when[0] is None


# Suspicion


HARD = "if x == 3: return 9", "if x == 17: return 53", "if x == 4: return 12"
WIDE = "if x == 5:\n        return 9", "elif x == 6:\n        return 53", "elif x == 4:\n        return 12"


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (HARD, ["hard_coded", "special_cased"]),
        (WIDE, ["hard_coded"]),
        (["return {1: 2, 2: 4, 3: 6}[x]"], ["hard_coded"]),
        (["return {'a': 1, 'b': 2, 'c': 3}.get(x, 0)"], ["hard_coded"]),
        (["import sys", "sys.exit(0)"], ["reaching"]),
        (["class A(int):\n        __eq__ = lambda a, b: True", "return A(x)"], ["reaching"]),
        (["if x < 17: return x + 53", "return 2"], ["special_cased"]),
        (["return 3 * x + 2"], []),
        (["return 117 * 533"], []),
        (["if x < 3: return 1", "return x"], []),
    ],
)
def test_heuristics(lines, names):
    code = "\n    ".join(["def f(x):", *lines])
    prompt = "Write f(x).\nYour code should pass this test:\nassert f(17) == 53"
    trust, paid = np.array([False, True, True]), np.array([1.0, 0.5, 0.0])
    flags = suspicion.flags_of(pa.array([prompt] * 3), pa.array([f"```python\n{code}\n```"] * 3), trust, paid)
    assert [suspicion.names_of(f) for f in flags.tolist()] == [names, ["low_trust", *names], []]


def test_flags_filter_the_table(run_folder):
    board = board_of(run_folder)
    answer = ask(board, "rollouts", flag="any", size=200)
    assert answer["total"] and all(row["flags"] and row["pass_rate"] > 0 for row in answer["rows"])
    low = ask(board, "rollouts", flag="low_trust", size=200)
    assert keys(low) == reference([r for r in table(run_folder) if r["low_trust"] and r["pass_rate"] > 0])


# Runs that are going on, and folders that are not as they should be


def test_a_live_run_is_followed(tmp_path):
    folder = make_run(tmp_path / "run", SHAPE, steps=())
    (folder / "rollouts").mkdir()
    board = board_of(folder)
    run = board.runs[0]
    (note,) = run.notes
    assert "has no rollouts yet" in note and ask(board, "rollouts")["total"] == 0
    assert not run.refresh()
    per_step = SHAPE.groups * SHAPE.group_size
    for step in (0, 1):
        add_step(folder, SHAPE, step)
        before = ask(board, "state")["runs"][0]["version"]
        assert run.refresh()
        state = ask(board, "state")["runs"][0]
        assert (state["rollouts"], state["last_step"]) == ((step + 1) * per_step, step)
        assert state["version"] != before and state["notes"] == []
        assert ask(board, "metrics", names="reward/mean")["runs"][0]["reward/mean"]["x"] == list(range(step + 1))
    add_step(folder, Shape(seed=5), 1)  # the step once more, after a resume
    run.refresh()
    assert ask(board, "rollouts")["total"] == 2 * per_step
    while run.scan():
        pass
    expected = [r["completion"] for r in table(folder) if r["step"] == 1 and r["ordinal"] == 3]
    found = ask(board, "rollout", step=1, ordinal=3, sample=0)["siblings"]
    assert [row["completion"] for row in found] == expected


def test_metrics_that_were_cut_and_written_again(own_folder):
    board = board_of(own_folder)
    file = own_folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(
        "".join(lines[:2]) + 'not json\n{"step": 2, "reward/mean": NaN, "reward/format_mean": 0.5}\n{"step": 3, "rew'
    )
    assert board.runs[0].refresh()
    curves = ask(board, "metrics", names="reward/mean,reward/format_mean")["runs"][0]
    assert curves["reward/mean"]["x"] == [0, 1] and curves["reward/format_mean"]["x"] == [0, 1, 2]
    assert "metrics.jsonl: 1 lines cannot be read: left out" in board.runs[0].notes


def test_a_half_written_file_costs_only_itself(own_folder):
    file = step_file(own_folder / "rollouts", 1)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    board = board_of(own_folder)
    (note,) = board.runs[0].notes
    assert note.startswith("step_000001.parquet: cannot be read as Parquet") and "read as soon as it changes" in note
    assert {row["step"] for row in ask(board, "rollouts", size=200)["rows"]} == {0, 2, 3}
    file.write_bytes(whole)
    assert board.runs[0].refresh() and board.runs[0].notes == []
    assert ask(board, "rollouts", step_min=1, step_max=1)["total"] == SHAPE.groups * SHAPE.group_size


def test_damaged_texts_are_said_and_rows_stay(own_folder):
    file = step_file(own_folder / "rollouts", 2)
    column = pq.read_metadata(file).row_group(0).column(rollout_store.SCHEMA.names.index("completion"))
    data = bytearray(file.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(data)
    board = board_of(own_folder)
    assert ask(board, "rollouts")["total"] == SHAPE.steps * SHAPE.groups * SHAPE.group_size
    assert any("step_000002.parquet: texts cannot be read" in note for note in board.runs[0].notes)
    with pytest.raises(ValueError, match=r"step_000002\.parquet: cannot be read"):
        ask(board, "rollout", step=2, ordinal=6, sample=0)
    assert ask(board, "rollout", step=1, ordinal=3, sample=0)["row"]["completion"]


@pytest.mark.parametrize(
    "kept", [("completion", "reward"), ("step_map", "completion_ids"), ("problem_id", "statuses", "step")]
)
def test_an_older_schema_is_shown_as_far_as_it_goes(own_folder, kept):
    file = step_file(own_folder / "rollouts", 3)
    old = pq.read_table(file).select(list(kept)).replace_schema_metadata({"diffrl.rollout_store.version": "1"})
    pq.write_table(old, file)
    board = board_of(own_folder)
    notes = board.runs[0].notes
    assert "step_000003.parquet: rollout schema version 1, this board knows 4" in notes
    assert any("has no column" in note and "num_tokens" in note for note in notes)
    answer = ask(board, "rollouts", step_min=3)
    assert answer["total"] == old.num_rows
    row = answer["rows"][0]
    assert (row["reward"] is not None) == ("reward" in kept)
    assert row["verdict"] == "unknown" or "statuses" in kept
    assert (row["staleness"], row["length"]) == (None, None)
    step, ordinal, sample = row["key"].split("/")
    full = ask(board, "rollout", step=step, ordinal=ordinal, sample=sample)["row"]
    assert (full["completion"] is not None) == ("completion" in kept)
    assert (full["tokens"] is not None) == ("step_map" in kept)


def test_a_column_of_another_type_is_said(own_folder):
    file = step_file(own_folder / "rollouts", 0)
    read = pq.read_table(file)
    pq.write_table(read.set_column(read.schema.names.index("reward"), "reward", pa.array(["much"] * len(read))), file)
    board = board_of(own_folder)
    assert any(note.startswith("step_000000.parquet: cannot be read") for note in board.runs[0].notes)
    assert ask(board, "rollouts")["total"] == (SHAPE.steps - 1) * SHAPE.groups * SHAPE.group_size


def test_hostile_text_travels_as_it_is(own_folder):
    file = step_file(own_folder / "rollouts", 0)
    read = pq.read_table(file)
    evil = "</script><script>alert(1)</script>\x00\x1b[31m\u202e" + "A" * 1_000_000
    texts = [evil, *read["completion"].to_pylist()[1:]]
    column = read.schema.names.index("completion")
    pq.write_table(read.set_column(column, read.schema.field(column), pa.array(texts)), file)
    board = board_of(own_folder)
    row = ask(board, "rollout", step=0, ordinal=0, sample=0)["row"]
    assert row["completion"] == evil[:100_000] and row["num_characters"] == len(evil)
    assert ask(board, "rollout", step=0, ordinal=0, sample=0, whole=1)["row"]["completion"] == evil


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "is not there"),
        (lambda path: path.mkdir(), "not the folder of a run"),
        (lambda path: path.write_text("x"), "is not there"),
        (
            lambda path: ((path / "rl").mkdir(parents=True), (path / "rl" / "run.json").write_text("{}")),
            "those in it: rl",
        ),
    ],
)
def test_a_folder_that_is_no_run(tmp_path, make, said):
    make(tmp_path / "runs")
    with pytest.raises(ConfigError, match=said):
        open_run(str(tmp_path / "runs"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is let out, too
def test_a_thread_that_stops_is_said(run_folder, monkeypatch):
    board = board_of(run_folder)
    monkeypatch.setattr(board.runs[0], "refresh", lambda: 1 // 0)
    board.start()
    assert board.ended.wait(0.5) is False
    assert "has stopped following the run (ZeroDivisionError" in ask(board, "state")["runs"][0]["notes"][0]


def test_a_run_that_goes_away_is_said(own_folder):
    board = board_of(own_folder)
    shutil.rmtree(own_folder)
    board.runs[0].refresh()
    assert any("is gone" in note for note in board.runs[0].notes)
    assert ask(board, "rollouts")["total"] == 0


# The web server


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@contextmanager
def serving(*folders: Path, options: BoardOptions) -> Iterator[BoardServer]:
    with open_board([str(folder) for folder in folders], options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.board.close()
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(run_folder) -> Iterator[BoardServer]:
    with serving(run_folder, options=BoardOptions(port=0)) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(run_folder) -> Iterator[BoardServer]:
    with serving(run_folder, options=BoardOptions(host="0.0.0.0", port=0, token=TOKEN, names=("box.local",))) as server:
        yield server


def fetch(server: BoardServer, path: str, method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.getheaders()), answer.read())
    finally:
        connection.close()


def test_pages_and_answers_have_their_headers(server):
    kinds = {"/": "text/html", "/static/app.js": "text/javascript", "/static/board.css": "text/css"}
    for path, kind in {**kinds, "/api/state": "application/json"}.items():
        answer = fetch(server, path)
        assert answer.status == 200 and answer.headers["Content-Type"].startswith(kind)
        policy = answer.headers["Content-Security-Policy"]
        for part in (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "img-src 'self' data:",
        ):
            assert part in policy.split("; ")
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        head = fetch(server, path, "HEAD")
        assert head.status == 200 and head.body == b"" and int(head.headers["Content-Length"]) > 0
    assert json.loads(fetch(server, "/api/state").body)["runs"][0]["name"]


def test_pages_hold_no_script_or_style_of_their_own_and_write_no_markup():
    static = files("diffrl.board").joinpath("static")
    page = static.joinpath("index.html").read_text()
    assert page.count("<script") == 1 and "<style" not in page and " style=" not in page and " on" + "click" not in page
    for file in static.iterdir():
        text = file.read_text()
        for forbidden in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "://",
        ):
            assert forbidden not in text.replace("http://www.w3.org/2000/svg", ""), (file.name, forbidden)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(server, method):
    answer = fetch(server, "/api/state", method, **{"Content-Length": "0"})
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/../../etc/passwd",
            "/static/../server.py",
            "/static/..%2fserver.py",
            "/static/%2e%2e/server.py",
            "//etc/passwd",
        ),
        *(
            "/static/",
            "/static",
            "/server.py",
            "/api",
            "/static/app.js/",
            "/static/app.js%00",
            "/rollouts/step_000000.parquet",
        ),
    ],
)
def test_only_the_listed_files_are_served(server, path):
    answer = fetch(server, path)
    assert answer.status == 404 and b"root:" not in answer.body and "Content-Security-Policy" in answer.headers


def test_errors_are_json_of_one_line(server):
    answer = fetch(server, "/api/rollouts?step_min=many")
    assert (answer.status, json.loads(answer.body)) == (400, {"error": "step_min: 'many' must be a number"})
    assert fetch(server, "/api/rollout?step=9&ordinal=9&sample=9").status == 404
    assert fetch(server, "/api/..").status == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1"]
)
def test_other_names_are_not_answered(server, host):
    answer = fetch(server, "/api/state", Host=host)
    assert answer.status == (200 if host == "[::1" else 421)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:80", "10.0.0.7"])
def test_addresses_and_localhost_are(server, host):
    assert fetch(server, "/api/state", Host=host).status == 200


def test_an_unreadable_request_gets_the_same_headers(server):
    answer = fetch(server, "/" + "x" * 70_000)
    assert answer.status == 414 and "Content-Security-Policy" in answer.headers and b"xxx" not in answer.body


def test_beyond_loopback_a_token_is_needed(guarded):
    for path in ("/", "/static/app.js", "/api/state", "/api/state?token=wrong", "/api/state?token="):
        assert fetch(guarded, path).status == 401, path
    assert fetch(guarded, "/api/state", Authorization="Bearer wrong").status == 401
    assert fetch(guarded, "/api/state", Authorization=f"Bearer {TOKEN}").status == 200
    assert fetch(guarded, "/api/state", Authorization=f"Basic {TOKEN}").status == 401
    assert fetch(guarded, "/api/state", Authorization=f"Bearer {TOKEN}", Host="evil.example").status == 421
    assert fetch(guarded, "/api/state", Authorization=f"Bearer {TOKEN}", Host="box.local:7").status == 200


def test_a_token_in_the_address_becomes_a_cookie(guarded):
    answer = fetch(guarded, f"/?token={TOKEN}&a=b%26c")
    assert (answer.status, answer.headers["Location"]) == (303, "/?a=b%26c")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
    pair = cookie.partition(";")[0]
    assert fetch(guarded, "/", Cookie=pair).status == 200
    assert fetch(guarded, "/api/state", Cookie=f"other=1; {pair}").status == 200
    assert fetch(guarded, "/", Cookie=f"{pair}0").status == 401
    assert fetch(guarded, "/", Cookie="\x01;=;").status == 401
    assert fetch(guarded, f"//evil.example/?token={TOKEN}").headers["Location"] == "/"


def test_who_needs_a_token():
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        assert token_for(BoardOptions(host=host)) is None
    for host in ("0.0.0.0", "::", "", "10.1.2.3", "box.local"):
        made = token_for(BoardOptions(host=host))
        assert made is not None and len(made) >= 32 and made != token_for(BoardOptions(host=host))
    assert token_for(BoardOptions(token=TOKEN)) == TOKEN
    with pytest.raises(ConfigError, match="at least 16"):
        token_for(BoardOptions(token="short"))


def test_what_cannot_be_listened_on_is_said(run_folder, server):
    with pytest.raises(ConfigError, match="--port: 70000 must be from 0"):
        open_board([str(run_folder)], BoardOptions(port=70_000))
    with pytest.raises(ConfigError, match="cannot listen on"):
        open_board([str(run_folder)], BoardOptions(port=server.server_port))
    with pytest.raises(ConfigError, match=r"--tokenizer: .* has no tokenizer\.json"):
        open_board([str(run_folder)], BoardOptions(port=0, tokenizer=str(run_folder)))


def test_the_command_prints_an_address_that_answers(run_folder):
    command = [sys.executable, "-m", "actors.cli", "board", str(run_folder), "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            port, token = line.removeprefix("http://0.0.0.0:").strip().split("/?token=")
            address = SimpleNamespace(server_port=int(port))
            assert fetch(address, "/api/state").status == 401  # type: ignore[arg-type]
            assert fetch(address, f"/?token={token}").status == 303  # type: ignore[arg-type]
        finally:
            process.terminate()


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match=r"RUN: .* is not there"):
        board_command(str(tmp_path / "no"))
