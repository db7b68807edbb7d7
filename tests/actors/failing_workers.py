"""Workers that fail in one way or another. Their processes import this module, so it imports nothing that is large."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(ready: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Square:
    """Squares; what else it does depends on what it finds in its folder."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.running = 0
        self.change = threading.Lock()

    def first_time(self, name: str) -> bool:
        seen = self.folder / name
        if seen.exists():
            return False
        seen.touch()
        return True

    def work(self, value: int) -> int:
        return value * value

    def hang_once(self, value: int) -> int:
        while value == 1 and (self.folder / "hung").exists() is False:
            (self.folder / "hung").touch()
            time.sleep(1000)
        return value * value

    def kill_once(self, value: int) -> tuple[int, int]:
        """With the number of calls that ran at the same time. Value 1 kills its first worker, once it has company."""
        with self.change:
            self.running += 1
        (self.folder / f"{value} has begun").touch()
        if value == 1 and self.first_time("killed"):
            wait_until(lambda: (self.folder / "0 has begun").exists() and (self.folder / "2 has begun").exists())
            os._exit(1)
        most = self.running
        for _ in range(20):
            time.sleep(0.01)
            most = max(most, self.running)
        with self.change:
            self.running -= 1
        return value * value, most

    def kill(self, value: int) -> int:
        if value == 1:
            print("about to divide by zero", flush=True)
            os._exit(1)
        return value * value

    def fail(self, value: int) -> int:
        print(f"looking at {value}", flush=True)
        return self.give_up(value)

    def give_up(self, value: int) -> int:
        raise ValueError(f"cannot square {value}")


class NoStart:
    def __init__(self):
        raise KeyError("no such device")


class Late:
    def __init__(self, seconds: float):
        time.sleep(seconds)

    def work(self, value: int) -> int:
        return value


class Held:
    """Squares as soon as nothing in its folder holds it; says when it is closed."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def work(self, value: int) -> int:
        wait_until(lambda: not (self.folder / "hold").exists(), limit_s=600.0)
        return value * value

    def close(self) -> None:
        (self.folder / f"closed-{os.getpid()}").touch()


class Reference:
    """Dies of one ordinal, but not before its group has been judged."""

    def logprobs(self, ordinal: int) -> int:
        if ordinal == 2:
            time.sleep(0.5)
            os._exit(1)
        return ordinal
