"""Iterators, generators and coroutines across the link: each runs where it was made, step by step.

The side that uses one holds a real generator or coroutine whose every step is a request; the side that made it serves
`next`, `send`, `throw`, `close` (iterators) and `await`, `anext` (coroutines, asynchronous generators). A coroutine is
driven to its end in one step, so coroutines of the other side run one after the other.
"""

from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any

from sandbox.judge.containers import Shared, with_room
from sandbox.judge.link import GoneError, Peer
from sandbox.judge.value_types import Wire
from sandbox.judge.values import Encoder

# Items fetched at once: one by one at first, as an iterator may be slow or have effects, then more. `send` and
# `throw` are exact as long as it is one by one.
_BATCH = (1, 1, 8, 64, 512)
_ROUNDS = 16  # fetches of each size
_REMEMBERED = 64  # containers among the items that a later step may still change

STEPS = frozenset({"next", "send", "throw", "close", "await", "anext"})


def remote_iterator(peer: Peer, number: int) -> Generator[Any, Any, Any]:
    """Stands for an iterator of the other side."""
    items: list[Any] = []
    known: list[Any] = []
    answer: dict[str, Any] = {}
    end = sent = None
    op, rounds = "next", 0
    while True:
        if not items and not answer.get("done"):
            count = _BATCH[min(rounds // _ROUNDS, len(_BATCH) - 1)] if op == "next" else 1
            decoder = peer.decoder(known)
            with peer.reached_from(number):
                answer = peer.ask(op, on=number, count=count, a=with_room(Encoder(peer).encode, sent))
                fetched = peer.value_of(answer, decoder)
            if type(fetched) is not tuple or not fetched:
                raise peer.lost("garbage for items")
            *items, end = fetched
            items.reverse()
            known, rounds = decoder.containers[-_REMEMBERED:], rounds + 1
        if not items:
            if "error" in answer:
                raise peer.decode_raised(answer["error"])
            return end
        try:
            sent = yield items.pop()
        except GeneratorExit:
            peer.close(number)
            raise
        except BaseException as error:
            op, sent = "throw", error
        else:
            op = "next" if sent is None else "send"


async def remote_coroutine(peer: Peer, number: int) -> Any:
    """Stands for a coroutine of the other side."""
    with peer.reached_from(number):
        return peer.request("await", on=number)


async def remote_async_generator(peer: Peer, number: int) -> AsyncGenerator[Any, None]:
    """Stands for an asynchronous generator of the other side."""
    while True:
        try:
            with peer.reached_from(number):
                item = peer.request("anext", on=number)
        except StopAsyncIteration:
            return
        yield item


def serve_step(peer: Peer, op: str, number: int, message: dict[str, Any]) -> dict[str, Wire]:
    """One of `STEPS` on an object of this side."""
    target = peer.exported[number]
    if op == "close":
        target.close()
        return {}
    if op in ("await", "anext"):
        value = run_awaitable(peer, target if op == "await" else anext(target))
        return {"v": Encoder(peer).encode_or_export(value)}
    shared = peer.iterated.setdefault(number, Shared())
    encoder = Encoder(peer, shared.containers)
    items: list[Wire] = []
    fields: dict[str, Wire] = {"done": True}
    end = None
    sent = peer.decode(message.get("a"))
    try:
        for _ in range(message["count"]):
            item = next(target) if op == "next" else getattr(target, op)(sent)
            items.append(encoder.encode_or_export(item))
            if encoder.containers:  # which the next step may change
                break
        fields["done"] = False
    except StopIteration as stop:
        end = stop.value
    except GoneError:
        raise
    except BaseException as error:
        fields["error"] = peer.encode_raised(error)
    fields["v"] = ["t", *items, encoder.encode_or_export(end)]
    fields["m"] = with_room(shared.changes, encoder)
    peer.iterated[number] = Shared(encoder.containers[-_REMEMBERED:])
    return fields


def run_awaitable(peer: Peer, awaitable: Any) -> Any:
    """Drives it to its end, also where an event loop of this side waits for the other side already."""
    import asyncio

    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        if peer.loop is None or peer.loop.is_running():
            peer.loop = asyncio.new_event_loop()
        return peer.loop.run_until_complete(awaitable)
    finally:
        asyncio._set_running_loop(outer)


def kind_of(value: Any) -> str | None:
    """Which of the stand-ins of this module represents an object on the other side; None: none of them."""
    if isinstance(value, Coroutine):
        return "coroutine"
    if isinstance(value, AsyncGenerator):
        return "async_generator"
    return "iterator" if isinstance(value, Generator) else None


STAND_INS = {"iterator": remote_iterator, "coroutine": remote_coroutine, "async_generator": remote_async_generator}
