"""The hostile and odd programs of tests/sandbox/attacks against every backend (`any_sandbox`).

After each of them the same warm sandbox must judge a right and a wrong program of ours as they are, and nothing that
was judged may still run or lie about.
"""

import os
import time
from pathlib import Path

import pytest

from sandbox.process import ProcessSandbox
from sandbox.types import Sandbox, Submission, TestStatus, Verdict
from tests.sandbox.attacks import ATTACKS
from tests.sandbox.attacks.attack import ALIVE, NO_TRACE, ROOM, SQUARE, Attack

_CANARY = """
import collections, fractions, json, os, sys, tempfile
left = [name for folder in (".", "/tmp", "/dev/shm") for name in os.listdir(folder)] + list(os.environ)
assert json.loads(json.dumps([1])) == [1] and fractions.Fraction(1, 2) == 0.5 and os.getcwd() not in sys.path
for folder in (".", "/tmp", "/dev/shm"): tempfile.TemporaryFile(dir=folder).close()
def f(x): return left or x * x + {error}
"""


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_programs_get_what_they_deserve_and_leave_nothing(any_sandbox: Sandbox, attack: Attack) -> None:
    for _ in range(attack.runs):
        started = time.monotonic()
        verdict = judge(any_sandbox, attack)
        took_s = time.monotonic() - started
        assert pass_rate(verdict) in attack.accept, (attack.property, verdict)
        assert verdict.trust == attack.trust, (attack.property, verdict)
        assert attack.status is None or {*verdict.statuses} == {attack.status}, verdict
        assert all(map(str.isprintable, verdict.details)), verdict.details  # they go to files, terminals and reports
        bound_s = 2 * attack.limits.wall_s + attack.limits.cpu_s * len(attack.tests)
        assert took_s < 10 * bound_s, (ALIVE, took_s)
        assert_clean(any_sandbox)


def test_names_are_unique() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 100


def assert_clean(sandbox: Sandbox) -> None:
    for error, rate in ((0, 1), (1, 0)):
        code = _CANARY.format(error=error)
        canary = Attack(name="canary", property=NO_TRACE, code=code, accept=(rate,), tests=SQUARE, limits=ROOM)
        verdict = judge(sandbox, canary)
        assert pass_rate(verdict) == rate, (NO_TRACE, verdict)
    assert sandbox.survivors() == []
    if isinstance(sandbox, ProcessSandbox):
        assert children_of_zygotes() == []


def judge(sandbox: Sandbox, attack: Attack) -> Verdict:
    return sandbox.judge(
        Submission(
            id=attack.name,
            code=attack.code,
            tests=attack.tests,
            mode=attack.mode,
            entry_point=attack.entry_point,
            setup=attack.setup,
            limits=attack.limits,
        )
    )


def pass_rate(verdict: Verdict) -> float:
    return round(verdict.statuses.count(TestStatus.PASSED) / len(verdict.statuses), 4)


def children_of_zygotes() -> list[str]:
    """What a look from outside finds: bwrap is a child of this process, a zygote is a child of bwrap."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = path.read_text().split(" (", 1)
        except OSError:  # it ended meanwhile
            continue
        name, _, fields = rest.rpartition(") ")
        names[int(pid)], parents[int(pid)] = name, int(fields.split()[1])
    bwraps = {pid for pid, parent in parents.items() if parent == os.getpid() and names[pid] == "bwrap"}
    zygotes = {pid for pid, parent in parents.items() if parent in bwraps}
    return [f"{names[pid]} {pid}" for pid, parent in parents.items() if parent in zygotes]
