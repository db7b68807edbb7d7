"""The supervised loop: layouts, schedule, batches and randomness by (seed, step), and that it learns."""

import pytest
import torch

from diffrl.models.dream import DreamModel
from diffrl.models.tiny import tiny_model, train_tokenizer
from diffrl.sampler import SamplingParams, sample
from diffrl.supervised import (
    SupervisedOptions,
    batch_indices,
    instruction_rows,
    make_optimizers,
    packed_rows,
    tokenize_pairs,
    train,
    train_step,
)

PAIRS = [("add one", "x + 1"), ("take two away", "x - 2"), ("double it", "x * 2")]
END, PAD = 1, 0


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for pair in PAIRS for text in pair], vocab_size=270)


def small_model(tokenizer, seed: int = 0) -> DreamModel:
    return tiny_model(tokenizer, generator=torch.Generator().manual_seed(seed), hidden_size=32, num_layers=2)


def rows_of(tokenizer, **options):
    pairs = tokenize_pairs(tokenizer, PAIRS)
    return instruction_rows(
        pairs,
        prompt_length=max(len(p) for p, _ in pairs),
        completion_length=max(len(c) for _, c in pairs) + 2,
        end_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def test_instruction_layout_by_hand():
    rows = instruction_rows(
        [([5, 6], [7, 8]), ([5], [9])],
        prompt_length=3,
        completion_length=4,
        end_token_id=END,
        pad_token_id=PAD,
        pad_weight=0.25,
    )
    assert rows.ids_NL.tolist() == [[PAD, 5, 6, 7, 8, END, PAD], [PAD, PAD, 5, 9, END, PAD, PAD]]
    assert rows.attention_mask_NL.int().tolist() == [[0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
    assert rows.maskable_NL.int().tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 2
    assert rows.loss_weight_NL.tolist() == [[0, 0, 0, 1, 1, 1, 0.25], [0, 0, 0, 1, 1, 0.25, 0.25]]


@pytest.mark.parametrize("pair", [([5] * 4, [7]), ([5], [7] * 4)])
def test_a_pair_that_does_not_fit_is_refused(pair):
    with pytest.raises(ValueError, match="do not fit"):
        instruction_rows([pair], prompt_length=3, completion_length=4, end_token_id=END, pad_token_id=PAD)


def test_packed_windows_by_hand():
    rows = packed_rows(range(11), window=4)
    assert rows.ids_NL.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows.maskable_NL.all() and rows.attention_mask_NL.all() and (rows.loss_weight_NL == 1).all()
    with pytest.raises(ValueError, match="do not fill one window"):
        packed_rows([1, 2], window=3)


def test_chats_are_tokenized_as_the_rollouts_will_ask_them(tokenizer):
    from diffrl.prompts import chat_ids
    from diffrl.types import Problem

    problem = Problem(id="1", prompt="add one", prompt_tests=(), reward_tests=("assert True",))
    assert tokenize_pairs(tokenizer, PAIRS[:1]) == [(chat_ids(tokenizer, problem), tokenizer("x + 1")["input_ids"])]


def test_every_epoch_is_a_permutation_and_batches_follow_each_other():
    flat = torch.cat([batch_indices(10, 4, step, seed=3) for step in range(5)])
    assert sorted(flat[:10].tolist()) == sorted(flat[10:].tolist()) == list(range(10))
    assert flat[:10].tolist() != flat[10:].tolist()
    assert len(batch_indices(3, 8, 0, seed=0)) == 8


def test_muon_takes_the_matrices_inside_the_blocks_only(tokenizer):
    model = small_model(tokenizer)
    options = SupervisedOptions(num_steps=1, batch_size=1, lr=1e-3, muon_lr=1e-2)
    adamw, muon = make_optimizers(model, options)
    names = {id(p): n for n, p in model.named_parameters()}
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    by_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert by_muon | by_adamw == set(names.values()) and not by_muon & by_adamw
    assert all(".layers." in n and n.endswith("proj.weight") for n in by_muon) and len(by_muon) == 14
    assert "backbone.model.embed_tokens.weight" in by_adamw


def test_a_step_depends_on_seed_and_step_alone(tokenizer):
    rows = rows_of(tokenizer)
    options = SupervisedOptions(num_steps=4, batch_size=2, lr=1e-3, muon_lr=1e-2)

    def losses(seed: int) -> list[float]:
        model, seen = small_model(tokenizer), []
        torch.manual_seed(seed)  # the global state must not matter
        train(model, rows, options, lambda step, metrics: seen.append(metrics["loss/diffusion"]))
        return seen

    assert losses(0) == losses(1)
    model = small_model(tokenizer)
    optimizers = make_optimizers(model, options)
    assert train_step(model, optimizers, rows, options, 2) != train_step(
        small_model(tokenizer), optimizers, rows, options, 3
    )


def test_it_overfits_three_rows_and_the_sampler_gives_them_back(tokenizer):
    rows, model, losses = rows_of(tokenizer), small_model(tokenizer), []
    options = SupervisedOptions(num_steps=120, batch_size=6, lr=1e-2, muon_lr=1e-2)
    train(model, rows, options, lambda step, metrics: losses.append(metrics["loss/diffusion"]))
    assert sum(losses[-20:]) / 20 < 0.1 < 3 < losses[0]
    prompt_length = int((~rows.maskable_NL[0]).sum())
    params = SamplingParams(steps=rows.ids_NL.shape[1] - prompt_length, temperature=0.0, top_p=None, top_k=None)
    result = sample(
        model.eval(),
        rows.ids_NL[:, :prompt_length],
        rows.attention_mask_NL[:, :prompt_length],
        num_tokens=rows.ids_NL.shape[1] - prompt_length,
        params=params,
        seeds=[1, 2, 3],
    )
    assert torch.equal(result.completion_ids_BC, rows.ids_NL[:, prompt_length:])
