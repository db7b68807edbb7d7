"""What a client and the supervisor of a container say to each other: length-prefixed JSON frames (see frames.py).

The supervisor speaks first:   {"hello": {"slots", "python", "challenge"}}
a client proves its token:     {"proof": hex, "challenge": hex}, answered by {"welcome": proof of the supervisor}
then, in any order, each with a number that its answer repeats:
  {"id", "op": "judge", "submission": {...}}  -> {"id", "verdict": {...}}
  {"id", "op": "stats"}                       -> {"id", "stats": {...}}
  {"id", "op": "left"}                        -> {"id", "left": [what judged programs left behind]}
and where it could not be done              -> {"id", "error": text}, with "refused": true from one that is full or leaves

On the standard streams of a container there is no token and no welcome: `challenge` is null. The token itself never
crosses the wire: a proof is HMAC-SHA256 of the other side's challenge.
"""

import hmac
from dataclasses import asdict, fields
from typing import Any

from sandbox.types import Limits, Submission, TestMode, TestStatus, Verdict

MAX_HANDSHAKE = 4096  # bytes of a frame from a client that has not proved its token

_LARGEST = {"cpu_s": 3600.0, "wall_s": 7200.0, "memory_mb": 1 << 20, "output_kb": 1 << 15, "max_processes": 1024}


def proof(token: str, challenge: str, who: str) -> str:
    """What only a holder of the token can say to this challenge. `who`: client or supervisor, so that neither echoes."""
    return hmac.new(token.encode(), f"{who}:{challenge}".encode(), "sha256").hexdigest()


def submission_to_wire(submission: Submission) -> dict[str, Any]:
    return asdict(submission)


def submission_from_wire(wire: Any) -> Submission:
    """Raises ValueError that names the field."""
    wire = _object(wire, "submission", {field.name for field in fields(Submission)})
    limits = _object(wire["limits"], "limits", set(_LARGEST))
    for name, largest in _LARGEST.items():
        value = limits[name]
        if type(value) not in (int, float) or not 0 < value <= largest:
            raise ValueError(f"limits.{name} is {value!r}: give a number above 0, at most {largest:g}")
    tests = wire["tests"]
    if type(tests) is not list or not all(type(test) is str for test in tests):
        raise ValueError("tests: give a list of strings")
    for name in ("id", "code", "setup"):
        if type(wire[name]) is not str:
            raise ValueError(f"{name}: give a string")
    if wire["entry_point"] is not None and type(wire["entry_point"]) is not str:
        raise ValueError("entry_point: give a string or null")
    if wire["mode"] not in list(TestMode):
        raise ValueError(f"mode is {wire['mode']!r}: choose from {', '.join(TestMode)}")
    return Submission(
        id=wire["id"],
        code=wire["code"],
        tests=tuple(tests),
        mode=TestMode(wire["mode"]),
        entry_point=wire["entry_point"],
        setup=wire["setup"],
        limits=Limits(**limits),
    )


def verdict_to_wire(verdict: Verdict) -> dict[str, Any]:
    return asdict(verdict)


def verdict_from_wire(wire: Any) -> Verdict:
    """Raises ValueError: what answers is no judge of this version."""
    wire = _object(wire, "verdict", {field.name for field in fields(Verdict)})
    return Verdict(
        id=wire["id"],
        statuses=tuple(map(TestStatus, wire["statuses"])),
        details=tuple(map(str, wire["details"])),
        beside=tuple(map(bool, wire["beside"])),
        cpu_s=float(wire["cpu_s"]),
    )


def _object(wire: Any, name: str, keys: set[str]) -> dict[str, Any]:
    if type(wire) is not dict or set(wire) != keys:
        raise ValueError(f"{name}: give an object with the fields {', '.join(sorted(keys))}")
    return wire
