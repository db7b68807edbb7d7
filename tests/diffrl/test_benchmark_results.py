import pyarrow.parquet as pq
import pytest

from diffrl.benchmarks.results import SAMPLE_SCHEMA, JudgedSample, sample_table, score_table, scores_of, texts_digest


def sample(problem: str, index: int, statuses: tuple[str, ...] | None, **changes) -> JudgedSample:
    fields = {"temperature": 0.8, "seed": (1 << 63) - 1, "text": "x", "num_tokens": 2, "code": "x", "low_trust": False}
    fields |= {"cpu_s": 0.0, "detail": ""} | changes
    return JudgedSample(problem_id=problem, sample_index=index, statuses=statuses, **fields)


GOOD, HALF, BAD = ("passed", "passed"), ("passed", "failed"), ("failed", "timeout")
SAMPLES = [
    *(sample("a", 0, GOOD), sample("a", 1, HALF), sample("a", 2, BAD, low_trust=True)),
    *(sample("b", 0, BAD), sample("b", 1, BAD, code=""), sample("b", 2, None)),
]


def test_scores_by_hand():
    [score] = scores_of(SAMPLES, (1, 2, 3, 9), seed=0, num_base_tests=1)
    assert score["pass@1"]["mean"] == pytest.approx((1 / 3 + 0) / 2)
    assert score["base_pass@1"]["mean"] == pytest.approx((2 / 3 + 0) / 2)
    assert score["pass@2"]["mean"] == pytest.approx((2 / 3 + 0) / 2)  # 1 - C(2, 2) / C(3, 2)
    assert score["base_pass@2"]["mean"] == pytest.approx((1 + 0) / 2)
    assert score["pass@3"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "num_problems": 1}  # b has two that were judged
    assert "pass@9" not in score and (score["pass@1"]["low"], score["pass@1"]["high"]) == (0.0, pytest.approx(1 / 3))
    assert (score["num_masked"], score["low_trust_share"], score["blank_share"]) == (1, 1 / 5, 1 / 6)


def test_a_failure_of_the_judge_counts_neither_way():
    [score] = scores_of([sample("a", 0, None), sample("b", 0, None)], (1,), seed=0)
    assert score["pass@1"] is None and score["num_masked"] == 2
    assert "| 0.8 | 1 |  | 0.0% | 2 |" in score_table([score])


def test_temperatures_are_lines_of_the_table():
    greedy = [sample("a", 0, GOOD, temperature=0.0), sample("b", 0, BAD, temperature=0.0)]
    lines = score_table(scores_of([*SAMPLES, *greedy], (1, 3), seed=0)).splitlines()
    assert lines[0] == "| temperature | samples | pass@1 | pass@3 | trust: low | masked |"
    assert lines[2] == "| 0 | 1 | 50.0 [0.0..100.0] |  | 0.0% | 0 |"
    assert lines[3] == "| 0.8 | 3 | 16.7 [0.0..33.3] | 100.0 [100.0..100.0] | 20.0% | 1 |"


def test_the_digest_is_that_of_the_texts():
    assert texts_digest(SAMPLES) == texts_digest(SAMPLES[::-1])
    assert texts_digest(SAMPLES) != texts_digest([*SAMPLES[:-1], sample("b", 2, None, text="y")])


def test_every_sample_is_kept(tmp_path):
    pq.write_table(sample_table(SAMPLES), tmp_path / "samples.parquet")
    table = pq.read_table(tmp_path / "samples.parquet")
    assert table.schema.equals(SAMPLE_SCHEMA)
    assert [row["statuses"] for row in table.to_pylist()] == [s.statuses and list(s.statuses) for s in SAMPLES]


def test_text_that_is_not_unicode_is_kept_as_signs():
    """A program can put it into an error message."""
    [row] = sample_table([sample("a", 0, BAD, detail="no \ud800")]).to_pylist()
    assert row["detail"] == "no \\ud800"
