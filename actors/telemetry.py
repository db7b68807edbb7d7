"""What a run tells: one line per step on the terminal, metrics.jsonl, the tables of a report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actors.batcher import RolloutStats
from actors.evaluate import PassRates
from diffrl.run_folder import MetricsFile
from sandbox.pool import PoolStats


class Telemetry:
    """Progress goes to stderr; stdout carries the lines that a script may want to read."""

    def __init__(self, folder: Path, num_steps: int, title: str = "rl"):
        self.folder = folder
        self.num_steps = num_steps
        self.metrics = MetricsFile(folder)
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(title, total=num_steps)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, float], times: Mapping[str, float]) -> None:
        """`times` is what may differ between equal runs: seconds, restarts, how rows were batched, what the pools of
        sandboxes did."""
        self.metrics.write({"step": step, **metrics, **times})
        self.progress.update(self.task, completed=step + 1)
        unjudged = metrics["sandbox/infra_error_frac"]
        seconds = sum(v for k, v in times.items() if k.startswith("time/"))
        self.say(
            f"step {step + 1:>4}/{self.num_steps}  reward {metrics['reward/mean']:.3f}  "
            f"solved {100 * metrics['reward/solved_frac']:5.1f}%  loss {metrics['loss/total']:+.4f}  "
            f"kl {metrics['loss/kl']:.4f}  grad {metrics['optim/grad_norm']:.3f}  {seconds:.1f}s"
            + (f"  not judged {100 * unjudged:.1f}%" if unjudged else "")
        )

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.write({"step": step, **metrics})
        self.say(
            "  ".join([f"step {step + 1:>4}/{self.num_steps}", *(f"{k} {100 * v:.1f}%" for k, v in metrics.items())])
        )

    def report(self, when: str, rates: Mapping[str, PassRates]) -> None:
        """Numbers of a report to the terminal, all counts to report_WHEN.json."""
        rows = {
            key: {"num_samples": r.num_samples, "num_correct": r.num_correct, "families": r.families}
            for key, r in rates.items()
        }
        (self.folder / f"report_{when}.json").write_text(json.dumps(rows) + "\n")
        self.say(f"{when}: " + "  ".join(f"{key} {100 * r.pass_at(1):.1f}%" for key, r in rates.items()))


class SupervisedTelemetry(Telemetry):
    """The same for the supervised stages, whose steps are many and short: a line now and then."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.write({"step": step, **metrics})
        self.progress.update(self.task, completed=step + 1)
        if (step + 1) % max(1, self.num_steps // 10) == 0:
            loss, nll = metrics["loss/diffusion"], metrics["loss/nll"]
            self.say(f"step {step + 1:>5}/{self.num_steps}  loss {loss:.3f}  of a hidden token {nll:.3f}")


# What `sampling_metrics` says; none of it belongs to the result of a run.
SAMPLING_METRICS = ("rollout/forward_passes", "rollout/tokens_per_second", "rollout/useful_share")


def sampling_metrics(
    before: Sequence[RolloutStats], after: Sequence[RolloutStats], num_tokens: int
) -> dict[str, float]:
    """What the rollout workers' engines did in a time in which they sampled `num_tokens`, counted up to the end tokens."""
    passes = passed = useful = busy_s = 0.0
    for old, new in zip(before, after, strict=True):
        if new.num_passes < old.num_passes:
            old = RolloutStats()  # a new worker counts from zero
        passes += new.num_passes - old.num_passes
        passed += new.num_tokens_passed - old.num_tokens_passed
        useful += new.num_useful_tokens - old.num_useful_tokens
        busy_s += new.busy_s - old.busy_s
    speed = num_tokens * len(after) / busy_s if busy_s else 0.0  # of all workers together, while they sample
    values = (passes, round(speed, 1), round(useful / passed, 4) if passed else 0.0)
    return dict(zip(SAMPLING_METRICS, values, strict=True))


def pool_metrics(before: Sequence[PoolStats], after: Sequence[PoolStats], seconds: float) -> dict[str, float]:
    """What the reward workers' pools of sandboxes did in a time: sums, and means over that time for each worker."""
    metrics = {"pool/cpu_ms": 0.0, "pool/infra_errors": 0, "pool/restarts": 0}
    for worker, (old, new) in enumerate(zip(before, after, strict=True)):
        restarted = new.busy_s < old.busy_s  # a new worker counts from zero
        since = (lambda a, b: b) if restarted else (lambda a, b: b - a)
        metrics["pool/cpu_ms"] += since(old.cpu_ms, new.cpu_ms)
        metrics["pool/infra_errors"] += since(sum(old.errors.values()), sum(new.errors.values()))
        metrics["pool/restarts"] += since(old.restarts, new.restarts)
        metrics[f"pool/{worker}/busy_slots"] = since(old.busy_s, new.busy_s) / seconds
        metrics[f"pool/{worker}/queue_depth"] = since(old.waited_s, new.waited_s) / seconds
    return {name: round(value, 4) for name, value in metrics.items()}
