"""What a run tells: one line per step on the terminal, metrics.jsonl, the tables of a report."""

import io
import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actors.batcher import RolloutStats
from actors.evaluate import PassRates
from diffrl.files import write_whole
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
        self.metrics.close()

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
        write_whole(self.folder / f"report_{when}.json", json.dumps(rows) + "\n")
        self.say(f"{when}: " + "  ".join(f"{key} {100 * r.pass_at(1):.1f}%" for key, r in rates.items()))


class SupervisedTelemetry(Telemetry):
    """Of a supervised stage, whose steps are many and short and whose workers write metrics.jsonl: follows that file from a
    thread of its own and says a line now and then."""

    POLL_S = 0.5

    def __enter__(self) -> Self:
        self.told = self.stalls()  # and of steps, which are done again after a worker was lost
        self.last = 0  # step
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.follow, daemon=True)
        self.thread.start()
        return super().__enter__()

    def __exit__(self, *exc_info: object) -> None:
        self.ended.set()
        self.thread.join()
        super().__exit__(*exc_info)

    def follow(self) -> None:
        offset = self.metrics.path.stat().st_size if self.metrics.path.exists() else 0
        while not self.ended.wait(self.POLL_S):
            offset = self.read(offset)
            for file in sorted(self.stalls() - self.told):
                self.told.add(file)
                self.say(f"a worker was stuck and has been ended; its stacks: {file}")
        self.read(offset)

    def stalls(self) -> set[str]:
        """Reports of the workers' watchdogs."""
        return {str(file) for file in (self.folder / "stalls").glob("*.txt")}

    def read(self, offset: int) -> int:
        """Show whole lines from a byte on; where the next one begins. A file that has become shorter was cut back."""
        file = self.metrics.path
        size = file.stat().st_size if file.exists() else 0
        with file.open("rb") if size > offset else io.BytesIO() as lines:
            lines.seek(offset)
            for line in lines:
                if line.endswith(b"\n"):
                    offset += len(line)
                    with suppress(ValueError):  # the rest of a line, of a file that was cut and has grown again since
                        self.show(json.loads(line))
        return min(offset, size)

    def show(self, row: Mapping[str, float]) -> None:
        step = int(row["step"]) + 1
        if step < self.last:
            self.say(f"workers were lost after step {self.last}; new ones go on from step {step}")
        self.last = step
        self.progress.update(self.task, completed=step)
        if (loss := row.get("validation/diffusion")) is not None:
            said = f"validation loss {loss:.3f}"
        elif step % max(1, self.num_steps // 10) == 0 and row.get("loss/diffusion") is not None:
            said = f"loss {row['loss/diffusion']:.3f}  {row['time/tokens_per_second']:,.0f} tokens/s"
        else:
            return
        key = f"{step} {said.partition(' ')[0]}"
        if key not in self.told:
            self.told.add(key)
            self.say(f"step {step:>5}/{self.num_steps}  {said}")


# What `sampling_metrics` says; none of it belongs to the result of a run.
SAMPLING_METRICS = ("rollout/forward_passes", "rollout/tokens_per_second", "rollout/useful_share")


def sampling_metrics(
    before: Sequence[RolloutStats | None], after: Sequence[RolloutStats | None], num_tokens: int
) -> dict[str, float]:
    """What the rollout workers' engines did in a time in which they sampled `num_tokens`, counted up to the end tokens.
    Workers that did not answer (None) are left out."""
    passes = passed = useful = busy_s = 0.0
    for old, new in zip(before, after, strict=True):
        if new is None:
            continue
        if old is None or new.num_passes < old.num_passes:
            old = RolloutStats()  # a new worker counts from zero
        passes += new.num_passes - old.num_passes
        passed += new.num_tokens_passed - old.num_tokens_passed
        useful += new.num_useful_tokens - old.num_useful_tokens
        busy_s += new.busy_s - old.busy_s
    there = sum(stats is not None for stats in after)
    speed = num_tokens * there / busy_s if busy_s else 0.0  # of all workers together, while they sample
    values = (passes, round(speed, 1), round(useful / passed, 4) if passed else 0.0)
    return dict(zip(SAMPLING_METRICS, values, strict=True))


def pool_metrics(
    before: Sequence[PoolStats | None], after: Sequence[PoolStats | None], seconds: float
) -> dict[str, float]:
    """What the reward workers' pools of sandboxes did in a time: sums, and means over that time for each worker. Workers that
    did not answer (None) are left out, and those that have left or joined since count from zero or not at all."""
    metrics = {"pool/workers": 0, "pool/cpu_ms": 0.0, "pool/infra_errors": 0, "pool/restarts": 0}
    for worker, (old, new) in enumerate(zip_longest(before, after)):
        if new is None:
            continue
        metrics["pool/workers"] += 1
        if old is not None and new.busy_s < old.busy_s:
            old = None  # a new worker counts from zero
        metrics["pool/cpu_ms"] += new.cpu_ms - (old.cpu_ms if old else 0)
        metrics["pool/infra_errors"] += sum(new.errors.values()) - (sum(old.errors.values()) if old else 0)
        metrics["pool/restarts"] += new.restarts - (old.restarts if old else 0)
        metrics[f"pool/{worker}/busy_slots"] = (new.busy_s - (old.busy_s if old else 0)) / seconds
        metrics[f"pool/{worker}/queue_depth"] = (new.waited_s - (old.waited_s if old else 0)) / seconds
    return {name: round(value, 4) for name, value in metrics.items()}
