"""Work spreads over pods as they come, fill up, leave, go silent and return; here they are fakes, see fake_pods.py. Real
ones: test_pods_real.py."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from sandbox import backends, pods
from sandbox.backends import BackendOptions
from sandbox.client import ConnectionLostError
from sandbox.pods import PodPool, require_available, resolve
from sandbox.pool import SandboxClosedError
from sandbox.types import SandboxError, SandboxUnavailableError, Submission, TestStatus, Verdict
from tests.sandbox.fake_pods import TOKEN, WAIT_S, FakePod, until

PASSED = TestStatus.PASSED
NAME = "sandbox-pods:7010"


class Names:
    """A resolver whose answers change."""

    def __init__(self, *found: FakePod) -> None:
        self.pods = list(found)
        self.asked = 0
        self.broken = False

    def __call__(self, address: str) -> list[str]:
        assert address == NAME
        self.asked += 1
        if self.broken:
            raise OSError(-2, "Name or service not known")
        return [pod.at for pod in self.pods]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes milliseconds here."""
    for name, seconds in {"_RESOLVE_S": 0.1, "_BEAT_S": 0.05, "_REST_S": 0.1, "_START_S": 1.0}.items():
        monkeypatch.setattr(pods, name, seconds)


@pytest.fixture
def make() -> Iterator[Callable[..., FakePod]]:
    made: list[FakePod] = []

    def pod(**options: object) -> FakePod:
        made.append(FakePod(**options))  # pyright: ignore[reportArgumentType]
        return made[-1]

    yield pod
    for one in made:
        one.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as threads:
        yield threads


def pool_of(names: Names, slots: int = 8, attempts: int = 1, say: Callable[[str], None] = pytest.fail) -> PodPool:
    return PodPool([NAME], TOKEN, slots, attempts=attempts, say=say, resolver=names)


def program(id_: object) -> Submission:
    return Submission(id=str(id_), code="", tests=("assert True",))


def held_by(*found: FakePod) -> list[int]:
    return [len(pod.held) for pod in found]


def open_gates(*found: FakePod) -> None:
    for pod in found:
        pod.gate.set()


def close_gates(*found: FakePod) -> None:
    for pod in found:
        pod.gate.clear()


def send(threads: ThreadPoolExecutor, pool: PodPool, ids: range) -> list[Future[Verdict]]:
    return [threads.submit(pool.judge, program(i)) for i in ids]


def results(futures: list[Future[Verdict]]) -> list[tuple[TestStatus, ...]]:
    return [future.result(WAIT_S).statuses for future in futures]


def both_get_work(pool: PodPool, threads: ThreadPoolExecutor, a: FakePod, b: FakePod) -> None:
    close_gates(a, b)
    futures = send(threads, pool, range(8))
    until(lambda: held_by(a, b) == [4, 4])
    open_gates(a, b)
    assert results(futures) == [(PASSED,)] * 8


# Spreading


def test_work_is_spread_evenly_and_never_exceeds_the_slots(make: Callable[..., FakePod], threads) -> None:
    a, b, c = make(), make(), make()
    close_gates(a, b, c)
    with pool_of(Names(a, b, c), slots=9) as pool:
        assert (pool.name, pool.slots) == ("pod", 9)
        futures = send(threads, pool, range(12))
        until(lambda: held_by(a, b, c) == [3, 3, 3])
        assert pool.stats().busy == 9 and pool.stats().waiting == 3
        open_gates(a, b, c)
        assert results(futures) == [(PASSED,)] * 12


def test_a_pod_that_has_work_from_others_gets_less(make: Callable[..., FakePod], threads) -> None:
    a, b = make(slots=4), make(slots=4)
    a.others = 4
    close_gates(a, b)
    with pool_of(Names(a, b)) as pool:
        futures = send(threads, pool, range(4))
        until(lambda: held_by(a, b) == [0, 4])
        more = send(threads, pool, range(4, 8))
        until(lambda: held_by(a, b) == [2, 6])
        open_gates(a, b)
        assert results(futures + more) == [(PASSED,)] * 8


def test_a_new_pod_gets_what_waits(make: Callable[..., FakePod], threads) -> None:
    """A pod of two slots has at most four; the name leads to a second one while they are judged."""
    a, b = make(), make()
    close_gates(a, b)
    names = Names(a)
    with pool_of(names, slots=16) as pool:
        futures = send(threads, pool, range(8))
        until(lambda: held_by(a, b) == [4, 0])
        names.pods.append(b)
        until(lambda: held_by(a, b) == [4, 4])
        open_gates(a, b)
        assert results(futures) == [(PASSED,)] * 8


