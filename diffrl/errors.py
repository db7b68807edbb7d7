"""What is said to a user whose input cannot be used: one line that names the field, the value and the way out."""

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """The user's input cannot be used; the message is one line."""


class RunStoppedError(RuntimeError):
    """A run cannot go on as it should; the message is one line."""


def require(ok: bool, field: str, value: Any, way_out: str) -> None:
    """Cross-field check: `field: value must way_out`."""
    if not ok:
        raise ValueError(f"{field}: {shown(value)} must {way_out}")


def shown(value: Any) -> str:
    """A value as it is repeated to the user: one line, and not a long one."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 4, 200, 200, 60
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 20
    try:
        return short.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} that is too large to print"


def is_port(text: str) -> bool:
    return text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65_536


def one_of(field: str, name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise ValueError(
            f"{field}: {shown(name)} is unknown{suggestion(name, known)}; known: {', '.join(sorted(known))}"
        )


def suggestion(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
