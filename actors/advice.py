"""What the numbers of the last steps say that somebody should do, in words: a pure function of lines of metrics.jsonl.

Numbers are means over a window of steps. Whoever is never idle while others are is the bottleneck. An advice names the keys
to change; those that change what is computed say so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

WINDOW = 5  # steps that are looked at; before there are so many nothing is said
AGAIN = 50  # steps before the same is said again
BUSY, IDLE = 0.15, 0.3  # share of time without a call: at most, of a bottleneck; at least, of those that it holds up
LONG = 0.5  # share of a step that a phase must take before anybody is told to make it shorter
UNJUDGED, LOW_TRUST, EQUAL, ENDED, CLIPPED = 0.02, 0.1, 0.7, 0.6, 0.3  # shares from which on something is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Advice(about="judge", text="judging is the bottleneck (...): add reward workers (judge.num_workers)")"""

    about: str
    text: str


@dataclass(frozen=True, slots=True)
class Means:
    """Of a window of lines; of a key that none of them has, a value that says nothing."""

    rows: Sequence[Mapping[str, float]]

    def __call__(self, key: str, default: float = 0.0) -> float:
        values = [row[key] for row in self.rows if key in row]
        return fmean(values) if values else default

    def phase(self, *names: str) -> float:
        """Share of the step that phases take."""
        total = sum(self(key) for key in {key for row in self.rows for key in row if key.startswith("time/")})
        return sum(self(f"time/{name}") for name in names) / total if total else 0.0

    def grown(self, key: str) -> float:
        """By how much a counter has grown, over a window in which the run was not started anew."""
        values = [row[key] for row in self.rows if key in row]
        return values[-1] - values[0] if values else 0.0


def advise(rows: Sequence[Mapping[str, float]]) -> list[Advice]:
    """What the last WINDOW lines of steps say."""
    if len(rows) < WINDOW:
        return []
    mean = Means(rows[-WINDOW:])
    return [*bottlenecks(mean), *of_the_judge(mean), *of_learning(mean), *losses(mean)]


def bottlenecks(mean: Means) -> Iterator[Advice]:
    idle = {role: mean(f"idle/{role}_frac", 1.0) for role in ("rollout", "judge", "reference")}
    told = ", ".join(f"{role} workers {100 * share:.0f}%" for role, share in idle.items() if share < 1)
    waits = mean.phase("rollouts")
    ways_out = {
        "judge": "judging is the bottleneck ({}): add reward workers (judge.num_workers, judge.max_workers) or sandbox slots "
        "(sandbox.slots)",
        "rollout": "sampling is the bottleneck ({}): add rollout workers (rollout.num_workers) or let more rows share a "
        "forward pass (rollout.max_tokens_per_batch)",
        "reference": "the reference is the bottleneck ({}): add workers (reference.num_workers)",
    }
    slowest = min(idle, key=lambda role: idle[role])
    others = [share for role, share in idle.items() if role != slowest and share < 1]
    if waits > LONG and idle[slowest] < BUSY and others and min(others) > IDLE:
        yield Advice(about=slowest, text=ways_out[slowest].format(f"idle: {told}"))
    learns = mean.phase("learner")
    if learns > LONG:
        yield Advice(
            about="learner",
            text=f"the learner is the bottleneck ({100 * learns:.0f}% of a step): add ranks (learner.num_ranks) or let a "
            "micro-batch be larger (learner.max_tokens_per_micro_batch)",
        )
    elif min(waits, learns) > 0.25 and mean("rollout/staleness_max") == 0:
        yield Advice(
            about="overlap",
            text=f"rollouts ({100 * waits:.0f}% of a step) and updates ({100 * learns:.0f}%) wait for each other: "
            "rollout.max_staleness 1 overlaps them, and changes what is computed",
        )
    if (syncs := mean.phase("publish", "pull")) > IDLE:
        yield Advice(
            about="weights",
            text=f"moving weights takes {100 * syncs:.0f}% of a step: larger steps (train.prompts_per_step) or adapters "
            "(model.lora with publish adapter) move less, and change what is computed",
        )


def of_the_judge(mean: Means) -> Iterator[Advice]:
    if (share := mean("sandbox/infra_error_frac")) > UNJUDGED:
        yield Advice(
            about="infrastructure",
            text=f"{100 * share:.1f}% of the samples could not be judged, and are left out: `diffrl doctor CONFIG` looks at "
            "the sandbox; fewer slots (sandbox.slots) or more time (sandbox.wall_s) help where it is overloaded",
        )
    if (share := mean("sandbox/low_trust_frac")) > LOW_TRUST:
        yield Advice(
            about="trust",
            text=f"{100 * share:.0f}% of the samples had a test that their program could forge: read some of them; "
            "sandbox.pay_low_trust false pays nothing for such tests, and changes what is computed",
        )


def of_learning(mean: Means) -> Iterator[Advice]:
    if (share := mean("reward/equal_groups_frac")) > EQUAL:
        solved, failed = mean("group/all_pass_frac"), mean("group/all_fail_frac")
        problems = "harder" if solved > failed else "easier"
        yield Advice(
            about="groups",
            text=f"{100 * share:.0f}% of the groups teach nothing, for their rewards are equal (all pass {100 * solved:.0f}%, "
            f"all fail {100 * failed:.0f}%): {problems} problems, or method.max_replacements, change that",
        )
    if (share := mean("rollout/end_token_frac", 1.0)) < ENDED:
        yield Advice(
            about="length",
            text=f"only {100 * share:.0f}% of the completions end within sampling.completion_tokens: raise it, or tune the "
            "model on shorter ones first",
        )
    if (share := mean("loss/clip_low_frac") + mean("loss/clip_high_frac")) > CLIPPED:
        yield Advice(
            about="clipping",
            text=f"{100 * share:.0f}% of the tokens are beyond the clip range: lower optim.lr or method.num_iterations",
        )
    if skipped := sum(row.get("optim/bad_steps", 0) for row in mean.rows):
        yield Advice(
            about="skipped",
            text=f"{skipped:.0f} optimizer steps of the last {WINDOW} steps were skipped, for loss or gradient were not "
            "finite: lower optim.lr; their batches are in failed_batches",
        )


def losses(mean: Means) -> Iterator[Advice]:
    for role in ("rollout", "judge", "reference", "learner"):
        if (lost := mean.grown(f"restarts/{role}")) >= WINDOW - 1:  # once a step
            yield Advice(
                about=f"restarts of {role}",
                text=f"{lost:.0f} restarts of {role} in {WINDOW} steps: the lines above say why; supervision.memory_mb and "
                "the time limits of supervision may be too tight",
            )