def test_a_new_pod_that_judges_the_canary_wrongly_gets_nothing(make: Callable[..., FakePod], threads) -> None:
    a, b = make(), make()
    b.lies = True
    names = Names(a)
    with pool_of(names) as pool:
        names.pods.append(b)
        until(lambda: len(b.greeted) >= 2)
        assert results(send(threads, pool, range(8))) == [(PASSED,)] * 8
        assert b.judged == []


def test_a_full_pod_leaves_its_work_to_others_at_no_charge(make: Callable[..., FakePod], threads) -> None:
    a, b = make(), make()
    with pool_of(Names(a, b)) as pool:
        a.full = True
        assert results(send(threads, pool, range(16))) == [(PASSED,)] * 16
        assert a.judged == [] and pool.stats().errors == {} and pool.stats().restarts == 0
        a.full, b.full = False, True
        assert results(send(threads, pool, range(4))) == [(PASSED,)] * 4


def test_while_all_are_full_submissions_wait(make: Callable[..., FakePod], threads) -> None:
    a = make()
    with pool_of(Names(a)) as pool:
        a.full = True
        futures = send(threads, pool, range(4))
        until(lambda: pool.stats().waiting == 4)
        a.full = False
        assert results(futures) == [(PASSED,)] * 4


# Leaving


@pytest.mark.parametrize("how", ["drains", "named no more"])
def test_a_pod_that_leaves_gets_nothing_new_and_ends_what_it_has(
    how: str, make: Callable[..., FakePod], threads
) -> None:
    a, b = make(), make()
    names = Names(a, b)
    close_gates(a, b)
    with pool_of(names) as pool:
        accepted = send(threads, pool, range(4))
        until(lambda: held_by(a, b) == [2, 2])
        if how == "drains":
            a.draining = True
        else:
            names.pods.remove(a)
            asked = names.asked
            until(lambda: names.asked >= asked + 2)
        b.gate.set()
        assert results(send(threads, pool, range(4, 12))) == [(PASSED,)] * 8
        assert len(a.judged) == 2 and a.connections == 1  # what it accepted is awaited
        a.gate.set()
        assert results(accepted) == [(PASSED,)] * 4
        until(lambda: a.connections == 0)
        assert pool.stats().errors == {} and pool.stats().restarts == 0


def test_a_pod_that_comes_back_gets_work_again(make: Callable[..., FakePod], threads) -> None:
    a, b = make(), make()
    names = Names(a, b)
    with pool_of(names) as pool:
        names.pods.remove(a)
        until(lambda: a.connections == 0)
        names.pods.append(a)
        both_get_work(pool, threads, a, b)


def test_a_name_that_does_not_resolve_for_a_while_keeps_its_pods(make: Callable[..., FakePod], threads) -> None:
    a, b = make(), make()
    names = Names(a, b)
    with pool_of(names) as pool:
        names.broken = True
        asked = names.asked
        until(lambda: names.asked >= asked + 3)
        both_get_work(pool, threads, a, b)


# Loss


