"""Trajectories: the files parse, say what happened and when, and let nothing of a model's text through as markup."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch

from diffrl.models.tokens import end_ids
from diffrl.trajectory import COLUMNS, Token, color_of, terminal_frame, to_html, to_svg, tokens_of, visible
from tests.diffrl.tiny_folder import tiny_tokenizer

HOSTILE = "</span></title><script>alert('1')</script>&amp;\"]]>\x00\x1b[31m\x9b\ud800\ufffe"
SHOWN = HOSTILE.replace("\x00", "␀").replace("\x1b", "␛").replace("\x9b\ud800\ufffe", "\ufffd" * 3)
TOKENS = (
    Token(text="def f", step=-1, probability=1.0),
    Token(text=HOSTILE, step=4, probability=0.25),
    Token(text=":\n    ", step=2, probability=0.5),
    Token(text="return é", step=9, probability=0.125),
    Token(text="∎", step=4, probability=1.0),
)
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Names of elements; and of each top-level span its attributes and texts by element."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.spans: list[tuple[dict, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        if tag == "span":
            self.spans.append((dict(attrs), {}))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "span" in self.open:
            texts = self.spans[-1][1]
            texts[self.open[-1]] = texts.get(self.open[-1], "") + data


def test_page_tells_text_step_and_probability_of_every_token():
    page = Page(to_html(TOKENS, f"title {HOSTILE}"))
    assert page.open == []
    given, *revealed = page.spans
    assert given == ({"class": "given", "title": "given"}, {"span": "def f"})
    assert [texts for _, texts in revealed] == [
        {"i": "[MASK]", "b": text} for text in (SHOWN, ":\n    ", "return é", "∎")
    ]
    assert [attributes["data-frame"] for attributes, _ in revealed] == ["2", "1", "3", "2"]
    assert [attributes["title"] for attributes, _ in revealed] == [
        "step 5, probability 0.250",
        "step 3, probability 0.500",
        "step 10, probability 0.125",
        "step 5, probability 1.000",
    ]
    styles = [attributes["style"] for attributes, _ in revealed]
    assert styles[0] == styles[3] and len(set(styles)) == 3
    attributes = dict(page.attributes)
    assert attributes["max"] == attributes["value"] == "3" and attributes["data-steps"] == "[2, 4, 9]"


@pytest.mark.parametrize("render", [to_html, to_svg])
def test_files_stand_alone_and_text_stays_text(render):
    text = render(TOKENS, f"title {HOSTILE}")
    page = Page(text)
    assert page.elements.count("script") == (1 if render is to_html else 0)
    assert {name for name, _ in page.attributes}.isdisjoint({"src", "href", "xlink:href", "onload", "onerror"})
    urls = re.findall(r"https?://[^\"' ]*|url\(|@import", text)
    assert urls == ([] if render is to_html else ["http://www.w3.org/2000/svg"])
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    text.encode()


def test_picture_tells_text_step_and_probability_and_moves_in_order():
    root = ET.fromstring(to_svg(TOKENS, HOSTILE))
    assert root.findtext(f"{SVG}title") == SHOWN
    groups = root.findall(f"{SVG}g")
    assert len(groups) == len(TOKENS)
    moving = [group.find(f"{SVG}g") for group in groups]
    assert moving[0] is None and groups[0].findtext(f"{SVG}title") == "given"
    shown = []
    for token, group in zip(TOKENS[1:], moving[1:], strict=True):
        assert group is not None and group.findtext(f"{SVG}title") == token.label
        drawn = "".join(text.text or "" for text in group.iter(f"{SVG}text"))
        assert drawn == visible(token.text).replace("\n", "↵").removesuffix("    ")
        animation = group.find(f"{SVG}animate")
        assert animation is not None and animation.get("values") == "0;1"
        start, appears = (float(time) for time in (animation.get("keyTimes") or "").split(";"))
        assert start == 0 < appears < 1
        shown.append((token.step, appears))
    by_step = dict(shown)
    assert len(set(shown)) == len(by_step) == 3 and sorted(by_step.values()) == [by_step[s] for s in sorted(by_step)]


def test_boxes_of_a_picture_do_not_overlap_and_stay_inside():
    words = [Token(text=" word" * (1 + n % 9) + "世" * (n % 4), step=n % 5, probability=0.5) for n in range(60)]
    root = ET.fromstring(to_svg([*words, Token(text="\n\n\tend", step=-1, probability=1.0)], ""))
    lines: dict[str, list[tuple[float, float]]] = {}
    for rect in list(root.iter(f"{SVG}rect"))[1:]:
        if rect.get("fill") != "#dddddd":  # those lie under others
            x, y, width = rect.attrib["x"], rect.attrib["y"], rect.attrib["width"]
            lines.setdefault(y, []).append((float(x), float(x) + float(width)))
    assert len(lines) > 10
    for boxes in lines.values():
        assert boxes[-1][1] <= float(root.attrib["width"])
        assert all(after[0] >= before[1] - 0.11 for before, after in pairwise(boxes))
    assert max(float(y) for y in lines) < float(root.attrib["height"]) - 20
    widest = max(boxes[-1][1] for boxes in lines.values())
    assert widest > float(root.attrib["width"]) * (COLUMNS - 12) / COLUMNS


def test_colors_run_from_the_first_step_to_the_last():
    assert color_of(1, 1) == color_of(1, 9) == "hsl(215,75%,82%)"
    assert color_of(9, 9) == "hsl(15,75%,82%)"
    assert color_of(5, 9) == "hsl(115,75%,82%)"


def test_terminal_frame_highlights_what_is_new():
    tokens = (*TOKENS[:3], Token(text="x", step=None, probability=1.0), Token(text="a\n", step=4, probability=0.5))
    frame = terminal_frame(tokens)
    assert frame.plain == f"def f{SHOWN}:\n    [MASK]a↵\n"
    styled = [(frame.plain[span.start : span.end], span.style) for span in frame.spans]
    assert styled == [(SHOWN, "bold black on green"), ("[MASK]", "dim"), ("a↵\n", "bold black on green")]
    given = terminal_frame([TOKENS[0], Token(text="x", step=None, probability=1.0)])
    assert [span.style for span in given.spans] == ["dim"]  # nothing is new yet


def test_tokens_of_a_row():
    """A character of several tokens, end tokens, a hidden position, a broken character."""
    tokenizer = tiny_tokenizer()
    eos, pad = end_ids(tokenizer)
    euro = tokenizer.encode("€", add_special_tokens=False)
    assert len(euro) == 3  # bytes that the tokenizer has never seen together
    x = tokenizer.encode("x", add_special_tokens=False)
    ids = [*x, *euro, eos, pad, euro[0], *x, euro[0], *x]
    hidden = torch.arange(len(ids)) == len(ids) - 1
    steps, probability = torch.arange(len(ids)) - 1, torch.linspace(0, 1, len(ids))
    tokens = tokens_of(tokenizer, torch.tensor(ids), steps, probability, hidden)
    assert [token.text for token in tokens] == ["x", "", "", "€", "∎", "∎", "", "\ufffdx", "", "[MASK]"]
    assert [token.step for token in tokens] == [*range(-1, len(ids) - 2), None]
    assert tokens[4].probability == pytest.approx(4 / (len(ids) - 1))
    with pytest.raises(AssertionError, match="nothing is hidden"):
        to_html(tokens, "")
