"""Numbers about finished rollouts, and what `diffrl analyze` makes of them.

arness.py: AR-ness of an order. statistics.py: pass@k, bootstrap. Both need numpy alone and are offered here.
samples.py: measures of rollouts, problem by problem. stored.py: the rollouts of a run. confidence.py: what a model is sure of at
its first steps. math_set.py: questions with a number as answer. claims.py: the paper's claims, with intervals. results.py ->
plots.py, summary.py: tables, and what is made of them.
"""

from diffrl.analysis.arness import global_ar_ness, local_ar_ness, reveal_order
from diffrl.analysis.statistics import (
    Estimate,
    estimate,
    independent_bootstrap,
    paired_bootstrap,
    pass_at_k,
)

__all__ = [
    "Estimate",
    "estimate",
    "global_ar_ness",
    "independent_bootstrap",
    "local_ar_ness",
    "paired_bootstrap",
    "pass_at_k",
    "reveal_order",
]
