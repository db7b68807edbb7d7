"""How a row was denoised, for the eye: on a terminal, as a page with a slider over steps, as an animated picture.

Pure functions of the tokens. Both files are self-contained: they load nothing, and the text in them is escaped; what has no
shape of its own (control characters) is drawn as a sign, so that no text of a model steers a terminal or breaks a file.

A frame is a number of revealed groups: 0 is the start, frame n shows what the first n steps that revealed something did.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from rich.cells import cell_len
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from diffrl.models.tokens import end_ids

MASK_SIGN = "[MASK]"
END_SIGN = "∎"  # end and padding tokens
LINE_SIGN = "↵"  # a line break, where it needs a place
HIDDEN_COLOR = "#dddddd"
FIRST_HUE, LAST_HUE = 215, 15  # of the colours of steps: from blue to red

COLUMNS = 100  # of a picture
CELL_WIDTH, LINE_HEIGHT, MARGIN = 8.4, 20, 12  # pixels
FRAME_SECONDS, LONGEST_SECONDS, REST_SECONDS = 0.15, 15.0, 2.0
LONGEST_CHARACTER = 4  # bytes, and therefore tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """Token(text=" return", step=3, probability=0.93); a given one: Token(text="def", step=-1, probability=1.0)"""

    text: str
    step: int | None  # at which it was revealed, from 0; -1: it was given; None: it is hidden
    probability: float  # what the model gave it then

    @property
    def label(self) -> str:
        assert self.step is not None
        return "given" if self.step < 0 else f"step {self.step + 1}, probability {self.probability:.3f}"


def tokens_of(
    tokenizer: PreTrainedTokenizerFast,
    ids_L: Tensor,
    step_map_L: Tensor,
    probability_L: Tensor,
    hidden_L: Tensor | None = None,
) -> tuple[Token, ...]:
    """The tokens of a row. A character that is spread over several tokens stands at the last of them."""
    ends = end_ids(tokenizer)
    steps = step_map_L.tolist()
    if hidden_L is not None:
        steps = [None if hidden else step for step, hidden in zip(steps, hidden_L.tolist(), strict=True)]
    texts: list[str] = []
    pending: list[int] = []  # tokens that do not end a character
    for token_id, step in zip(ids_L.tolist(), steps, strict=True):
        if step is None or token_id in ends:
            texts.append(MASK_SIGN if step is None else END_SIGN)
            pending = []
            continue
        pending.append(token_id)
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        whole = not text.endswith("\ufffd") or len(pending) == LONGEST_CHARACTER
        texts.append(text if whole else "")
        pending = [] if whole else pending
    return tuple(
        Token(text=text, step=step, probability=probability)
        for text, step, probability in zip(texts, steps, probability_L.tolist(), strict=True)
    )


def terminal_frame(tokens: Sequence[Token]) -> Text:
    """As it stands: what is hidden dim, what was revealed last highlighted."""
    last = max((token.step for token in tokens if token.step is not None), default=-1)
    frame = Text()
    for token in tokens:
        if token.step is None:
            frame.append(MASK_SIGN, "dim")
        elif 0 <= token.step == last:
            frame.append(visible(token.text).replace("\n", f"{LINE_SIGN}\n"), "bold black on green")
        else:
            frame.append(visible(token.text))
    return frame


def visible(text: str) -> str:
    """Control characters as their signs, all else as it is; line breaks and tabs stay."""
    return "".join(sign_of(character) for character in text)


def sign_of(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF):  # the last are not allowed in XML
        return "\ufffd"
    return character


def revealing_steps(tokens: Iterable[Token]) -> list[int]:
    """The steps that revealed something, in order; frame n + 1 is what the n-th of them left."""
    steps = {token.step for token in tokens}
    assert None not in steps, "a trajectory is drawn when nothing is hidden any more"
    return sorted(step for step in steps if step is not None and step >= 0)


def color_of(frame: int, num_frames: int) -> str:
    """A light background, by the order in which tokens were revealed."""
    share = (frame - 1) / max(num_frames - 1, 1)
    return f"hsl({FIRST_HUE + (LAST_HUE - FIRST_HUE) * share:.0f},75%,82%)"


PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # nothing is fetched
PAGE_STYLE = """
body{font-family:sans-serif;margin:2em;background:#fff;color:#111}
pre{font:15px/1.5 monospace;white-space:pre-wrap;overflow-wrap:anywhere}
pre span{border-radius:3px}
pre .given{color:#666}
pre .hidden{background:none!important;color:#aaa}
pre i,pre .hidden b{display:none}
pre b{font-weight:normal}
pre .hidden i{display:inline;font-style:normal}
input{width:min(40em,60%);vertical-align:middle}
"""
PAGE_SCRIPT = """
const slider=document.querySelector('input'),label=document.querySelector('output'),button=document.querySelector('button');
const tokens=[...document.querySelectorAll('[data-frame]')],steps=JSON.parse(slider.dataset.steps);
let timer=null;
function show(){const n=+slider.value;
for(const t of tokens)t.classList.toggle('hidden',+t.dataset.frame>n);
label.textContent=n?'after step '+(steps[n-1]+1):'start';}
function stop(){clearInterval(timer);timer=null;button.textContent='play';}
function next(){if(+slider.value>=steps.length)return stop();slider.value=+slider.value+1;show();}
slider.oninput=()=>{stop();show();};
button.onclick=()=>{if(timer)return stop();
if(+slider.value>=steps.length){slider.value=0;show();}
button.textContent='stop';timer=setInterval(next,PERIOD);};
show();
"""


def to_html(tokens: Sequence[Token], title: str) -> str:
    """A page: tokens coloured by the step that revealed them, step and probability on hover, a slider over steps."""
    steps = revealing_steps(tokens)
    frame_of: dict[int | None, int] = {step: number for number, step in enumerate(steps, start=1)}
    spans = []
    for token in tokens:
        text, label = escape(visible(token.text)), escape(token.label)
        frame = frame_of.get(token.step)
        if frame is None:
            spans.append(f'<span class="given" title="{label}">{text}</span>')
            continue
        style = f"background:{color_of(frame, len(steps))}"
        inside = f"<i>{MASK_SIGN}</i><b>{text}</b>"
        spans.append(f'<span data-frame="{frame}" style="{style}" title="{label}">{inside}</span>')
    heading = escape(visible(title))
    script = PAGE_SCRIPT.replace("PERIOD", str(round(1000 * FRAME_SECONDS)))
    slider = f'<input type="range" min="0" max="{len(steps)}" value="{len(steps)}" data-steps="{steps}">'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{PAGE_POLICY}">\n'
        f"<title>{heading}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>\n<h3>{heading}</h3>\n"
        f"<p><button>play</button> {slider} <output></output></p>\n<pre>\n{''.join(spans)}</pre>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def to_svg(tokens: Sequence[Token], title: str) -> str:
    """A picture in which tokens appear in their order, over and over; step and probability on hover.

    A hidden token is a grey box as wide as its text. Where nothing moves (a printed page), all tokens are there.
    """
    steps = revealing_steps(tokens)
    frame_of: dict[int | None, int] = {step: number for number, step in enumerate(steps, start=1)}
    moving = min(FRAME_SECONDS * len(steps), LONGEST_SECONDS)
    drawn, line, column = [], 0, 0
    for token in tokens:
        frame = frame_of.get(token.step)
        pieces, line, column = placed(token.text, line, column, revealed=frame is not None)
        boxes = [box(piece, "none" if frame is None else color_of(frame, len(steps))) for piece in pieces]
        tip = f"<title>{escape(token.label)}</title>"
        if frame is None:
            drawn.append(f"<g>{tip}{''.join(boxes)}</g>")
            continue
        at = moving * frame / len(steps) / (moving + REST_SECONDS)
        timing = f'calcMode="discrete" dur="{moving + REST_SECONDS:.2f}s" repeatCount="indefinite"'
        appear = f'<animate attributeName="opacity" values="0;1" keyTimes="0;{at:.4f}" {timing}/>'
        grey = "".join(box((x, y, width, ""), HIDDEN_COLOR) for x, y, width, _ in pieces)
        drawn.append(f"<g>{grey}<g>{tip}{''.join(boxes)}{appear}</g></g>")
    width, height = math.ceil(COLUMNS * CELL_WIDTH + 2 * MARGIN), (line + 1) * LINE_HEIGHT + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="monospace" font-size="14">\n<title>{escape(visible(title))}</title>\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


Piece = tuple[int, int, int, str]  # column, line, columns wide, text


def placed(text: str, line: int, column: int, *, revealed: bool) -> tuple[list[Piece], int, int]:
    """Where the parts of a token stand, and where the next token begins. A line longer than COLUMNS goes on below."""
    pieces: list[Piece] = []
    run, start, used = "", column, 0

    def close(sign: str = "") -> None:
        if run + sign:
            pieces.append((start, line, used + cell_len(sign), run + sign))

    for character in visible(text).expandtabs(4):
        if character == "\n":
            close(LINE_SIGN if revealed else "")  # so that it can be seen to appear
            run, start, used, line = "", 0, 0, line + 1
            continue
        width = cell_len(character)
        if start + used + width > COLUMNS:
            close()
            run, start, used, line = "", 0, 0, line + 1
        run, used = run + character, used + width
    close()
    return pieces, line, start + used


def box(piece: Piece, fill: str) -> str:
    """A background, and text that is exactly as wide in any font."""
    column, line, columns, text = piece
    x, y, width = MARGIN + column * CELL_WIDTH, MARGIN + line * LINE_HEIGHT, columns * CELL_WIDTH
    drawn = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LINE_HEIGHT - 2}" rx="3" fill="{fill}"/>'
    if not text.strip():
        return drawn
    return (
        f'{drawn}<text x="{x:.1f}" y="{y + 14}" textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs" '
        f'xml:space="preserve" fill="{"#666" if fill == "none" else "#111"}">{escape(text)}</text>'
    )
