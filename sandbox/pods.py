"""The pool of the pod backend: its members are the pods that the addresses lead to, as they come and go.

A name may lead to many pods, as that of a headless Service does; it is resolved again every few seconds. Every pod has a
thread here, which connects, has the canary judged, and then asks for the supervisor's counters once a second. A pod

- that is new gets work as soon as it has judged the canary as it must;
- that drains, or is named no more, gets nothing new: what it accepted is awaited, then the connection is closed;
- that is silent for LOST_S, or breaks, is given up: what it was judging is judged elsewhere. It is tried again after a
  rest that doubles from one time to the next.

The next submission goes where there is least to do for each slot, by our own count and the pod's, which has other
clients too. A pod gets at most twice as many as it has slots, so that none of them is ever idle and its autoscaler sees
the backlog; the others wait here, for whichever pod has room first, new ones included.
"""

import contextlib
import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from sandbox.canary import require_canary
from sandbox.pod import LOST_S, connect, host_and_port
from sandbox.pool import Member, Pool
from sandbox.types import SandboxError, SandboxUnavailableError

_RESOLVE_S = 5.0
_BEAT_S = 1.0
_REST_S, _LONGEST_REST_S = 1.0, 30.0
_START_S = 30.0  # for the first pod to judge
_ALONE_S = 60.0  # without any pod, those who wait are told so
_MAX_NAMED = 5  # problems in one message

Resolver = Callable[[str], Sequence[str]]


def resolve(address: str) -> list[str]:
    """The pods that "host:port" leads to, as "ip:port" each; OSError when the name is not known."""
    host, port = host_and_port(address)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    v4 = [f"{at[0]}:{port}" for family, *_, at in found if family == socket.AF_INET]
    return v4 or [f"[{at[0]}]:{port}" for *_, at in found]  # not both: a pod may have one of each kind


def require_available(
    addresses: Sequence[str], token: str, say: Callable[[str], None], resolver: Resolver = resolve
) -> None:
    """Returns when a sandbox answers at one of the addresses and holds the token; `say` hears in one line of those that
    cannot be used. Raises SandboxUnavailableError when there is no other."""
    found, problems = _look_up(addresses, resolver)
    pods = {pod: address for address in found for pod in found[address]}

    def problem_of(pod: str) -> SandboxError | None:
        try:
            connect(pod, token).close()
        except SandboxError as error:
            return error
        return None

    with ThreadPoolExecutor(32) as threads:
        tried = list(zip(pods.values(), threads.map(problem_of, pods), strict=True))
    problems += [(address, error) for address, error in tried if error is not None]
    _report(problems, working=sum(error is None for _, error in tried), say=say)


def _look_up(
    addresses: Iterable[str], resolver: Resolver
) -> tuple[dict[str, list[str]], list[tuple[str, SandboxError]]]:
    """The pods of each address, and the addresses that lead nowhere."""
    found, problems = {}, []
    for address in addresses:
        try:
            found[address] = list(resolver(address))
        except (OSError, UnicodeError) as error:
            problems.append((address, SandboxError(f"the name does not resolve: {error}")))
    return found, problems


def _report(problems: Sequence[tuple[str, SandboxError]], *, working: int, say: Callable[[str], None]) -> None:
    """Says what is wrong, or raises it where no pod works."""
    if not working:
        raise _unavailable(problems)
    if problems:
        say(f"{_text(problems)}; they are tried again, meanwhile pods that judge: {working}")


def _unavailable(problems: Sequence[tuple[str, SandboxError]]) -> SandboxUnavailableError:
    """With the way out: of the token if it is wrong anywhere."""
    own = [str(error) for _, error in problems if isinstance(error, SandboxUnavailableError)]
    return SandboxUnavailableError(own[0] if own else f"{_text(problems)}: start one there, or give another host:port")


def _text(problems: Sequence[tuple[str, SandboxError]]) -> str:
    named = [f"no sandbox at {address} ({error})" for address, error in problems[:_MAX_NAMED]]
    more = [f"and {len(problems) - _MAX_NAMED} more"] if len(problems) > _MAX_NAMED else []
    return f"addresses: {'; '.join(named + more)}"


class _Session:
    """One connection to a pod. When it is lost it stays lost: the pod has to judge the canary again."""

    name = "pod"

    def __init__(self, address: str, token: str) -> None:
        self.connection = connect(address, token)
        self.slots = 2 * self.connection.slots
        self.judge, self.survivors = self.connection.judge, self.connection.survivors
        self.close = self.connection.close


@dataclass(slots=True, eq=False)
class _Pod:
    """A pod that an address leads to."""

    address: str  # as the config names it
    at: str  # ip:port
    place: int
    gone: threading.Event = field(default_factory=threading.Event)  # no address leads to it any more
    judges: bool = False
    problem: SandboxError | None = None  # why it does not