@pytest.mark.parametrize("how", ["silent", "hangs up"])
def test_what_a_lost_pod_had_is_judged_by_others(
    how: str, make: Callable[..., FakePod], threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is charged with an attempt, since it may have broken the pod."""
    monkeypatch.setattr(pods, "LOST_S", 3)
    a, b = make(), make()
    close_gates(a)
    with pool_of(Names(a, b), attempts=2) as pool:
        futures = send(threads, pool, range(8))
        until(lambda: held_by(a, b)[0] >= 2)
        a.mute = True
        if how == "hangs up":
            a.hang_up()
        assert results(futures) == [(PASSED,)] * 8
        assert pool.stats().restarts >= 1 and pool.stats().errors["ConnectionLostError"] >= 1


@pytest.mark.parametrize("how", ["silent", "hangs up"])
def test_a_submission_that_breaks_every_pod_ends(how: str, make: Callable[..., FakePod], monkeypatch) -> None:
    monkeypatch.setattr(pods, "LOST_S", 3)
    found = [make(), make(), make()]
    close_gates(*found)
    with pool_of(Names(*found), attempts=2) as pool, ThreadPoolExecutor(1) as threads:
        future = threads.submit(pool.judge, program("bad"))
        for _ in range(2):
            until(lambda: any(pod.held for pod in found if not pod.mute))
            broken = next(pod for pod in found if pod.held and not pod.mute)
            broken.mute = True
            if how == "hangs up":
                broken.hang_up()
        assert isinstance(future.exception(WAIT_S), ConnectionLostError)
        assert sum(pod.judged == ["bad"] for pod in found) == 2


def test_a_dead_pod_is_tried_again_after_rests_that_grow(make: Callable[..., FakePod], threads) -> None:
    a, b = make(), make()
    b.lies = True  # every attempt ends with the canary
    with pool_of(Names(a, b), say=lambda text: None) as pool:
        until(lambda: len(b.greeted) == 5)
        rests = [later - earlier for earlier, later in zip(b.greeted, b.greeted[1:], strict=False)]
        assert all(rest >= least for rest, least in zip(rests, (0.1, 0.2, 0.4, 0.8), strict=True))
        b.lies = False
        both_get_work(pool, threads, a, b)


def test_without_any_pod_for_a_while_those_who_wait_get_an_error_and_never_a_verdict(
    make: Callable[..., FakePod], threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pods, "_ALONE_S", 0.5)
    a, b = make(), make()
    names = Names(a)
    with pool_of(names) as pool:
        a.close()
        for future in send(threads, pool, range(4)):
            error = future.exception(WAIT_S)
            assert isinstance(error, SandboxError)
        with pytest.raises(SandboxUnavailableError, match=rf"no sandbox at {NAME} \(nothing listens at {a.at}"):
            pool.judge(program("late"))
        names.pods.append(b)
        until(lambda: b.connections == 1)
        assert pool.judge(program("later")).statuses == (PASSED,)


# Errors at the start


def test_an_endpoint_that_is_down(make: Callable[..., FakePod]) -> None:
    down = make()
    down.close()
    wrong = (
        rf"^addresses: no sandbox at {NAME} \(nothing listens at {down.at}.*start one there, or give another host:port"
    )
    with pytest.raises(SandboxUnavailableError, match=wrong):
        require_available([NAME], TOKEN, pytest.fail, Names(down))
    with pytest.raises(SandboxUnavailableError, match=wrong):
        pool_of(Names(down))


def test_a_name_that_does_not_resolve() -> None:
    names = Names()
    names.broken = True
    wrong = rf"^addresses: no sandbox at {NAME} \(the name does not resolve: .*not known\): start one there"
    with pytest.raises(SandboxUnavailableError, match=wrong):
        require_available([NAME], TOKEN, pytest.fail, names)
    with pytest.raises(SandboxUnavailableError, match=wrong):
        pool_of(names)
    with pytest.raises(
        SandboxUnavailableError, match=r"no sandbox at sandbox\.invalid:7010 \(the name does not resolve"
    ):
        backends.require_available(BackendOptions(backend="pod", addresses=("sandbox.invalid:7010",), token=TOKEN))


def test_a_wrong_token(make: Callable[..., FakePod], monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once: waiting would not help."""
    monkeypatch.setattr(pods, "_START_S", WAIT_S)
    other = make(token="o" * 32)
    started = time.monotonic()
    wrong = rf"^token_file: .*different tokens.*sandbox\.token_file or DIFFRL_SANDBOX_TOKEN.*at {other.at}"
    with pytest.raises(SandboxUnavailableError, match=wrong):
        require_available([NAME], TOKEN, pytest.fail, Names(other))
    with pytest.raises(SandboxUnavailableError, match=wrong):
        pool_of(Names(other))
    assert time.monotonic() - started < WAIT_S / 2


def test_where_some_work_and_some_do_not_it_goes_on_and_says_so(make: Callable[..., FakePod]) -> None:
    good, down, other = make(), make(), make(token="o" * 32)
    down.close()
    names, said = Names(good, down, other), []
    require_available([NAME], TOKEN, said.append, names)
    with pool_of(names, say=said.append) as pool:
        assert pool.judge(program("a")).statuses == (PASSED,)
    assert len(said) == 2
    for line in said:
        assert line.startswith("addresses: ") and line.endswith("pods that judge: 1")
        assert f"nothing listens at {down.at}" in line and "different tokens" in line and good.at not in line


def test_many_pods_that_are_down_are_told_in_one_line(make: Callable[..., FakePod]) -> None:
    down = [make() for _ in range(8)]
    for pod in down:
        pod.close()
    with pytest.raises(SandboxUnavailableError, match=r"; and 3 more: start one there"):
        require_available([NAME], TOKEN, pytest.fail, Names(*down))


def test_real_names_are_resolved() -> None:
    assert resolve("localhost:7010") == ["127.0.0.1:7010"]
    assert resolve("10.0.0.7:7010") == ["10.0.0.7:7010"]
    assert resolve("[::1]:7010") == ["[::1]:7010"]


# The end


def test_close_ends_everything_for_good(make: Callable[..., FakePod], threads) -> None:
    a = make()
    close_gates(a)
    pool = pool_of(Names(a))
    futures = send(threads, pool, range(6))
    until(lambda: pool.stats().busy == 4 and pool.stats().waiting == 2)
    pool.close()
    for future in futures:
        assert isinstance(future.exception(WAIT_S), SandboxClosedError)
    with pytest.raises(SandboxClosedError):
        pool.judge(program("late"))
    until(lambda: a.connections == 0)
    pool.close()
