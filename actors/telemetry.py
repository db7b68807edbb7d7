"""What a run tells: one line per step on the terminal with advice where something is in the way, metrics.jsonl and the
sinks beside it (sinks.py), its board (run_board.py), the tables of a report, and at the end curves.png and where everything
is."""

import json
import os
import threading
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actors.advice import AGAIN, WINDOW, advise
from actors.batcher import RolloutStats
from actors.evaluate import PassRates
from actors.processes import one_line
from actors.run_board import RunBoard
from actors.sinks import Sinks
from diffrl.config.telemetry import TelemetryConfig
from diffrl.curves import CURVES, write_curves
from diffrl.files import write_whole
from diffrl.metrics import check_defined
from diffrl.run_folder import METRICS, MetricsFile
from sandbox.pool import PoolStats


class Telemetry:
    """Progress goes to stderr; stdout carries the lines that a script may want to read."""

    def __init__(self, folder: Path, num_steps: int, title: str = "rl", config: TelemetryConfig | None = None):
        """`config`: of a run that goes all the way; None: metrics.jsonl and the terminal alone."""
        self.folder = folder
        self.num_steps = num_steps
        self.metrics = MetricsFile(folder)
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[phase]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(title, total=num_steps, phase="")
        self.config = config
        self.sinks = Sinks(config or TelemetryConfig(sinks=[]), folder, title, self.say)
        self.rows: deque[Mapping[str, float]] = deque(maxlen=WINDOW)  # of the last steps
        self.advised: dict[str, int] = {}  # the step at which something was said last
        self.board: RunBoard | None = None

    def __enter__(self) -> Self:
        self.progress.start()
        if self.config is not None and self.config.board_port is not None:
            self.board = RunBoard(self.folder, self.config.board_port, self.say)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self.progress.stop()
        if self.board is not None:
            self.board.close()
        self.sinks.close()
        self.metrics.close()
        if self.config is None:
            return
        try:
            write_curves(self.folder)
        except Exception as error:  # a picture is no reason for a run to fail
            self.say(f"{CURVES} could not be drawn ({type(error).__name__}: {one_line(error)})")
        if kind is None:
            for line in summary(self.folder):
                self.say(line)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def phase(self, name: str) -> None:
        """What the run does now, beside the bar."""
        self.progress.update(self.task, phase=name)

    def write(self, row: Mapping[str, float]) -> None:
        """A line of metrics.jsonl."""
        check_defined(row)
        self.metrics.write(row)
        self.sinks.write(row)

    def step(self, step: int, metrics: Mapping[str, float], times: Mapping[str, float]) -> None:
        """`times` is what may differ between equal runs: seconds, restarts, how rows were batched, what the pools of
        sandboxes did."""
        row = {"step": step, **metrics, **times}
        self.write(row)
        self.progress.update(self.task, completed=step + 1)
        unjudged = metrics["sandbox/infra_error_frac"]
        seconds = sum(v for k, v in times.items() if k.startswith("time/"))
        self.say(
            f"step {step + 1:>4}/{self.num_steps}  reward {metrics['reward/mean']:.3f}  "
            f"solved {100 * metrics['reward/solved_frac']:5.1f}%  loss {metrics['loss/total']:+.4f}  "
            f"kl {metrics['loss/kl']:.4f}  grad {metrics['optim/grad_norm']:.3f}  {seconds:.1f}s"
            + (f"  not judged {100 * unjudged:.1f}%" if unjudged else "")
        )
        self.rows.append(row)
        for advice in advise(list(self.rows)):
            if step - self.advised.get(advice.about, -AGAIN) >= AGAIN:
                self.advised[advice.about] = step
                self.say(f"advice: {advice.text}")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.write({"step": step, **metrics})
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


SHOWN = {
    "model": "the policy",
    "best": "the best by evaluation",
    "adapter": "its adapters",
    METRICS: "a line per step",
    CURVES: "how it went",
    "tensorboard": "tensorboard --logdir {path}",
    "rollouts": "every completion",
    "quarantine.jsonl": "problems left out",
    "failed_batches": "of skipped optimizer steps",
    "stalls": "where somebody was stuck",
}


def summary(folder: Path) -> Iterator[str]:
    """A line for each of the things that a run has left in its folder."""
    yield f"{folder} holds"
    for name, what in SHOWN.items():
        if (path := folder / name).exists():
            yield f"  {name + '/' * path.is_dir():<18}{what.format(path=path)}"


class SupervisedTelemetry(Telemetry):
    """Of a supervised stage, whose steps are many and short and whose workers write metrics.jsonl: follows that file from a
    thread of its own, passes its lines on to the sinks, and says one now and then."""

    POLL_S = 0.5

    def __enter__(self) -> Self:
        self.told = self.stalls()  # and of steps, which are done again after a worker was lost
        self.last = 0  # step
        self.inode = 0  # of the file that was read last
        self.offset = 0  # of the line to read next
        self.known = array("q")  # hashes of the lines before it
        self.read(passed_on=False)  # of an earlier start
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.follow, daemon=True)
        self.thread.start()
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self.ended.set()
        self.thread.join()
        super().__exit__(kind, *exc_info)

    def follow(self) -> None:
        while not self.ended.wait(self.POLL_S):
            self.read()
            for file in sorted(self.stalls() - self.told):
                self.told.add(file)
                self.say(f"a worker was stuck and has been ended; its stacks: {file}")
        self.read()

    def stalls(self) -> set[str]:
        """Reports of the workers' watchdogs."""
        return {str(file) for file in (self.folder / "stalls").glob("*.txt")}

    def read(self, *, passed_on: bool = True) -> None:
        """Whole lines that have come since. To cut the file makes a new one of its name, which begins with lines of the old."""
        with suppress(FileNotFoundError), self.metrics.path.open("rb") as lines:
            found = os.fstat(lines.fileno())
            if found.st_ino != self.inode or found.st_size < self.offset:
                self.inode = found.st_ino
                self.skip_known(lines)
            lines.seek(self.offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                self.known.append(hash(line))
                if passed_on:
                    row = json.loads(line)
                    check_defined(row)
                    self.sinks.write(row)
                    self.show(row)

    def skip_known(self, lines: Iterable[bytes]) -> None:
        """Move to the first line of a new file that is another one than in the old."""
        self.offset = kept = 0
        for line, known in zip(lines, self.known, strict=False):
            if hash(line) != known:
                break
            self.offset += len(line)
            kept += 1
        del self.known[kept:]

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
    errors: Counter[str] = Counter()  # by class
    for worker, (old, new) in enumerate(zip_longest(before, after)):
        if new is None:
            continue
        metrics["pool/workers"] += 1
        if old is not None and new.busy_s < old.busy_s:
            old = None  # a new worker counts from zero
        metrics["pool/cpu_ms"] += new.cpu_ms - (old.cpu_ms if old else 0)
        errors.update(new.errors)
        errors.subtract(old.errors if old else {})
        metrics["pool/restarts"] += new.restarts - (old.restarts if old else 0)
        metrics[f"pool/{worker}/busy_slots"] = (new.busy_s - (old.busy_s if old else 0)) / seconds
        metrics[f"pool/{worker}/queue_depth"] = (new.waited_s - (old.waited_s if old else 0)) / seconds
    metrics["pool/infra_errors"] = errors.total()
    metrics |= {f"pool/errors/{name}": number for name, number in errors.items() if number}
    return {name: round(value, 4) for name, value in metrics.items()}
