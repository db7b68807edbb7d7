"""Concurrent calls of a rollout worker, filled by one sampling engine at a time (continuous batching).

A call leaves its canvases and waits. One thread drives the engine, and always the same one: kernels keep their pools of
threads by the thread that calls them. Rows of a call join at the next step and leave when they are full.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

from diffrl.causal_sampler import CausalEngine
from diffrl.sampler import Canvas, Engine, Filled


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """What a worker's engines have done since it started; tokens are positions in forward passes.

    RolloutStats(num_passes=120, num_tokens_passed=61440, num_useful_tokens=58000, busy_s=9.3)
    """

    num_passes: int = 0
    num_tokens_passed: int = 0  # padding included
    num_useful_tokens: int = 0
    busy_s: float = 0.0

    def after(self, engine: Engine | CausalEngine, seconds: float) -> "RolloutStats":
        """With what `engine` has done in its `seconds`."""
        return RolloutStats(
            num_passes=self.num_passes + engine.num_passes,
            num_tokens_passed=self.num_tokens_passed + engine.num_tokens_passed,
            num_useful_tokens=self.num_useful_tokens + engine.num_useful_tokens,
            busy_s=self.busy_s + seconds,
        )


@dataclass(eq=False, slots=True, kw_only=True)
class Order:
    """The canvases of one call, on their way."""

    key: object
    make_engine: Callable[[], Engine | CausalEngine]
    canvases: Sequence[Canvas]
    result: Future[list[Filled]] = field(default_factory=Future)
    filled: dict[int, Filled] = field(default_factory=dict)  # by ticket

    def receive(self, ticket: int, row: Filled) -> None:
        self.filled[ticket] = row
        if len(self.filled) == len(self.canvases):
            self.result.set_result([self.filled[ticket] for ticket in sorted(self.filled)])


class Batcher:
    """Canvases in, filled rows out, for any number of threads."""

    def __init__(self):
        self.idle = Lock()  # held while an engine is at work; whoever changes its model takes it
        self.stats = RolloutStats()
        self._orders: list[Order] = []  # that no engine has seen, in order of arrival
        self._change = Lock()  # of that list
        self._thread = ThreadPoolExecutor(1, "engine")

    def fill(
        self, key: object, make_engine: Callable[[], Engine | CausalEngine], canvases: Sequence[Canvas]
    ) -> list[Filled]:
        """The rows in the order of `canvases`, as soon as these are full.

        Calls with equal keys share an engine, which the first of them makes; others wait until it is idle, in order of
        arrival. What the engine raises, every call that it works for raises.
        """
        if not canvases:
            return []
        order = Order(key=key, make_engine=make_engine, canvases=canvases)
        with self._change:
            self._orders.append(order)
        self._thread.submit(self._work)
        return order.result.result()

    def _work(self) -> None:
        while True:
            with self._change:
                if not self._orders:
                    return
                key = self._orders[0].key
            with self.idle:
                self._serve(key)

    def _serve(self, key: object) -> None:
        """One engine, from the first order with this key until nothing is left of any."""
        new = self._arrived(key)
        orders = list(new)
        by_ticket: dict[int, Order] = {}
        before, began = self.stats, time.perf_counter()
        try:
            engine = new[0].make_engine()
            while new or engine.busy:
                by_ticket |= {engine.add(canvas): order for order in new for canvas in order.canvases}
                full = engine.step()
                self.stats = before.after(engine, time.perf_counter() - began)  # before any call can return
                for ticket, row in full:
                    by_ticket.pop(ticket).receive(ticket, row)
                new = self._arrived(key)
                orders = [order for order in orders if not order.result.done()] + new
        except BaseException as error:  # whatever it is: nobody else could tell those who wait
            for order in orders:
                if not order.result.done():
                    order.result.set_exception(error)

    def _arrived(self, key: object) -> list[Order]:
        """Take the orders with this key."""
        with self._change:
            arrived = [order for order in self._orders if order.key == key]
            self._orders = [order for order in self._orders if order.key != key]
        return arrived
