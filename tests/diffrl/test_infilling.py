"""Holes: how they are written, where they lie in the row, and what text comes out."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from diffrl.infilling import HoledText, canvas_of, filled_text, hole_texts, parse_holes
from diffrl.models.folders import load_model
from diffrl.models.tokens import end_ids
from diffrl.sampler import Engine, Filled, SamplingParams
from tests.diffrl.tiny_folder import tiny_folder, tiny_tokenizer

TEXT = "def f(x):\n    return <fill:3><fill:2> + é\n<fill:4>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def test_parts_and_holes():
    holed = parse_holes(TEXT)
    assert holed == HoledText(parts=("def f(x):\n    return ", "", " + é\n", ""), holes=(3, 2, 4))
    assert holed.num_tokens == 9
    assert parse_holes("a < b <fill> fill:3 <fill:012>").parts == ("a < b <fill> fill:3 ", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text has none; write <fill:N>"),
        ("x <fill>", "the text has none"),
        ("x <fill:0> <fill:2>", "<fill:0> fills nothing"),
        ("<fill:2> x <fill:-1>\ny", "'<fill:-1>' must be <fill:N>"),
        ("<fill:2> x <fill: 3>", "'<fill: 3>' must be"),
        ("<fill:2> x <fill:", "'<fill:' must be"),
    ],
)
def test_what_is_not_a_hole_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_holes(text)
    assert "\n" not in str(error.value)


def test_canvas_hides_the_holes_and_nothing_else(tokenizer):
    holed = parse_holes(TEXT)
    canvas = canvas_of(holed, tokenizer, seed=7, context=99)
    known = [tokenizer.encode(part, add_special_tokens=False) for part in holed.parts]
    hidden = [False] * len(known[0]) + [True] * 5 + [False] * len(known[2]) + [True] * 4
    assert canvas.hidden_L.tolist() == hidden and canvas.seed == 7
    assert canvas.ids_L[~canvas.hidden_L].tolist() == known[0] + known[2]
    length = len(hidden)
    assert len(canvas_of(holed, tokenizer, seed=0, context=length).ids_L) == length
    with pytest.raises(ValueError, match=f"{length - 9} tokens and 9 to fill are {length}, more than the {length - 1}"):
        canvas_of(holed, tokenizer, seed=0, context=length - 1)


def test_end_tokens_in_a_hole_are_no_text(tokenizer):
    holed = parse_holes(TEXT)
    canvas = canvas_of(holed, tokenizer, seed=0, context=99)
    eos, pad = end_ids(tokenizer)
    x, plus = tokenizer.encode("x", add_special_tokens=False)[0], tokenizer.encode("+", add_special_tokens=False)[0]
    ids_L = canvas.ids_L.masked_scatter(canvas.hidden_L, torch.tensor([x, eos, plus, x, pad, pad, eos, pad, eos]))
    step_map_L = torch.where(canvas.hidden_L, 2, -1)
    ones = torch.ones(len(ids_L))
    filled = Filled(ids_L=ids_L, step_map_L=step_map_L, probability_L=ones, passes=1, exact_passes=1)
    assert hole_texts(holed, filled, tokenizer) == ("x+", "x", "")
    assert filled_text(holed, filled, tokenizer) == "def f(x):\n    return x+x + é\n"


def test_what_is_given_stays(tokenizer, tmp_path):
    """Through the sampler, at a temperature at which a random model writes anything."""
    holed = parse_holes(TEXT)
    params = SamplingParams(steps=9, temperature=2.0, top_p=None, top_k=None)
    engine = Engine(load_model(tiny_folder(tmp_path)), params, max_tokens=1 << 10, vocab_size=len(tokenizer))
    for seed in range(3):
        engine.add(canvas_of(holed, tokenizer, seed=seed, context=64))
    texts = [filled_text(holed, filled, tokenizer) for filled in engine.run()]
    assert len(set(texts)) == 3
    for text in texts:
        assert text.startswith(holed.parts[0]) and " + é\n" in text and "<fill" not in text
