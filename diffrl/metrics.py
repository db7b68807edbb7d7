"""Every metric of a run, defined once: what stands in metrics.jsonl, on the axes of curves.png, in TensorBoard, in Prometheus.

A name with a {label} in it stands for several, such as `restarts/{role}` for `restarts/judge`; in Prometheus they are one
metric with that label. A key that nobody has defined is written all the same, with a warning (an error in tests).
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["gauge", "count", "counter"]
Stage = Literal["rl", "supervised", "both"]
LABELS = {"role": "[a-z]+", "worker": r"\d+", "status": "[a-z_]+", "part": r"\w+", "error": r"\w+", "k": r"\d+"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Metric(name="memory/{role}_mb", unit="MB", kind="gauge", help="resident memory of the largest worker of a role",
    stage="rl", when="", varies=True)"""

    name: str
    unit: str
    kind: Kind  # gauge: of the step; count: how many in the step; counter: how many since this start of the run
    help: str
    stage: Stage  # rl, one of the supervised stages, or both
    when: str = ""  # which lines have it; "": that of every step
    varies: bool = False  # between runs of equal seed and config

    @property
    def prometheus(self) -> str:
        """Its name there, without what Ray puts around it: diffrl_memory_mb."""
        plain = re.sub(r"\{\w+\}", "", self.name.replace("@{k}", "_at_k").replace("@", "_at_"))
        return "diffrl_" + re.sub(r"[/_]+", "_", plain).strip("_")

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(re.findall(r"\{(\w+)\}", self.name))

    @property
    def pattern(self) -> re.Pattern[str]:
        parts = re.split(r"\{(\w+)\}", self.name)
        return re.compile(
            "".join(re.escape(part) if i % 2 == 0 else f"(?P<{part}>{LABELS[part]})" for i, part in enumerate(parts))
        )


def gauge(name: str, unit: str, help: str, *, stage: Stage = "rl", when: str = "", varies: bool = False) -> Metric:
    return Metric(name=name, unit=unit, kind="gauge", help=help, stage=stage, when=when, varies=varies)


def count(name: str, unit: str, help: str, *, stage: Stage = "rl", when: str = "", varies: bool = False) -> Metric:
    return Metric(name=name, unit=unit, kind="count", help=help, stage=stage, when=when, varies=varies)


def counter(name: str, unit: str, help: str) -> Metric:
    return Metric(name=name, unit=unit, kind="counter", help=help, stage="rl", varies=True)


