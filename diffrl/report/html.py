"""Markup in which what anybody else wrote can only ever be text.

Whatever is put into an element is escaped unless it is `Html`, and only this package makes that. Characters that would not show
themselves, or would turn the order of others around, are shown as signs.
"""

from collections.abc import Iterable
from html import escape

from diffrl.trajectory import visible

VOID = ("br", "col", "meta")
# Without a shape of their own, or of direction: with them a program reads as another one than it is. The board's are the same.
UNSEEN = (0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x206A), 0xFEFF, *range(0xFFF9, 0xFFFD))
SIGNS = {code: f"⟨U+{code:04X}⟩" for code in UNSEEN}


class Html(str):
    """Markup, made by `el`, `text` and `join` alone."""

    __slots__ = ()


Child = Html | str | float | None


def text(value: object) -> Html:
    """As it reads: nothing in it is markup."""
    return Html(escape(visible(str(value)).translate(SIGNS)))


def join(children: Iterable[Child]) -> Html:
    return Html("".join(c if isinstance(c, Html) else text(c) for c in children if c is not None))


def el(tag: str, *children: Child, **attributes: object) -> Html:
    """el("td", "a < b", cls="num", aria_label=None) -> <td class="num">a &lt; b</td>

    None is left out, of attributes and children; `_` in an attribute's name is a hyphen.
    """
    named = {("class" if k == "cls" else k.replace("_", "-")): v for k, v in attributes.items() if v is not None}
    head = "".join([tag, *(f' {name}="{text(value)}"' for name, value in named.items())])
    return Html(f"<{head}>" if tag in VOID else f"<{head}>{join(children)}</{tag}>")
