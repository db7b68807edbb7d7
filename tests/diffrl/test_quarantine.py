"""Which prompts are left out, from a file that outlives the run."""

import json

import pytest

from diffrl.errors import RunStoppedError
from diffrl.quarantine import Quarantine


def test_a_problem_is_out_from_the_next_prompt_on(tmp_path):
    first = Quarantine(tmp_path, limit=2, num_problems=5)
    first.add("a", 17, "worker gone", since=20)
    first.add("a", 18, "it was under way twice", since=22)
    for quarantine in (first, Quarantine(tmp_path, limit=2, num_problems=5)):
        assert [quarantine.holds("a", ordinal) for ordinal in (17, 19, 20, 90)] == [False, False, True, True]
        assert not quarantine.holds("b", 90)
        assert [quarantine.count(ordinal) for ordinal in (19, 20)] == [0, 1]
        assert quarantine.given_up == {17: "worker gone", 18: "it was under way twice"}
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"problem_id": "a", "ordinal": 17, "since": 20, "reason": "worker gone"}
    first.add("a", 17, "again, in a run that was resumed", since=20)
    assert (tmp_path / "quarantine.jsonl").read_text().splitlines() == lines and len(lines) == 2


def test_a_line_that_a_crash_cut_off_is_not_there(tmp_path):
    Quarantine(tmp_path, limit=2, num_problems=5).add("a", 1, "", since=2)
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"problem_id": "b", "ord')
    quarantine = Quarantine(tmp_path, limit=2, num_problems=5)
    quarantine.add("c", 3, "", since=4)
    assert Quarantine(tmp_path, limit=2, num_problems=5).since == {"a": 2, "c": 4}


@pytest.mark.parametrize(("limit", "num_problems", "said"), [(1, 5, "more than 1"), (4, 2, "all there are")])
def test_too_many_stop_the_run(tmp_path, limit: int, num_problems: int, said: str):
    quarantine = Quarantine(tmp_path, limit=limit, num_problems=num_problems)
    quarantine.add("a", 1, "", since=4)
    with pytest.raises(
        RunStoppedError, match=rf"^supervision.max_quarantined: 2 problems .*{said}; the last was b: gone"
    ):
        quarantine.add("b", 2, "gone", since=4)
