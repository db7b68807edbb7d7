"""How often a policy passes held-out problems: what a run writes to report_before.json and report_after.json."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from diffrl.analysis import pass_at_k


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRates:
    """Samples that passed every graded test, per problem.

    PassRates(num_samples=8, num_correct=(3, 0), families=("sum", "slice"))
    """

    num_samples: int
    num_correct: tuple[int, ...]
    families: tuple[str, ...]

    def per_problem(self, k: int) -> list[float]:
        return [pass_at_k(c, self.num_samples, k) for c in self.num_correct]

    def pass_at(self, k: int) -> float:
        rates = self.per_problem(k)
        return sum(rates) / len(rates)

    def by_family(self) -> dict[str, float]:
        rates = defaultdict(list)
        for family, rate in zip(self.families, self.per_problem(1), strict=True):
            rates[family].append(rate)
        return {family: sum(values) / len(values) for family, values in sorted(rates.items())}


def read_report(file: Path) -> dict[str, PassRates]:
    """What `Telemetry.report` wrote."""
    rows = json.loads(file.read_text())
    return {
        key: PassRates(num_samples=r["num_samples"], num_correct=tuple(r["num_correct"]), families=tuple(r["families"]))
        for key, r in rows.items()
    }
