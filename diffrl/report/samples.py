"""Rollouts for a reader: the best, a typical and the worst of the last step, and a typical one of the first."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffrl.board.reading import read_rows, token_texts
from diffrl.report.runs import ReportRun

KINDS = ("best", "typical", "worst")
FIRST = "typical, first step"
MAX_TOKENS = 1_500
MAX_PROMPT = 3_000  # characters
LEVELS = 10  # of colour
COLUMNS = (
    *("step", "problem_id", "prompt", "completion", "completion_ids", "num_tokens", "step_map", "probability"),
    *("statuses", "reward", "low_trust", "detail", "ordinal", "sample_index"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """Token(text=" return", level=4, step=13, probability=0.93): `level` from 0, revealed first, to LEVELS - 1."""

    text: str
    level: int
    step: int  # of the denoising, from 1
    probability: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Sample(kind="best", step=39, place="ordinal 313, sample 2", problem="sum/3", prompt="Write f...", reward=2.5,
    verdict="passed 4", tokens=(Token(...),), num_steps=15, text="...", detail="", left_out=0)"""

    kind: str
    step: int  # of the run, from 0
    place: str
    problem: str
    prompt: str
    reward: float
    verdict: str
    tokens: tuple[Token, ...]  # none without a tokenizer: then there is `text` alone
    num_steps: int  # of the denoising that revealed something
    text: str
    detail: str
    left_out: int  # tokens that are too many to be shown


def chosen_rows(reward: np.ndarray, length: np.ndarray) -> dict[str, int]:
    """Kind -> place among judged rollouts, each another one: highest and lowest reward, and the one nearest to the medians of
    reward, then of length."""
    chosen: dict[str, int] = {}
    far = np.lexsort((np.abs(length - np.median(length)), np.abs(reward - np.median(reward))))
    orders = {"best": np.argsort(-reward, kind="stable"), "worst": np.argsort(reward, kind="stable"), "typical": far}
    for kind, order in orders.items():
        place = next((int(row) for row in order if int(row) not in chosen.values()), None)
        if place is not None:
            chosen[kind] = place
    return {kind: chosen[kind] for kind in KINDS if kind in chosen}


def samples_of(run: ReportRun) -> list[Sample]:
    """Of steps whose file cannot be read, none."""
    snapshot, found = run.run.snapshot, []
    columns = snapshot.columns
    steps = snapshot.steps
    wanted: list[tuple[int, tuple[str, ...]]] = [] if not len(steps) else [(int(steps[-1]), KINDS)]
    if len(steps) > 1:
        wanted.append((int(steps[0]), ("typical",)))
    for step, kinds in wanted:
        rows = np.flatnonzero((columns["step"] == step) & np.isfinite(columns["reward"]))
        if not len(rows):
            continue
        chosen = chosen_rows(columns["reward"][rows], columns["length"][rows])
        for kind in (kind for kind in kinds if kind in chosen):
            row = int(rows[chosen[kind]])
            try:
                (read,) = read_rows(snapshot.files[int(columns["file"][row])], [int(columns["row"][row])], COLUMNS)
            except ValueError as error:
                run.unreadable.append(str(error))
                continue
            found.append(sample_of(run, kind if step == wanted[0][0] else FIRST, step, read))
    return found


def sample_of(run: ReportRun, kind: str, step: int, row: dict[str, Any]) -> Sample:
    tokens = tokens_of(run, row)
    statuses = Counter(row.get("statuses") or ())
    prompt = str(row.get("prompt") or "")
    return Sample(
        kind=kind,
        step=step,
        place=f"ordinal {row.get('ordinal')}, sample {row.get('sample_index')}",
        problem=str(row.get("problem_id") or ""),
        prompt=prompt if len(prompt) <= MAX_PROMPT else f"{prompt[:MAX_PROMPT]} ... ({len(prompt) - MAX_PROMPT} more)",
        reward=float(row.get("reward") or 0.0),
        verdict=", ".join(
            [*(f"{name} {n}" for name, n in statuses.items()), *["low trust"] * bool(row.get("low_trust"))]
        ),
        tokens=tokens[:MAX_TOKENS],
        num_steps=len({token.step for token in tokens}),
        text=str(row.get("completion") or "")[: 8 * MAX_TOKENS],
        detail=str(row.get("detail") or "")[:500],
        left_out=max(0, len(tokens) - MAX_TOKENS),
    )


def tokens_of(run: ReportRun, row: dict[str, Any]) -> tuple[Token, ...]:
    """Up to the end token; those of one denoising step have one colour."""
    tokenizer, steps = run.run.tokenizer(), row.get("step_map")
    ids: Sequence[int] = (row.get("completion_ids") or [])[: row.get("num_tokens")]
    if tokenizer is None or not ids or steps is None or len(steps) < len(ids):
        return ()
    chances = row.get("probability") or []
    ranks = {step: rank for rank, step in enumerate(sorted(set(steps[: len(ids)])))}
    return tuple(
        Token(
            text=text,
            level=ranks[step] * (LEVELS - 1) // max(1, len(ranks) - 1),
            step=step + 1,
            probability=float(chances[place]) if place < len(chances) and np.isfinite(chances[place]) else None,
        )
        for place, (text, step) in enumerate(zip(token_texts(tokenizer, ids), steps, strict=False))
    )
