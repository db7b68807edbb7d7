"""Questions about one or two runs, answered as what JSON can hold. Raises ValueError for a question that makes no sense and
LookupError for what is not there."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from diffrl.board.index import VERDICTS, Snapshot
from diffrl.board.orders import AR_NESS, NUM_BINS, SAMPLES_PER_STEP
from diffrl.board.query import Query, finite, integer, page, row_of
from diffrl.board.reading import floats, read_rows, token_texts
from diffrl.board.run import Run
from diffrl.board.suspicion import HEURISTICS
from diffrl.errors import shown

MAX_TEXT = 100_000  # characters of a text, unless all are asked for
MAX_TOKENS = 8_192
MAX_PROBLEM_ROWS = 400
MAX_MAP_STEPS = 200
POLL_S = 1.0
FULL = (
    *(
        "step",
        "ordinal",
        "sample_index",
        "problem_id",
        "family",
        "prompt",
        "completion",
        "completion_ids",
        "num_tokens",
    ),
    *(
        "step_map",
        "probability",
        "statuses",
        "reward",
        "format",
        "pass_rate",
        "advantage",
        "valid",
        "low_trust",
        "seed",
    ),
    *("policy_version", "cpu_s", "detail", "tests", "details"),
)


class Board:
    """`answer("rollouts", {"run": "0", "verdict": "failed"})`; `start` follows the runs in a thread."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        self.answers: Mapping[str, Callable[[Query], Any]] = {
            "state": self.state,
            "metrics": self.metrics,
            "rollouts": self.rollouts,
            "rollout": self.rollout,
            "problems": self.problems,
            "problem": self.problem,
            "orders": self.orders,
            "pairs": self.pairs,
            "pair": self.pair,
        }
        self.ended = threading.Event()
        self.failure: str | None = None  # of the thread that follows

    def start(self) -> None:
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self) -> None:
        """What is new is read at once; texts are looked at between, a file at a time."""
        try:
            while not self.ended.is_set():
                began = time.monotonic()
                with suppress(OSError):  # a folder that is moved away while it is read
                    self.turn(began + POLL_S)
                self.ended.wait(max(0.0, POLL_S - (time.monotonic() - began)))
        except Exception as error:
            self.failure = (
                f"the board has stopped following the run ({error!r}): start it again, and please report this"
            )
            raise

    def turn(self, until: float) -> None:
        for run in self.runs:
            run.refresh()
        while time.monotonic() < until and not self.ended.is_set() and any(run.scan() for run in self.runs):
            pass

    def close(self) -> None:
        self.ended.set()

    def answer(self, name: str, query: Query) -> Any:
        if name not in self.answers:
            raise LookupError(f"api: there is no {shown(name)}; known: {', '.join(self.answers)}")
        return self.answers[name](query)

    def run_of(self, query: Query) -> Run:
        number = integer(query, "run", 0)
        if not 0 <= number < len(self.runs):
            raise ValueError(f"run: {number} must be one of {', '.join(map(str, range(len(self.runs))))}")
        return self.runs[number]

    def state(self, query: Query) -> dict[str, Any]:
        runs = [
            {
                "name": str(run.path),
                "version": f"{run.snapshot.version}.{run.series.version}",
                "rollouts": run.snapshot.num_rows,
                "problems": len(run.problems),
                "steps": len(run.snapshot.steps),
                "last_step": int(run.snapshot.steps[-1]) if len(run.snapshot.steps) else None,
                "files": run.num_files,
                "read": len(run.chunks) + len(run.bad),
                "unscanned": run.pending(),
                "notes": [*([self.failure] if self.failure else []), *run.notes],
                **run.facts,
            }
            for run in self.runs
        ]
        return {"runs": runs, "verdicts": VERDICTS, "heuristics": [asdict(heuristic) for heuristic in HEURISTICS]}

    def metrics(self, query: Query) -> dict[str, Any]:
        """Names of all runs' metrics, and the curves asked for, of every run."""
        names = [name for name in query.get("names", "").split(",") if name]
        known = sorted({name for run in self.runs for name in run.series.names})
        return {"names": known, "runs": [run.series.curves(names) for run in self.runs]}

    def rollouts(self, query: Query) -> dict[str, Any]:
        return page(self.run_of(query).snapshot, query)

    def rollout(self, query: Query) -> dict[str, Any]:
        """One completion in full and its siblings. `whole=1`: texts of any length."""
        run = self.run_of(query)
        step, ordinal, sample = (integer(query, name, -1) for name in ("step", "ordinal", "sample"))
        snapshot = run.snapshot
        rows = snapshot.find(step, ordinal)
        (own,) = np.flatnonzero(snapshot.columns["sample"][rows] == sample)[:1].tolist() or [None]
        if own is None:
            raise LookupError(f"rollout: step {step}, group {ordinal} has no sample {sample}; go back to the table")
        limit = None if query.get("whole") else MAX_TEXT
        texts = read_group(snapshot, rows)
        siblings = [
            row_of(snapshot, int(row)) | {"completion": clip(text.get("completion"), MAX_TEXT // 10)}
            for row, text in zip(rows, texts, strict=True)
        ]
        return {
            "row": siblings[own] | full(run, texts[own], limit),
            "siblings": siblings,
            "weights": run.reward_weights,
            "neighbours": self.neighbours(snapshot, query, int(rows[own])),
        }

    def neighbours(self, snapshot: Snapshot, query: Query, row: int) -> dict[str, str | None]:
        """Keys of the rollouts before and behind it in the order of the index."""
        there = {"previous": row - 1, "next": row + 1}
        return {k: row_of(snapshot, n)["key"] if 0 <= n < snapshot.num_rows else None for k, n in there.items()}

    def problems(self, query: Query) -> dict[str, Any]:
        """All problems with number of rollouts, mean reward, first and last step; `problem` is part of the name."""
        snapshot = self.run_of(query).snapshot
        columns, size = snapshot.columns, len(snapshot.problems)
        codes, judged = columns["problem"], np.isfinite(columns["reward"])
        count = np.bincount(codes, minlength=size)
        num_judged = np.bincount(codes[judged], minlength=size)
        total = np.bincount(codes[judged], columns["reward"][judged].astype(np.float64), size)
        solved = np.bincount(codes[columns["verdict"] == 0], minlength=size)
        part = query.get("problem", "").casefold()
        found = [n for n, name in enumerate(snapshot.problems[:size]) if part in name.casefold() and count[n]]
        keys = {"count": count, "reward": total / np.maximum(num_judged, 1), "solved": solved / np.maximum(count, 1)}
        sort = query.get("sort") or "count"
        values = keys.get(sort)
        sign = 1 if query.get("dir") == "asc" else -1
        found.sort(key=lambda n: (sign * float(values[n]) if values is not None else 0.0, snapshot.problems[n]))
        size_ = 50
        number = max(1, integer(query, "page", 1))
        rows = [
            {
                "problem": snapshot.problems[n],
                "count": int(count[n]),
                "reward": finite(float(keys["reward"][n])) if num_judged[n] else None,
                "solved": round(float(keys["solved"][n]), 4),
            }
            for n in found[(number - 1) * size_ : number * size_]
        ]
        return {"total": len(found), "page": number, "num_pages": max(1, -(-len(found) // size_)), "rows": rows}

    def problem(self, query: Query) -> dict[str, Any]:
        """A problem's completions over time, the newest steps' where there are very many."""
        run = self.run_of(query)
        snapshot, name = run.snapshot, query.get("id", "")
        if name not in run.codes:
            raise LookupError(f"problem: {shown(name)} has no rollouts in this run; choose one from the list")
        rows = np.flatnonzero(snapshot.columns["problem"] == run.codes[name])
        steps, inverse = np.unique(snapshot.columns["step"][rows], return_inverse=True)
        reward = snapshot.columns["reward"][rows].astype(np.float64)
        judged = np.isfinite(reward)
        total = np.bincount(inverse[judged], reward[judged], len(steps))
        count = np.bincount(inverse[judged], minlength=len(steps))
        mean = [finite(t / c) if c else None for t, c in zip(total, count, strict=True)]
        order = np.lexsort((snapshot.columns["sample"][rows], -snapshot.columns["step"][rows]))
        kept = rows[order][:MAX_PROBLEM_ROWS]
        texts = read_group(snapshot, kept, ("prompt", "completion"))
        found = [
            row_of(snapshot, int(row)) | {"completion": clip(text.get("completion"), MAX_TEXT // 20)}
            for row, text in zip(kept, texts, strict=True)
        ]
        prompt = clip(texts[0].get("prompt"), MAX_TEXT) if texts else None
        curve = {"x": steps.tolist(), "y": mean}
        return {"problem": name, "prompt": prompt, "total": len(rows), "curve": curve, "rows": found}

    def orders(self, query: Query) -> dict[str, Any]:
        run = self.run_of(query)
        found = [order for _, order in sorted(run.orders.items())]
        stride = max(1, -(-len(found) // MAX_MAP_STEPS))
        kept = found[::stride]
        return {
            "steps": [order.step for order in kept],
            "when": [order.when for order in kept],
            "ar_ness": {name: [order.ar_ness[n] for order in kept] for n, (name, _, _) in enumerate(AR_NESS)},
            "num_bins": NUM_BINS,
            "samples_per_step": SAMPLES_PER_STEP,
            "stride": stride,
            "unscanned": run.pending(),
        }

    def pairs(self, query: Query) -> dict[str, Any]:
        """Steps and problems that both runs sampled, with mean rewards; the largest differences first."""
        first, second = self.both()
        means = [group_means(run.snapshot, run.problems) for run in (first, second)]
        part = query.get("problem", "").casefold()
        common = [key for key in means[0].keys() & means[1].keys() if part in key[1].casefold()]
        rows = [
            {"step": step, "problem": problem, "first": means[0][step, problem], "second": means[1][step, problem]}
            for step, problem in common
        ]
        rows.sort(key=lambda row: (-abs((row["first"] or 0) - (row["second"] or 0)), row["step"], row["problem"]))
        number, size = max(1, integer(query, "page", 1)), 25
        shown_rows = rows[(number - 1) * size : number * size]
        return {"total": len(rows), "page": number, "num_pages": max(1, -(-len(rows) // size)), "rows": shown_rows}

    def pair(self, query: Query) -> dict[str, Any]:
        """Completions of one problem at one step in both runs, sample by sample."""
        step, name = integer(query, "step", -1), query.get("problem", "")
        sides = []
        for run in self.both():
            snapshot, code = run.snapshot, run.codes.get(name, -1)
            columns = snapshot.columns
            rows = np.flatnonzero((columns["step"] == step) & (columns["problem"] == code))[:MAX_PROBLEM_ROWS]
            rows = rows[np.lexsort((columns["sample"][rows], columns["ordinal"][rows]))]
            texts = read_group(snapshot, rows, ("prompt", "completion"))
            prompt = clip(texts[0].get("prompt"), MAX_TEXT) if texts else None
            found = [
                row_of(snapshot, int(row)) | {"completion": clip(text.get("completion"), MAX_TEXT // 10)}
                for row, text in zip(rows, texts, strict=True)
            ]
            sides.append({"prompt": prompt, "rows": found})
        if not any(side["rows"] for side in sides):
            raise LookupError(f"pair: neither run has rollouts of {shown(name)} at step {step}")
        return {"step": step, "problem": name, "sides": sides}

    def both(self) -> tuple[Run, Run]:
        if len(self.runs) != 2:
            raise LookupError("compare: this board shows one run; start it with two: diffrl board RUN RUN2")
        return self.runs[0], self.runs[1]


def group_means(snapshot: Snapshot, problems: Sequence[str]) -> dict[tuple[int, str], float | None]:
    """(step, problem) -> mean reward; remembered with the snapshot."""
    if (known := snapshot.caches.get("group means")) is not None:
        assert isinstance(known, dict)
        return known
    columns = snapshot.columns
    keys = columns["step"].astype(np.int64) << 32 | columns["problem"]
    unique, inverse = np.unique(keys, return_inverse=True)
    judged = np.isfinite(columns["reward"])
    total = np.bincount(inverse[judged], columns["reward"][judged].astype(np.float64), len(unique))
    count = np.bincount(inverse[judged], minlength=len(unique))
    found = {
        (int(key >> 32), problems[int(key & 0xFFFFFFFF)]): finite(t / c) if c else None
        for key, t, c in zip(unique, total, count, strict=True)
    }
    snapshot.caches["group means"] = found
    return found


def read_group(snapshot: Snapshot, rows: np.ndarray, columns: Sequence[str] = FULL) -> list[dict[str, Any]]:
    """Rows of a snapshot from their files, in the order given."""
    found: dict[int, dict[str, Any]] = {}
    files = snapshot.columns["file"][rows]
    for file in np.unique(files):
        own = rows[files == file]
        texts = read_rows(snapshot.files[file], snapshot.columns["row"][own].tolist(), columns)
        found |= dict(zip(own.tolist(), texts, strict=True))
    return [found[int(row)] for row in rows]


def full(run: Run, text: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    completion = text.get("completion")
    kept = {name: text.get(name) for name in ("family", "statuses", "policy_version", "num_tokens")}
    numbers = {name: json_float(text.get(name)) for name in ("reward", "format", "pass_rate", "advantage", "cpu_s")}
    seed = text.get("seed")
    return {
        **kept,
        **numbers,
        "seed": None if seed is None else str(seed),  # 64 bits: more than a number of JavaScript holds
        "valid": text.get("valid", True),
        "prompt": clip(text.get("prompt"), limit),
        "detail": clip(text.get("detail"), limit),
        "tests": [clip(test, limit) for test in text.get("tests") or ()],
        "details": [clip(line, limit) for line in text.get("details") or ()],
        "completion": clip(completion, limit),
        "num_characters": None if completion is None else len(completion),
        "tokens": tokens_of(run, text),
    }


def tokens_of(run: Run, text: Mapping[str, Any]) -> dict[str, Any] | None:
    """Texts, ids, denoising step and probability of every token up to the end token; None where they were not recorded."""
    ids, steps = text.get("completion_ids"), text.get("step_map")
    if ids is None or steps is None or len(ids) != len(steps):
        return None
    length = text.get("num_tokens")
    size = min(len(ids) if length is None else max(0, length), MAX_TOKENS)
    tokenizer = run.tokenizer()
    texts = token_texts(tokenizer, ids[:size]) if tokenizer is not None else None
    probability = floats(text.get("probability"))[:size]
    return {
        "ids": ids[:size],
        "texts": None if texts is None else [clip(t, 1_000) for t in texts],
        "steps": steps[:size],
        "probability": probability if len(probability) == size else None,
        "window": len(ids),
    }


def json_float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def clip(text: str | None, limit: int | None) -> str | None:
    return text if text is None or limit is None else text[:limit]
