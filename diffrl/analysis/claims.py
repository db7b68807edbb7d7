"""The paper's qualitative claims, each as a difference between two sets of scores with its 95% interval."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from diffrl.analysis.statistics import independent_bootstrap, paired_bootstrap

TEMPERATURE_ORDER = "temperature lowers AR-ness"
TEMPERATURE_PASS = "temperature raises pass@k"
RL_ORDER = "RL lowers AR-ness"
RL_STEPS = "RL lowers the loss of accuracy at half the steps"
CODE_MATH = "code is decoded less from left to right than math"
SINK = "the model is surest right behind the prefix"
CLAIMS = (TEMPERATURE_ORDER, TEMPERATURE_PASS, RL_ORDER, RL_STEPS, CODE_MATH, SINK)
Verdict = Literal["seen", "not seen", "undecided"]
Wanted = Literal["lower", "higher"]  # what the claim says of `after`


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim of the paper about one measure of one source, or of two.

    Claim(claim="temperature lowers AR-ness", source="rl", measure="global@1", before="temperature 0.2", after="temperature 1.2",
          mean_before=0.61, mean_after=0.52, wanted="lower", gain=-0.09, low=-0.12, high=-0.06, count=60, paired=True)
    """

    claim: str
    source: str
    measure: str
    before: str  # what `mean_before` is of
    after: str
    mean_before: float
    mean_after: float
    wanted: Wanted
    gain: float  # after - before
    low: float
    high: float
    count: int  # problems that were compared; where they are not paired, the fewer
    paired: bool

    @property
    def verdict(self) -> Verdict:
        """seen: the interval lies on the claim's side of 0; not seen: no part of it does; undecided: 0 is inside."""
        low, high = (self.low, self.high) if self.wanted == "higher" else (-self.high, -self.low)
        return "seen" if low > 0 else "not seen" if high <= 0 else "undecided"

    def row(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


def compared(
    claim: str,
    source: str,
    measure: str,
    wanted: Wanted,
    before: tuple[str, Mapping[str, float]],
    after: tuple[str, Mapping[str, float]],
    *,
    seed: int,
    paired: bool = True,
) -> Claim | None:
    """From (label, score of each problem). `paired`: only problems that both have count. None when nothing can be compared."""
    (before_label, first), (after_label, second) = before, after
    if paired:
        both = [id for id in first if id in second]
        first_N, second_N = (np.array([scores[id] for id in both]) for scores in (first, second))
    else:
        first_N, second_N = (np.array(list(scores.values())) for scores in (first, second))
    if not (first_N.size and second_N.size):
        return None
    bootstrap = paired_bootstrap if paired else independent_bootstrap
    gain, low, high = bootstrap(first_N, second_N, seed=seed)
    return Claim(
        claim=claim,
        source=source,
        measure=measure,
        before=before_label,
        after=after_label,
        mean_before=float(first_N.mean()),
        mean_after=float(second_N.mean()),
        wanted=wanted,
        gain=gain,
        low=low,
        high=high,
        count=min(first_N.size, second_N.size),
        paired=paired,
    )