GUARD = "sampling.* approximates"
VALIDATION = "validation"
METRICS = (
    # Rewards, of the judged samples of the groups that are learned from
    gauge("reward/mean", "reward", "mean reward"),
    gauge("reward/pass_rate", "share of tests", "graded tests that passed, 0 for a completion of the wrong format"),
    gauge("reward/solved_frac", "share of samples", "all graded tests passed"),
    gauge("reward/format", "share", "completions of the right format; half of one counts half"),
    gauge("reward/equal_groups_frac", "share of groups", "all rewards equal: nothing to learn from"),
    gauge("reward/part/{part}", "reward", "mean of a part, times its weight; `other`: all but pass_rate and format"),
    gauge("reward/group_std", "reward", "standard deviation of the rewards within a group, mean over groups"),
    gauge("group/pass@{k}", "chance", "that one of k samples passes all tests (unbiased estimate)"),
    gauge("group/all_pass_frac", "share of groups", "every judged sample passed all tests"),
    gauge("group/all_fail_frac", "share of groups", "no judged sample passed all tests"),
    gauge("group/mixed_frac", "share of groups", "some judged samples passed all tests and some did not"),
    gauge("group/dropped_frac", "share of groups", "left out of the loss: too few judged, or equal and to be dropped"),
    gauge("advantage/std", "reward", "standard deviation of the advantages"),
    gauge("advantage/max", "reward", "largest advantage, of either sign"),
    count("verdicts/{status}", "tests", "graded tests that ended like this", when="a test did"),
    gauge("sandbox/infra_error_frac", "share of samples", "could not be judged, for failures of the judge"),
    gauge("sandbox/low_trust_frac", "share of samples", "a test ran where the program could forge its verdict"),
    gauge("data/quarantined", "problems", "left out by now, for they broke their workers"),
    gauge("eval/pass@1", "share of samples", "held-out problems' samples that pass all tests", when="eval.every"),
    # Completions
    gauge("rollout/completion_tokens", "tokens", "mean length, the end token included"),
    gauge("rollout/completion_tokens_p50", "tokens", "median length"),
    gauge("rollout/completion_tokens_p95", "tokens", "95th percentile of lengths"),
    gauge("rollout/completion_tokens_max", "tokens", "largest length"),
    gauge("rollout/end_token_frac", "share of samples", "completions with an end token"),
    gauge("rollout/surprisal", "nats per token", "-log p of tokens when they were revealed, at temperature 1"),
    count("rollout/tokens", "tokens", "sampled up to the end tokens, replaced groups included"),
    count("rollout/replaced_groups", "groups", "gave way to further prompts, for their rewards were equal"),
    gauge("rollout/staleness_mean", "updates", "from the policy that sampled to the one that learns"),
    gauge("rollout/staleness_max", "updates", "the most of them"),
    gauge("order/local_ar@1", "share of steps", "local AR-ness: the next token is the right-hand neighbour's"),
    gauge("order/global_ar@1", "share of steps", "global AR-ness: the next token is the leftmost hidden one"),
    gauge("guard/rollouts", "pairs", "sampled both ways", when=GUARD),
    gauge("guard/agreement", "share of tokens", "equal in approximate and exact sampling", when=GUARD),
    gauge("guard/confidence_drift", "probability", "approximate - exact, of the revealed tokens", when=GUARD),
    gauge("guard/reward_difference", "reward", "approximate - exact", when=GUARD),
    gauge("sampling/fallback", "0 or 1", "whether the guard has made sampling exact", when=GUARD),
    # What is learned from
    count("batch/prompt_tokens", "tokens", "of prompts, once for each completion"),
    count("batch/loss_tokens", "tokens", "in the loss"),
    count("batch/loss_rows", "completions", "in the loss"),
    gauge("views/mask_ratio", "share of tokens", "hidden by views that leave some visible (1 where none does), mean"),
    gauge("views/mask_ratio_std", "share of tokens", "standard deviation of that over views and completions"),
    gauge("views/coverage", "share of tokens", "hidden at least once while others of the completion are visible"),
    gauge("loss/total", "reward", "policy loss + kl_coef * KL"),
    gauge("loss/policy", "reward", "clipped surrogate, to be minimised"),
    gauge("loss/kl", "nats per token", "estimated KL of the policy to the reference"),
    gauge("loss/ratio_mean", "ratio", "mean of new / old probability"),
    gauge("loss/clip_low_frac", "share of tokens", "ratio below the clip range, negative advantage"),
    gauge("loss/clip_high_frac", "share of tokens", "ratio above the clip range, positive advantage"),
    gauge("first/ratio_mean", "ratio", "as loss/ratio_mean, of the first inner iteration: 1"),
    gauge("first/kl", "nats per token", "as loss/kl, of the first inner iteration"),
    gauge("optim/grad_norm", "L2 norm", "gradient before clipping, of the last optimizer step", stage="both"),
    gauge("optim/lr", "per step", "learning rate", stage="both"),
    count("optim/bad_steps", "optimizer steps", "skipped, for loss or gradient were not finite", stage="both"),
    gauge("optim/bad_in_a_row", "optimizer steps", "skipped in a row by now"),
    gauge("weights/version", "updates", "version of the published policy"),
    gauge("weights/bytes", "bytes", "published to the workers", varies=True),
    gauge("sync/logprob_absdiff_max", "nats", "of a token, between learner and rollout workers", when="sync.every"),
    # Seconds, and who was busy
    gauge("time/rollouts", "s", "waiting for the step's groups: sampled, judged, scored by the reference", varies=True),
    gauge("time/record", "s", "making the batch and writing rollouts", varies=True),
    gauge("time/learner", "s", "the update", varies=True),
    gauge("time/publish", "s", "weights from the learner to the store", varies=True),
    gauge("time/pull", "s", "weights from the store to the workers", varies=True),
    gauge("calls/{role}_p50_s", "s", "a call about a group, median", when="one ended", varies=True),
    gauge("calls/{role}_p95_s", "s", "a call about a group, 95th percentile", when="one ended", varies=True),
    gauge("calls/{role}_max_s", "s", "the longest call about a group", when="one ended", varies=True),
    gauge("idle/{role}_frac", "share of time", "workers of a role without a call", varies=True),
    gauge("queue/{role}", "calls", "waiting for a worker of a role, mean over the step", varies=True),
    gauge("queue/buffered", "groups", "judged, and waiting for their step", varies=True),
    gauge("throughput/{role}_per_s", "groups/s", "groups that a role is through with", varies=True),
    gauge("throughput/learner_tokens_per_s", "tokens/s", "in the loss, of all inner iterations", varies=True),
    gauge("rollout/forward_passes", "passes", "of the sampling engines", varies=True),
    gauge("rollout/tokens_per_second", "tokens/s", "of all workers together, while they sample", varies=True),
    gauge("rollout/useful_share", "share", "positions in forward passes that are no padding", varies=True),
    gauge("memory/{role}_mb", "MB", "resident memory of the largest process of a role", varies=True),
    # What went wrong
    counter("restarts/{role}", "workers", "replaced; of the learner, rebuilds of the group"),
    counter("retries/{role}", "calls", "made again, for their worker was lost"),
    counter("rejudged/groups", "groups", "judged again elsewhere, for the judge had failed on some of their samples"),
    # Sandboxes
    gauge("pool/workers", "workers", "reward workers that answered", varies=True),
    count("pool/cpu_ms", "ms", "CPU of judged programs", varies=True),
    count("pool/infra_errors", "errors", "failures of sandboxes, those made good by a retry included", varies=True),
    count("pool/errors/{error}", "errors", "such failures by class", when="there were any", varies=True),
    count("pool/restarts", "sandboxes", "replaced", varies=True),
    gauge("pool/{worker}/busy_slots", "slots", "in use, mean over the step", varies=True),
    gauge("pool/{worker}/queue_depth", "programs", "waiting for a slot, mean over the step", varies=True),
    # Supervised stages
    gauge("loss/diffusion", "nats per token", "(1/t)-weighted cross-entropy of hidden tokens", stage="supervised"),
    gauge("loss/nll", "nats per token", "cross-entropy of hidden tokens, not weighted", stage="supervised"),
    gauge("loss/hidden_frac", "share of loss weight", "hidden", stage="supervised"),
    count("data/tokens", "tokens", "of the rows, without padding", stage="supervised"),
    gauge("validation/diffusion", "nats per token", "loss of held-out rows", stage="supervised", when=VALIDATION),
    gauge("validation/nll", "nats per token", "loss/nll of held-out rows", stage="supervised", when=VALIDATION),
    gauge("time/validation", "s", "computing them", stage="supervised", when=VALIDATION, varies=True),
    gauge("time/rows", "s", "waiting for rows", stage="supervised", varies=True),
    gauge("time/step", "s", "the train step", stage="supervised", varies=True),
    gauge("time/tokens_per_second", "tokens/s", "trained on", stage="supervised", varies=True),
)
# No lines of metrics.jsonl have these, of which Prometheus is told with every step.
STEPS = gauge("steps", "steps", "done by the run", stage="both")
STEP_ENDED_AT = gauge("step_ended_at", "unix time", "when the last step was done", stage="both", varies=True)
_PLAIN: Mapping[str, Metric] = {metric.name: metric for metric in METRICS if not metric.labels}
_PATTERNS = [(metric.pattern, metric) for metric in METRICS if metric.labels]


@lru_cache(maxsize=4096)
def find(key: str) -> tuple[Metric, tuple[str, ...]] | None:
    """The metric that a key of metrics.jsonl belongs to, and the values of its labels; None for one that is not defined."""
    if key in _PLAIN:
        return _PLAIN[key], ()
    return next(((metric, match.groups()) for pattern, metric in _PATTERNS if (match := pattern.fullmatch(key))), None)


def undefined(keys: Iterable[str]) -> list[str]:
    """Those without a definition; `step` is no metric."""
    return [key for key in keys if key != "step" and find(key) is None]


def check_defined(keys: Iterable[str]) -> None:
    """Warn of a key without a definition."""
    for key in undefined(keys):
        warnings.warn(f"metric {key!r} is not defined; add it to METRICS in diffrl/metrics.py", stacklevel=2)


def varies(key: str) -> bool:
    """Whether its value may differ between runs of equal seed and config."""
    found = find(key)
    return found is not None and found[0].varies


def unit(key: str) -> str:
    """Of the metric that a key belongs to, which is defined."""
    found = find(key)
    assert found is not None, key
    return found[0].unit
