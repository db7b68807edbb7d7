"""Scores of an evaluation from its samples, and their tables."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from diffrl.analysis import paired_bootstrap, pass_at_k
from diffrl.files import utf8

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("temperature", pa.float64(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),  # all that the model wrote, up to the first end token
        pa.field("num_tokens", pa.int32(), nullable=False),  # up to and including the first end token
        pa.field("code", pa.string(), nullable=False),  # what was judged; "": nothing to judge
        pa.field("statuses", pa.list_(pa.field("element", pa.string()))),  # one a test; null: the judge failed
        pa.field("low_trust", pa.bool_(), nullable=False),  # a test ran where the program could forge its status
        pa.field("cpu_s", pa.float64(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedSample:
    """JudgedSample(temperature=0.2, problem_id="HumanEval/0", sample_index=3, seed=8812..., text="    return x", num_tokens=4,
    code="def f(x):\\n    return x", statuses=("passed", "failed"), low_trust=False, cpu_s=0.01, detail="")"""

    temperature: float
    problem_id: str
    sample_index: int
    seed: int
    text: str
    num_tokens: int
    code: str
    statuses: tuple[str, ...] | None
    low_trust: bool
    cpu_s: float
    detail: str

    def passed(self, num_tests: int | None = None) -> bool:
        """All tests, or the first so many of them."""
        assert self.statuses is not None
        return all(status == "passed" for status in self.statuses[:num_tests])


def sample_table(samples: Sequence[JudgedSample]) -> pa.Table:
    rows = [{k: utf8(v) if isinstance(v, str) else v for k, v in asdict(sample).items()} for sample in samples]
    return pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)


def scores_of(
    samples: Sequence[JudgedSample], ks: Sequence[int], *, seed: int, num_base_tests: int | None = None
) -> list[dict[str, Any]]:
    """One entry for each temperature. pass@k is the mean over problems of the unbiased estimate, with the 95% bootstrap interval
    over problems. A sample on which the judge failed is left out of its problem, and a problem with fewer than k samples left
    out of pass@k: neither counts as right or wrong."""
    by_temperature: dict[float, list[JudgedSample]] = defaultdict(list)
    for sample in samples:
        by_temperature[sample.temperature].append(sample)
    return [
        _score(group, ks, temperature, seed, num_base_tests) for temperature, group in sorted(by_temperature.items())
    ]


def _score(
    samples: Sequence[JudgedSample], ks: Sequence[int], temperature: float, seed: int, num_base_tests: int | None
) -> dict[str, Any]:
    problems: dict[str, list[JudgedSample]] = defaultdict(list)
    for sample in samples:
        problems[sample.problem_id].append(sample)
    judged = [[sample for sample in group if sample.statuses is not None] for group in problems.values()]
    num_samples = max(len(group) for group in problems.values())
    num_judged = sum(map(len, judged))
    passes = [[sample.passed() for sample in group] for group in judged]
    base = [[sample.passed(num_base_tests) for sample in group] for group in judged]
    score: dict[str, Any] = {"temperature": temperature, "num_samples": num_samples, "num_problems": len(problems)}
    for k in sorted({k for k in ks if k <= num_samples}):
        score[f"pass@{k}"] = _interval(passes, k, seed)
        if num_base_tests is not None:
            score[f"base_pass@{k}"] = _interval(base, k, seed)
    return score | {
        "low_trust_share": sum(s.low_trust for group in judged for s in group) / num_judged if num_judged else 0.0,
        "num_masked": len(samples) - num_judged,
        "blank_share": sum(not s.code for s in samples) / len(samples),
        "mean_tokens": sum(s.num_tokens for s in samples) / len(samples),
        "texts_sha256": texts_digest(samples),
    }


def _interval(passes: Sequence[Sequence[bool]], k: int, seed: int) -> dict[str, Any] | None:
    """None where the judge left no problem with k samples."""
    rates = [pass_at_k(sum(each), len(each), k) for each in passes if len(each) >= k]
    if not rates:
        return None
    mean, low, high = paired_bootstrap(np.zeros(len(rates)), rates, seed=seed)
    return {"mean": mean, "low": low, "high": high, "num_problems": len(rates)}


def texts_digest(samples: Sequence[JudgedSample]) -> str:
    """Equal where the same was sampled, in whatever order."""
    digest = hashlib.sha256()
    for sample in sorted(samples, key=lambda s: (s.temperature, s.problem_id, s.sample_index)):
        digest.update(repr((sample.problem_id, sample.sample_index, sample.text)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def score_table(scores: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in percent."""
    names = [name for name in dict.fromkeys(key for score in scores for key in score) if "pass@" in name]
    heads = [name.replace("base_", "base tests ") for name in names]
    lines = [f"| temperature | samples | {' | '.join(heads)} | trust: low | masked |", "|---" * (len(names) + 4) + "|"]
    for score in scores:
        cells = [_cell(score.get(name)) for name in names]
        low, masked = f"{score['low_trust_share']:.1%}", score["num_masked"]
        lines.append(f"| {score['temperature']:g} | {score['num_samples']} | {' | '.join(cells)} | {low} | {masked} |")
    return "\n".join(lines)


def _cell(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else f"{value['mean']:.1%} [{value['low']:.1%}..{value['high']:.1%}]".replace("%", "")


def report_text(results: Mapping[str, Any]) -> str:
    """results.md."""
    scores, run = results["scores"], results["run"]
    settings = [f"| {name} | {value} |" for name, value in results["settings"].items()]
    digests = [f"- temperature {score['temperature']:g}: `{score['texts_sha256'][:16]}`" for score in scores]
    lines = [
        f"# {results['benchmark']}",
        "",
        score_table(scores),
        "",
        f"Percent of {scores[0]['num_problems']} problems, by the unbiased estimator, with the 95% bootstrap interval over",
        "problems. `trust: low`: samples with a test that ran where the program could forge its status. `masked`: samples on",
        "which the judge failed; they count neither as right nor as wrong.",
        "",
        "| setting | value |",
        "|---|---|",
        *settings,
        "",
        "Batch invariance: what is sampled depends on the model, the prompt, the sampling settings and the seed, not on",
        f"--max-tokens-per-batch ({run['max_tokens_per_batch']} here) nor on --workers ({run['workers']} here): on a CPU to the",
        "last bit; on a GPU a product of another shape may round near-ties the other way. Evaluations that sampled the same",
        "texts have the same digests:",
        "",
        *digests,
    ]
    return "\n".join(lines) + "\n"
