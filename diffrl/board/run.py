"""One run's folder, followed while it grows: `refresh` reads what is new, `scan` looks at texts of what has been read."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from diffrl.board.index import Chunk, Snapshot, read_chunk, rollout_files, snapshot_of, stamp_of
from diffrl.board.orders import StepOrder, sampled_rows, step_order
from diffrl.board.reading import batches, load_tokenizer, mapping, tokenizer_file
from diffrl.board.series import Series
from diffrl.board.suspicion import flags_of
from diffrl.errors import ConfigError

FILES_AT_ONCE = 64  # before what has been read is shown
MAX_NOTES = 50
SCANNED = ("prompt", "completion", "low_trust", "pass_rate")
ORDERED = ("step_map", "probability")


class Run:
    """Threads that answer read `snapshot`, `orders`, `series`; one thread refreshes and scans."""

    def __init__(self, path: Path, tokenizer: Path | None = None):
        self.path = path
        self.given_tokenizer = tokenizer
        self.series = Series(path / "metrics.jsonl")
        self.chunks: dict[Path, Chunk] = {}
        self.bad: dict[Path, tuple[object, str]] = {}  # stamp and what to say
        self.scanned: dict[Path, object] = {}  # stamp of what was looked at
        self.orders: dict[int, StepOrder] = {}
        self.problems: list[str] = []
        self.codes: dict[str, int] = {}
        self.num_files = 0
        self.snapshot: Snapshot = snapshot_of(0, [], self.problems)
        self.tokenizer_state: tuple[Path, int, Tokenizer | None] | None = None
        self.tokenizer_lock = threading.Lock()

    def code_of(self, problem: str) -> int:
        if (code := self.codes.get(problem)) is None:
            code = self.codes[problem] = len(self.problems)
            self.problems.append(problem)
        return code

    def refresh(self) -> bool:
        """Read new files and metric lines; False: nothing is new."""
        changed = self.series.refresh()
        files = rollout_files(self.path / "rollouts")
        self.num_files = len(files)
        there = {path for _, path in files}
        gone = [path for path in self.chunks if path not in there]
        for path in gone:
            del self.chunks[path]
        self.bad = {path: told for path, told in self.bad.items() if path in there}
        read = 0
        for step, path in reversed(files):
            if self.read(step, path):
                read += 1
                if read % FILES_AT_ONCE == 0:
                    self.publish(files)
        if read or gone:
            self.publish(files)
            pa.default_memory_pool().release_unused()
        return changed or bool(read or gone)

    def read(self, step: int, path: Path) -> bool:
        """Whether a file was new; one that cannot be read is left alone until it changes."""
        try:
            stamp = stamp_of(path)
        except OSError:  # gone since it was listed
            return False
        known = self.chunks.get(path)
        if (known is not None and known.stamp == stamp) or self.bad.get(path, (None,))[0] == stamp:
            return False
        try:
            self.chunks[path] = read_chunk(path, step, self.code_of)
            self.bad.pop(path, None)
        except ValueError as error:
            self.bad[path] = (stamp, str(error))
            self.chunks.pop(path, None)
        return True

    def publish(self, files: list[tuple[int, Path]]) -> None:
        chunks = [self.chunks[path] for _, path in files if path in self.chunks]
        self.snapshot = snapshot_of(self.snapshot.version + 1, chunks, self.problems)

    def scan(self) -> bool:
        """Look at the texts and orders of one file that has not been looked at, newest first; False: there is none."""
        for path, chunk in sorted(self.chunks.items(), reverse=True):
            if self.scanned.get(path) != chunk.stamp:
                self.look_at(path, chunk)
                self.scanned[path] = chunk.stamp
                if not self.pending():
                    self.publish(rollout_files(self.path / "rollouts"))
                return True
        return False

    def pending(self) -> int:
        """Files that have not been looked at yet."""
        return sum(self.scanned.get(path) != chunk.stamp for path, chunk in list(self.chunks.items()))

    def look_at(self, path: Path, chunk: Chunk) -> None:
        flags = np.zeros(chunk.num_rows, np.uint8)
        try:
            for first, batch in batches(path, SCANNED, size=4096):
                rows = slice(first, first + batch.num_rows)
                if rows.stop <= len(flags) and {"prompt", "completion"} <= set(batch.schema.names):
                    columns = chunk.columns["low_trust"][rows], chunk.columns["pass_rate"][rows]
                    flags[rows] = flags_of(batch["prompt"], batch["completion"], *columns)
            self.orders |= self.look_at_orders(path, chunk)
        except (pa.ArrowException, OSError) as error:
            self.bad[path] = (chunk.stamp, f"{path.name}: texts cannot be read ({str(error).partition(chr(10))[0]})")
        chunk.columns["flags"] = flags

    def look_at_orders(self, path: Path, chunk: Chunk) -> dict[int, StepOrder]:
        chosen = sampled_rows(chunk.columns["step"])
        wanted = {int(row): step for step, rows in chosen.items() for row in rows}
        maps: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {step: ([], []) for step in chosen}
        numbers = np.array(sorted(wanted), np.int64)
        for first, batch in batches(path, ORDERED):
            if "step_map" not in batch.schema.names or not pa.types.is_list(batch["step_map"].type):
                return {}
            for row in numbers[(numbers >= first) & (numbers < first + batch.num_rows)].tolist():
                length = max(0, int(chunk.columns["length"][row]))
                for kept, name in zip(maps[wanted[row]], ORDERED, strict=True):
                    values = batch[name][row - first].values if name in batch.schema.names else None
                    kept.append(
                        np.asarray(values.to_numpy(zero_copy_only=False) if values is not None else [])[:length]
                    )
        return {step: step_order(step, *kept) for step, kept in maps.items()}

    @property
    def notes(self) -> list[str]:
        """What a reader should know about the folder: files that cannot be read, columns that are missing."""
        said = [text for _, text in list(self.bad.values())]
        said += [note for chunk in list(self.chunks.values()) for note in chunk.notes]
        if self.series.unreadable:
            said.append(f"metrics.jsonl: {self.series.unreadable} lines cannot be read: left out")
        if not self.path.is_dir():
            said.append(f"{self.path} is gone: what had been read is shown")
        elif not self.num_files:
            said.append(f"{self.path} has no rollouts yet: they appear here as soon as a step is written")
        return said if len(said) <= MAX_NOTES else [*said[:MAX_NOTES], f"and {len(said) - MAX_NOTES} more like these"]

    @property
    def reward_weights(self) -> dict[str, float]:
        reward = mapping(self.path / "config.yaml").get("reward")
        weights = reward.get("weights") if isinstance(reward, dict) else None
        found = weights if isinstance(weights, dict) else {}
        return {str(name): float(weight) for name, weight in found.items() if isinstance(weight, int | float)}

    @property
    def facts(self) -> dict[str, Any]:
        """What the header says of the run."""
        config = mapping(self.path / "config.yaml")
        train = config.get("train")
        num_steps = train.get("steps") if isinstance(train, dict) else None
        return {"stage": config.get("stage"), "num_steps": num_steps if isinstance(num_steps, int) else None}

    def tokenizer(self) -> Tokenizer | None:
        with self.tokenizer_lock:
            file = tokenizer_file(self.path, self.given_tokenizer)
            if file is None:
                return None
            stamp = file.stat().st_mtime_ns
            if self.tokenizer_state is None or self.tokenizer_state[:2] != (file, stamp):
                self.tokenizer_state = (file, stamp, load_tokenizer(file))
            return self.tokenizer_state[2]


def open_run(text: str, tokenizer: str | None = None) -> Run:
    """Raises ConfigError for a folder that is none of a run's."""
    path = Path(text)
    if not path.is_dir():
        raise ConfigError(f"RUN: {text} is not there; give the folder of a run, such as runs/quickstart/rl")
    if path.name == "rollouts" and rollout_files(path):
        path = path.parent
    if not any((path / name).exists() for name in ("run.json", "rollouts", "metrics.jsonl")):
        inside = sorted(file.parent.name for file in path.glob("*/run.json"))
        way_out = f"give one of those in it: {', '.join(inside)}" if inside else "give a folder that diffrl train made"
        raise ConfigError(f"RUN: {text} is not the folder of a run (no run.json, rollouts or metrics.jsonl); {way_out}")
    if tokenizer is not None and not (Path(tokenizer) / "tokenizer.json").is_file():
        raise ConfigError(f"--tokenizer: {tokenizer} has no tokenizer.json; give a Hugging Face folder")
    return Run(path, Path(tokenizer) if tokenizer is not None else None)