class PodPool(Pool):
    """Up to `slots` submissions at a time, spread over pods.

    Raises SandboxUnavailableError when no pod judges within half a minute; `say` hears of those that do not.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        token: str,
        slots: int,
        *,
        say: Callable[[str], None],
        attempts: int = 2,
        resolver: Resolver = resolve,
    ) -> None:
        super().__init__("pod", attempts=attempts)
        self._most_busy = slots
        self._addresses = addresses
        self._token = token
        self._resolver = resolver
        self._found: Mapping[str, list[str]] = {}
        self._unresolved: Sequence[tuple[str, SandboxError]] = ()
        self._places = itertools.count()
        self._pods: dict[str, _Pod] = {}
        self._tried = threading.Condition(self._lock)
        self._closed = threading.Event()
        self._alone_since = time.monotonic()
        try:
            self._follow_addresses()
            self._wait_for_pods(say)
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._keep_following, daemon=True).start()

    @property
    def slots(self) -> int:
        return int(self._most_busy)

    def close(self) -> None:
        """Ends the connections, for good, and returns when nobody is inside any more."""
        self._closed.set()
        with self._lock:
            self._over = True
            for pod in self._pods.values():
                pod.gone.set()
        super().close()

    def _replace(self, member: Member, unfit: bool = False) -> None:
        if member in self._members:  # its own thread may have been first
            self._members.remove(member)

    def _is_hopeless(self, unfit: int) -> bool:
        return False  # others may come; who waits for them too long is told

    def _renewed(self) -> list[Member]:
        return []

    # Which pods there are.

    def _wait_for_pods(self, say: Callable[[str], None]) -> None:
        """Until each pod has been tried and one of them judges, or none can with this token, or time is over."""

        def known() -> bool:
            pods = self._pods.values()
            tried = all(pod.judges or pod.problem for pod in pods)
            refused = all(isinstance(pod.problem, SandboxUnavailableError) for pod in pods)
            return tried and (refused or any(pod.judges for pod in pods))

        with self._lock:
            self._tried.wait_for(known, _START_S)
            problems, working = self._problems(), sum(pod.judges for pod in self._pods.values())
        _report(problems, working=working, say=say)

    def _problems(self) -> list[tuple[str, SandboxError]]:
        silent = SandboxError("it has not judged a program of ours yet")
        pods = [(pod.address, pod.problem or silent) for pod in self._pods.values() if not pod.judges]
        return [*self._unresolved, *pods]

    def _keep_following(self) -> None:
        while not self._closed.wait(_RESOLVE_S):
            self._follow_addresses()
            self._turn_away()

    def _follow_addresses(self) -> None:
        found, self._unresolved = _look_up(self._addresses, self._resolver)
        self._found = {**self._found, **found}  # a name that does not resolve for a while keeps the pods it had
        named = {at: address for address in self._addresses for at in self._found.get(address, ())}
        with self._lock:
            for at in self._pods.keys() - named.keys():
                self._pods.pop(at).gone.set()
            for at in named.keys() - self._pods.keys() if not self._over else ():
                self._pods[at] = pod = _Pod(named[at], at, next(self._places))
                threading.Thread(target=self._keep, args=(pod,), daemon=True).start()

    def _turn_away(self) -> None:
        """Tells those who wait when there has been no pod for a while."""
        with self._lock:
            if self._members:
                self._alone_since = time.monotonic()
            while self._queue and time.monotonic() - self._alone_since > _ALONE_S:
                self._unqueue(self._queue[0]).set_exception(_unavailable(self._problems()))

    # One pod, in a thread of its own.

    def _keep(self, pod: _Pod) -> None:
        """Has the pod judge for as long as an address leads to it."""
        rest_s = _REST_S
        while not pod.gone.is_set():
            try:
                with contextlib.closing(_Session(pod.at, self._token)) as session:
                    with self._lock:
                        self._canaries += 1
                    require_canary(session)
                    rest_s = _REST_S
                    self._attend(pod, session)
                    problem = SandboxError(f"{pod.at} is about to leave")
            except SandboxError as error:
                problem = error
            with self._lock:
                pod.problem = problem
                self._tried.notify_all()
            pod.gone.wait(rest_s)
            rest_s = min(2 * rest_s, _LONGEST_REST_S)

    def _attend(self, pod: _Pod, session: _Session) -> None:
        """Makes the pod a member until it has drained; raises SandboxError when it is lost."""
        member = Member(pod.place, session.slots, session, fit=True)
        member.refuses = True  # until its counters are known
        with self._lock:
            if self._over:
                return
            self._members.insert(
                random.randrange(len(self._members) + 1), member
            )  # clients do not all begin with the same
        try:
            while not self._has_drained(pod, member, session.connection.stats(LOST_S)):
                time.sleep(_BEAT_S)
        finally:
            with self._lock:
                pod.judges = False
                self._replace(member)  # but it is retired by whoever was inside, and charged for that

    def _has_drained(self, pod: _Pod, member: Member, stats: Mapping[str, int]) -> bool:
        with self._lock:
            member.refuses = bool(stats["draining"]) or pod.gone.is_set()
            member.elsewhere = max(0, stats["busy"] + stats["waiting"] - member.busy)
            pod.judges = not member.refuses
            self._tried.notify_all()
            self._dispatch()
            return member.refuses and not member.busy
