"""AceCode's split by difficulty and its completion prompts, against the release's own numbers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffrl.config import ProblemsConfig
from diffrl.data.acecode import Quantiles, acecode_row, difficulties, signature_copy, split_rows
from diffrl.data.row_files import Rows
from diffrl.data.sources import problems_of
from diffrl.errors import ConfigError
from diffrl.fingerprints import FileHashes, problem_files
from tests.golden_files import golden_file, golden_json

SETTINGS = ("hard", "medium", "easy", "all")
SAMPLE = {
    "completion": "def f(x):\n    return x",
    "completion_id": 0,
    "model_name": "llama3_instruct",
    "pass_rate": 1.0,
}
ROW = {
    "id": "oss_1",
    "source": "oss",
    "question": "Return x.",
    "test_cases": ["assert f(1) == 1", "assert f(2) == 2", "assert f(1) == 1 "],
    "inferences": [SAMPLE],
}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("setting", SETTINGS)
def test_golden_split_and_questions(setting):
    expected = golden_json("process_data/expected.json")[setting]
    rows = list(split_rows(Rows(str(golden_file("process_data/input.jsonl"))), setting))
    kept = [row for _, row in rows if isinstance(row, dict)]
    assert len(kept) == len(rows) > 0
    assert [row["id"] for row in kept] == expected["ids"]
    assert [row["question"] for row in kept] == expected["questions"]
    assert set(expected["columns"]) <= set(kept[0])


@pytest.mark.parametrize("setting", SETTINGS)
def test_golden_rows_are_problems_from_any_kind_of_file(setting, tmp_path):
    """Of a file and of a folder with Parquet; the ids of a problem's two prompts differ."""
    source = golden_file("process_data/input.jsonl")
    expected = golden_json("process_data/expected.json")[setting]["ids"]
    (tmp_path / "data").mkdir()
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows[:25]), tmp_path / "data" / "0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[25:]), tmp_path / "data" / "1.parquet")
    for path in (source, tmp_path / "data"):
        problems = problems_of(ProblemsConfig(source="acecode", path=str(path), difficulty=setting))
        ids = [problem.id for problem in problems]
        assert [i.removeprefix("acecode/").removesuffix("/signature") for i in ids] == expected
        assert len(set(ids)) == len(ids)
        for problem in problems:
            assert problem.reward_tests and not set(problem.prompt_tests) & set(problem.reward_tests)
    assert set(problem_files(ProblemsConfig(source="acecode", path=str(path)), FileHashes(tmp_path / "h"), "data")) == {
        "data (0.parquet)",
        "data (1.parquet)",
    }


def test_a_row_as_a_problem():
    problem = acecode_row({**ROW, "license": "MIT"}, 1)
    assert problem.id == "acecode/oss_1" and problem.prompt == "Return x." and problem.family == "oss"
    assert (problem.prompt_tests, problem.reward_tests) == (("assert f(1) == 1",), ("assert f(2) == 2",))
    assert problem.solution == SAMPLE["completion"] and problem.license == "MIT" and problem.entry_point == "f"
    hidden = acecode_row(ROW, 0)
    assert hidden.prompt == "Return x. Name the function `f`." and len(hidden.reward_tests) == 3
    single = acecode_row({**ROW, "test_cases": ["assert f(1) == 1"]}, 1)
    assert (single.prompt_tests, single.reward_tests) == ((), ("assert f(1) == 1",))
    assert acecode_row({**ROW, "inferences": [{**SAMPLE, "pass_rate": 0.5}]}, 1).solution is None


@pytest.mark.parametrize(
    ("question", "completion", "signature"),
    [
        ("Add.", "def f(a, d={'x': 1}):\n    pass", "def f(a, d={'x': 1}):"),
        ("Add.", "  def f(\n    a,\n):\n    pass", "def f(\n    a,\n):"),
        ("Can you add?", "def f(a):\n    pass", None),
        ("YOUR task.", "def f(a):\n    pass", None),
        ("Add.", "class A:\n    pass", None),
        ("Add.", "import math\ndef f(a):\n    pass", None),
        ("Add.", "def f(a): return 1", None),  # the release would show the whole program
    ],
)
def test_completion_prompts(question, completion, signature):
    row = {**ROW, "question": question, "inferences": [{**SAMPLE, "completion": completion}]}
    copy = signature_copy(row)
    if signature is None:
        assert copy is None
    else:
        assert copy is not None and copy["question"].startswith(
            f"Please complete the following problem:\n```\n{signature}\n"
        )
        assert f'"""\n    {question}\n    """' in copy["question"]
        assert acecode_row(copy, 1).id == "acecode/oss_1/signature"


def test_rows_without_samples_of_the_models_have_no_difficulty(tmp_path):
    """There the release's mean is not a number and its split empty."""
    rates = [[0.1 * i, 0.1 * i + 0.05] for i in range(9)]
    assert np.isnan(np.percentile([*map(np.mean, rates), np.nan], 20))
    assert difficulties([*rates, []])[-1] == set() and difficulties([*rates, []])[:-1] == difficulties(rates)
    assert difficulties(rates, Quantiles(hard=100, hard_std=0))[4] >= {"hard"} and difficulties([[]]) == [set()]
    other = {**ROW, "id": "other", "inferences": [{**SAMPLE, "model_name": "other"}]}
    path = write(tmp_path / "a.jsonl", ROW, other)
    kept = [row for _, row in split_rows(Rows(path), "easy")]
    assert [row["id"] for row in kept if isinstance(row, dict)] == ["oss_1", "oss_1"]


def test_bad_rows_are_named_and_a_budget_leaves_them_out(tmp_path, capsys):
    wrong = {**ROW, "id": "w", "inferences": [{"completion": "x"}]}
    path = write(tmp_path / "a.jsonl", wrong, ROW, {**ROW, "id": "e", "test_cases": []})
    for difficulty in SETTINGS:
        with pytest.raises(ConfigError, match=r"a\.jsonl line 1 \(format acecode\): field 'inferences' must be a list"):
            problems_of(ProblemsConfig(source="acecode", path=path, difficulty=difficulty))
    problems = problems_of(ProblemsConfig(source="acecode", path=path, difficulty="all", max_bad_rows=3))
    assert [problem.id for problem in problems] == ["acecode/oss_1", "acecode/oss_1/signature"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "line 1 left out: field 'inferences'" in said[0] and "line 3 left out: problem" in said[2]
    with pytest.raises(ConfigError, match="more than max_bad_rows 2"):
        problems_of(ProblemsConfig(source="acecode", path=path, difficulty="all", max_bad_rows=2))


def test_a_name_on_the_hub_that_cannot_be_loaded_is_one_line():
    with pytest.raises(ConfigError) as caught:
        problems_of(ProblemsConfig(source="acecode", path="no-such-owner/no-such-data"))
    text = str(caught.value)
    assert "data.path: the data set 'no-such-owner/no-such-data' cannot be loaded" in text and "\n" not in text
