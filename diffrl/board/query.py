"""Filtering, sorting and paging of a snapshot: the words of a URL's query to rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffrl.board.index import UNKNOWN_STALENESS, VERDICTS, Snapshot
from diffrl.board.suspicion import BITS, names_of
from diffrl.errors import one_of, shown

RANGES = ("step", "reward", "staleness", "length", "advantage")  # each with _min and _max
SORTS = ("step", "problem", "reward", "verdict", "staleness", "trust", "length", "advantage", "flags")
PAGE_SIZES = range(1, 201)
MAX_KEPT = 6  # orders of a snapshot, 4 bytes a row
Query = Mapping[str, str]


def number(query: Query, name: str, default: float | None = None) -> float | None:
    text = query.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value:
        raise ValueError(f"{name}: {shown(text)} must be a number")
    return value


def integer(query: Query, name: str, default: int) -> int:
    value = number(query, name, default)
    assert value is not None
    if value != value // 1 or abs(value) > 2**62:
        raise ValueError(f"{name}: {shown(query[name])} must be a whole number")
    return int(value)


def selected(snapshot: Snapshot, query: Query) -> np.ndarray:
    """Numbers of the rows that pass all filters. Raises ValueError for a filter that cannot be understood."""
    columns = snapshot.columns
    keep = np.ones(snapshot.num_rows, bool)
    for name in RANGES:
        low, high = number(query, f"{name}_min"), number(query, f"{name}_max")
        if low is not None:
            keep &= columns[name] >= low
        if high is not None:
            keep &= columns[name] <= high
        if name == "staleness" and (low is not None or high is not None):
            keep &= columns[name] != UNKNOWN_STALENESS
    if wanted := query.get("verdict"):
        for verdict in (names := wanted.split(",")):
            one_of("verdict", verdict, dict.fromkeys(VERDICTS))
        keep &= np.isin(columns["verdict"], [VERDICTS.index(verdict) for verdict in names])
    if trust := query.get("trust"):
        one_of("trust", trust, {"low": 1, "high": 0})
        keep &= columns["low_trust"] == (trust == "low")
    if flag := query.get("flag"):
        one_of("flag", flag, {"any": 255, **BITS})
        keep &= (columns["flags"] & BITS.get(flag, np.uint8(255))) > 0
    problems = snapshot.problems[:]  # grows meanwhile
    if (exact := query.get("problem_id")) is not None:
        keep &= columns["problem"] == (problems.index(exact) if exact in problems else -1)
    if part := query.get("problem", "").casefold():
        codes = np.array([part in problem.casefold() for problem in problems] or [False])
        keep &= codes[columns["problem"]]
    return np.flatnonzero(keep)


def ordered(snapshot: Snapshot, query: Query) -> np.ndarray:
    """The selected rows in the wanted order, NaN last; remembered for the pages that follow."""
    sort, direction = query.get("sort") or "step", query.get("dir") or "desc"
    one_of("sort", sort, dict.fromkeys(SORTS))
    one_of("dir", direction, {"asc": 0, "desc": 0})
    key = repr(sorted((name, value) for name, value in query.items() if name not in ("page", "size", "run") and value))
    if (known := snapshot.caches.get(key)) is not None:
        assert isinstance(known, np.ndarray)
        return known
    rows = selected(snapshot, query)
    rows = in_order(sort_keys(snapshot, sort)[rows], rows, falling=direction == "desc")
    if len(snapshot.caches) >= MAX_KEPT:
        snapshot.caches.clear()
    snapshot.caches[key] = rows
    return rows


def in_order(values: np.ndarray, rows: np.ndarray, *, falling: bool) -> np.ndarray:
    """Rows by their values (int32 or float32), NaN last, equal ones in their order: as a stable argsort, only faster.
    Value and place are packed into one integer each, and integers are sorted."""
    if values.dtype == np.float32:
        bits = (values + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
        keys = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))  # in the order of the floats
    else:
        keys = values.astype(np.int32)
    keys = ~keys if falling else keys
    if values.dtype == np.float32:
        keys = np.where(np.isnan(values), np.int32(0x7FFFFFFF), keys)
    packed = keys.astype(np.int64) << 32
    packed |= np.arange(len(rows))
    packed.sort()
    packed &= 0xFFFFFFFF
    return rows[packed].astype(np.int32)


def sort_keys(snapshot: Snapshot, sort: str) -> np.ndarray:
    columns = snapshot.columns
    if sort == "problem":
        problems = snapshot.problems[:]
        ranks = np.empty(len(problems) or 1, np.int32)
        ranks[sorted(range(len(problems)), key=problems.__getitem__)] = np.arange(len(problems))
        return ranks[columns["problem"]]
    name = {"trust": "low_trust"}.get(sort, sort)
    return columns[name] if columns[name].dtype.kind == "f" else columns[name].astype(np.int32)


def page(snapshot: Snapshot, query: Query) -> dict[str, Any]:
    size = integer(query, "size", 50)
    if size not in PAGE_SIZES:
        raise ValueError(f"size: {size} must be from {PAGE_SIZES.start} to {PAGE_SIZES.stop - 1}")
    rows = ordered(snapshot, query)
    num_pages = max(1, -(-len(rows) // size))
    number_ = min(max(1, integer(query, "page", 1)), num_pages)
    shown_rows = rows[(number_ - 1) * size : number_ * size]
    return {
        "total": len(rows),
        "page": number_,
        "num_pages": num_pages,
        "rows": [row_of(snapshot, int(row)) for row in shown_rows],
    }


def row_of(snapshot: Snapshot, row: int) -> dict[str, Any]:
    at = {name: column[row].item() for name, column in snapshot.columns.items()}
    return {
        "key": f"{at['step']}/{at['ordinal']}/{at['sample']}",
        "step": at["step"],
        "problem": snapshot.problems[at["problem"]],
        "sample": at["sample"],
        "reward": finite(at["reward"]),
        "pass_rate": finite(at["pass_rate"]),
        "advantage": finite(at["advantage"]),
        "verdict": VERDICTS[at["verdict"]],
        "staleness": None if at["staleness"] == UNKNOWN_STALENESS else at["staleness"],
        "trust": "low" if at["low_trust"] else "high",
        "length": None if at["length"] < 0 else at["length"],
        "flags": names_of(at["flags"]),
    }


def finite(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None
