"""Sampling from left to right: what transformers generates, whatever the batch; and what the distribution says."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from diffrl.causal_sampler import (
    Prompt,
    batches_of,
    end_tokens,
    open_causal_model,
    open_causal_tokenizer,
    sample_causal,
)
from diffrl.data.microcode import microcode_problems
from diffrl.prompts import chat_ids
from diffrl.sampler import SamplingParams
from tests.actors.causal_folder import causal_folder
from tests.diffrl.tiny_folder import tiny_folder

PROBLEMS = microcode_problems("train", num_prompt_tests=0)[::700][:4]
GREEDY = SamplingParams(steps=1, temperature=0.0, top_p=None, top_k=None)
FREE = SamplingParams(steps=1, temperature=1.0, top_p=None, top_k=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_folder(tmp_path_factory.mktemp("causal"), PROBLEMS, steps=25)


def test_greedy_is_what_transformers_generates_in_any_batch(folder: Path):
    tokenizer, model = open_causal_tokenizer(folder), open_causal_model(folder, None, "cpu")
    ends = end_tokens(model, tokenizer)
    prompts = [Prompt(ids=chat_ids(tokenizer, problem), seed=0) for problem in PROBLEMS]
    assert len({len(prompt.ids) for prompt in prompts}) > 1  # there is padding
    options = {"max_tokens": 24, "params": GREEDY, "ends": ends, "vocab_size": len(tokenizer)}
    together = sample_causal(model, prompts, **options)
    for prompt, ours in zip(prompts, together, strict=True):
        ids = torch.tensor([list(prompt.ids)])
        mask = torch.ones_like(ids)
        theirs = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)[
            0, len(prompt.ids) :
        ].tolist()
        assert ours == theirs[: len(ours)] and (len(ours) == 24 or ours[-1] in ends)
        assert sample_causal(model, [prompt], **options) == [ours]
    assert len({tuple(ids) for ids in together}) > 1


def test_rows_draw_with_their_own_seeds(folder: Path):
    tokenizer, model = open_causal_tokenizer(folder), open_causal_model(folder, None, "cpu")
    ids = chat_ids(tokenizer, PROBLEMS[0])
    options = {"max_tokens": 1, "ends": end_tokens(model, tokenizer), "vocab_size": len(tokenizer)}
    rows = sample_causal(model, [Prompt(ids=ids, seed=n) for n in range(500)], params=FREE, **options)
    again = sample_causal(model, [Prompt(ids=ids, seed=n) for n in (7, 3)], params=FREE, **options)
    assert again == [rows[7], rows[3]]
    probs = model(torch.tensor([ids])).logits[0, -1].softmax(-1).detach()
    counts = Counter(row[0] for row in rows)
    for token in probs.topk(3).indices.tolist():
        assert counts[token] / 500 == pytest.approx(float(probs[token]), abs=0.08)
    best = sample_causal(
        model, [Prompt(ids=ids, seed=n) for n in range(20)], params=SamplingParams(steps=1, temperature=1.0, top_p=None, top_k=1),
        **options,
    )  # fmt: skip
    assert {row[0] for row in best} == {int(probs.argmax())}


def test_batches_hold_every_prompt_once():
    prompts = [Prompt(ids=[0] * length, seed=0) for length in (3, 9, 1, 5, 5)]
    batches = list(batches_of(prompts, 2))
    assert sorted(place for batch in batches for place in batch) == [0, 1, 2, 3, 4] and batches[0][0] == 1


def test_what_is_no_autoregressive_folder_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        open_causal_tokenizer(tmp_path)
    tiny_folder(tmp_path / "dream")
    with pytest.raises(ValueError, match=r"of type|cannot be read as a model"):
        open_causal_tokenizer(tmp_path / "dream")
