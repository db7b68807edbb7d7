"""What is hidden, cut and opened at a step, from (seed, step) alone; shares that add up; and that training learns."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from diffrl.config.supervised import SupervisedOptim
from diffrl.data.shards import Row, SupervisedRows, collate
from diffrl.diffusion import NoisedRows, batch_loss
from diffrl.models.dream import DreamModel
from diffrl.models.tiny import tiny_model, train_tokenizer
from diffrl.sampler import SamplingParams, sample
from diffrl.supervised import (
    clean_prefixes,
    cut_rows,
    make_optimizers,
    noised_batch,
    noised_prompts,
    opened,
    validation_batch,
)
from tests.diffrl.training import pretrain_config, sft_config, text_rows, train

MASK = 9


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["add one: x + 1", "take two away: x - 2", "double it: x * 2"], vocab_size=270)


def small_model(tokenizer, seed: int = 0) -> DreamModel:
    return tiny_model(tokenizer, generator=torch.Generator().manual_seed(seed), hidden_size=32, num_layers=2)


def instructions(count: int = 1) -> SupervisedRows:
    """[padding | prompt of 2 | completion of 3 with its end | padding that is predicted], `count` times."""
    row = Row(ids=(0, 5, 6, 7, 8, 1, 0), lengths=(6,), prompts=(2,), left=1, fill=1)
    return collate([row] * count, length=8, pad_token_id=0, pad_weight=0.5)


def text(count: int, length: int) -> SupervisedRows:
    return text_rows([5] * (count * length), length)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# What a step hides


def test_instruction_tuning_hides_completions_only():
    noised = noised_batch(instructions(4000), sft_config(), step=3, mask_token_id=MASK)
    share_L = noised.hidden_BL.float().mean(0)
    assert share_L[[0, 1, 2, 7]].tolist() == [0.0] * 4
    assert share_L[3:7] == pytest.approx(torch.full((4,), 0.5), abs=0.03)
    assert noised.num_weight == 4000 * 3.5
    ratio = torch.tensor([0, 0, 0, 1, 1, 1, 0.5, 0])
    assert torch.allclose(noised.weight_BL * noised.t_B[:, None], ratio * noised.hidden_BL)
    assert noised.opened_LL is None


@pytest.mark.parametrize(("step", "probability"), [(0, 1.0), (1, 0.75), (3, 0.25), (4, 0.0), (9, 0.0)])
@pytest.mark.parametrize("given", ["config", "epoch"])
def test_the_condition_is_phased_in(step, probability, given):
    data = {"source": "microcode"} | ({"condition_steps": 4} if given == "config" else {})
    rows = instructions(8000)
    epoch_steps = 4 if given == "epoch" else 17
    noised = noised_batch(rows, sft_config(data=data), step=step, mask_token_id=MASK, epoch_steps=epoch_steps)
    hidden_L = noised.hidden_BL.float().mean(0)
    assert hidden_L[0] == hidden_L[7] == 0  # padding that nobody attends to
    assert hidden_L[1:3] == pytest.approx(torch.full((2,), probability / 2), abs=0.02)
    assert noised.num_weight == pytest.approx(8000 * (3.5 + 2 * probability), rel=0.02)


def test_a_row_has_its_whole_prompt_given_or_none_of_it():
    rows = noised_prompts(instructions(8000), 0.3, generator())
    prompt_B2 = rows.maskable_NL[:, 1:3]
    assert torch.equal(prompt_B2[:, 0], prompt_B2[:, 1])
    assert prompt_B2.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(rows.loss_weight_NL[:, 1:3], prompt_B2.float())
    assert torch.equal(rows.maskable_NL[:, 3:], instructions(8000).maskable_NL[:, 3:])


def test_rows_are_cut_as_often_as_asked_to_any_length():
    rows = cut_rows(text(20_000, 6), 0.4, generator())
    length_B = (rows.document_NL != 0).sum(1)
    shares = torch.bincount(length_B, minlength=7) / 20_000
    assert shares[0] == 0
    assert shares[1:6] == pytest.approx(torch.full((5,), 0.4 / 6), abs=0.007)
    assert shares[6].item() == pytest.approx(0.6 + 0.4 / 6, abs=0.01)
    front_BL = torch.arange(6) < length_B[:, None]
    assert torch.equal(rows.document_NL, front_BL.long()) and torch.equal(rows.maskable_NL, front_BL)
    assert torch.equal(rows.loss_weight_NL, front_BL.float())


def test_prefixes_are_clean_as_often_as_asked_and_never_whole_rows():
    rows = clean_prefixes(text(20_000, 6), 0.4, generator())
    length_B = (~rows.maskable_NL).sum(1)
    shares = torch.bincount(length_B, minlength=7) / 20_000
    assert shares[0].item() == pytest.approx(0.6, abs=0.01)
    assert shares[1:6] == pytest.approx(torch.full((5,), 0.4 / 5), abs=0.007)
    assert shares[6] == 0
    noised_BL = torch.arange(6) >= length_B[:, None]
    assert torch.equal(rows.maskable_NL, noised_BL) and torch.equal(rows.loss_weight_NL, noised_BL.float())
    assert (rows.document_NL == 1).all()  # seen as before
    assert clean_prefixes(text(100, 1), 1.0, generator()).maskable_NL.all()


def test_later_positions_are_opened_with_the_share_of_the_annealing_that_is_over():
    config = pretrain_config(adaptation={"anneal_steps": 10, "random_length_frac": 0.0, "unnoised_prefix_frac": 0.0})
    rows = text(1, 300)
    for step in (0, 3, 9):
        opened_LL = noised_batch(rows, config, step=step, mask_token_id=MASK).opened_LL
        assert opened_LL is not None and opened_LL.shape == (300, 300)
        assert opened_LL.float().mean().item() == pytest.approx(step / 10, abs=0.005)
        assert step == 0 or opened_LL.float().mean(0).min() > 0  # no column is left out
    for step in (10, 11):
        assert noised_batch(rows, config, step=step, mask_token_id=MASK).opened_LL is None
    at_once = pretrain_config(adaptation={"anneal_steps": 0})
    assert noised_batch(rows, at_once, step=0, mask_token_id=MASK).opened_LL is None
    assert noised_batch(rows, pretrain_config(), step=0, mask_token_id=MASK).opened_LL is None
    assert torch.equal(opened(5, 0.5, generator(3)), opened(5, 0.5, generator(3)))


def test_fractions_of_the_config_reach_the_rows():
    config = pretrain_config(
        adaptation={"anneal_steps": 0, "random_length_frac": 0.2, "unnoised_prefix_frac": 0.3}, seed=1
    )
    rows = text(20_000, 50)
    noised = noised_batch(rows, config, step=5, mask_token_id=MASK)
    assert (noised.document_BL == 0).any(1).float().mean().item() == pytest.approx(0.2 * 49 / 50, abs=0.01)
    # Half of a row is cut or clean on average, and what is left of a cut row when it has a prefix too.
    kept = 1 - 0.2 * 0.49
    assert noised.num_weight / rows.ids_NL.numel() == pytest.approx(kept * (1 - 0.3 * 0.5), abs=0.01)
    assert noised.hidden_weight == int(noised.hidden_BL.sum())
    assert not noised.hidden_BL[noised.document_BL == 0].any()


# Randomness


def equal(first: NoisedRows, second: NoisedRows) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(first, name), getattr(second, name)) for name in NoisedRows.__slots__)
    )


@pytest.mark.parametrize(
    "config",
    [
        lambda seed: pretrain_config(
            adaptation={"anneal_steps": 9, "random_length_frac": 0.5, "unnoised_prefix_frac": 0.5}, seed=seed
        ),
        lambda seed: sft_config(data={"source": "microcode", "condition_steps": 9}, seed=seed),
    ],
    ids=["pretrain", "sft"],
)
def test_noise_depends_on_seed_and_step_only(config):
    rows = instructions(16)
    first = noised_batch(rows, config(0), step=4, mask_token_id=MASK)
    torch.manual_seed(1)  # the global state must not matter
    state = torch.get_rng_state()
    assert equal(first, noised_batch(rows, config(0), step=4, mask_token_id=MASK))
    assert torch.equal(torch.get_rng_state(), state)
    for other in (
        noised_batch(rows, config(1), step=4, mask_token_id=MASK),
        noised_batch(rows, config(0), step=5, mask_token_id=MASK),
    ):
        assert not torch.equal(first.hidden_BL, other.hidden_BL) and not torch.equal(first.t_B, other.t_B)
        if first.opened_LL is not None:
            assert other.opened_LL is not None and (first.opened_LL & ~other.opened_LL).any()  # drawn anew


def test_what_is_switched_on_leaves_the_mask_ratios_as_they_are():
    rows = text(16, 8)
    plain = noised_batch(rows, pretrain_config(), step=2, mask_token_id=MASK)
    adapted = noised_batch(
        rows, pretrain_config(adaptation={"anneal_steps": 9, "unnoised_prefix_frac": 1.0}), step=2, mask_token_id=MASK
    )
    assert torch.equal(plain.t_B, adapted.t_B)
    assert torch.equal(adapted.hidden_BL, plain.hidden_BL & adapted.hidden_BL)


def test_validation_is_the_same_at_every_step_and_hides_no_prompt():
    rows = instructions(500)
    config = sft_config(data={"source": "microcode", "condition_steps": 9})
    first = validation_batch(rows, config, mask_token_id=MASK)
    assert equal(first, validation_batch(rows, config, mask_token_id=MASK))
    assert not first.hidden_BL[:, :3].any() and first.hidden_BL[:, 3:7].float().mean().item() == pytest.approx(
        0.5, abs=0.05
    )
    adapted = validation_batch(text(4, 8), pretrain_config(adaptation={"random_length_frac": 1.0}), mask_token_id=MASK)
    assert adapted.opened_LL is None and adapted.num_weight == 32


# Shares


def shares(batch: NoisedRows, sizes: list[int]) -> list[NoisedRows]:
    edges = torch.tensor([0, *sizes]).cumsum(0).tolist()
    assert edges[-1] == len(batch)
    return [batch.take(slice(a, b)) for a, b in pairwise(edges)]


@pytest.mark.parametrize("sizes", [[4, 4], [1] * 8, [3, 5]])
def test_losses_gradients_and_metrics_of_shares_add_up(tokenizer, sizes):
    model = small_model(tokenizer).double()
    config = pretrain_config(adaptation={"anneal_steps": 4, "random_length_frac": 0.5, "unnoised_prefix_frac": 0.5})
    batch = noised_batch(text_rows(list(range(96)), 12), config, step=2, mask_token_id=model.mask_token_id)
    loss, metrics = batch_loss(model, batch)
    (whole,) = torch.autograd.grad(loss, [model.backbone.model.embed_tokens.weight])
    total, gradient, sums = 0.0, torch.zeros_like(whole), dict.fromkeys(metrics, 0.0)
    for share in shares(batch, sizes):
        part, part_metrics = batch_loss(model, share)
        gradient += torch.autograd.grad(part, [model.backbone.model.embed_tokens.weight])[0]
        total += part.item()
        sums = {name: sums[name] + part_metrics[name] for name in sums}
    assert total == pytest.approx(loss.item(), rel=1e-12)
    assert sums == pytest.approx(metrics, rel=1e-12)
    assert (gradient - whole).abs().max() < 1e-12 * whole.abs().max() + 1e-14


def test_a_share_without_hidden_tokens_reaches_every_parameter(tokenizer):
    model = small_model(tokenizer)
    batch = noised_batch(text_rows(list(range(64)), 8), pretrain_config(), step=0, mask_token_id=model.mask_token_id)
    nothing_BL = torch.zeros(1, 8)
    empty = replace(batch.take(slice(0, 1)), weight_BL=nothing_BL, hidden_BL=nothing_BL.bool())
    loss, metrics = batch_loss(model, empty)
    loss.backward()
    assert loss.item() == metrics["loss/nll"] == 0.0 and metrics["data/tokens"] == 8
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# Training


def test_muon_takes_the_matrices_inside_the_blocks_only(tokenizer):
    model = small_model(tokenizer)
    adamw, muon = make_optimizers(model, SupervisedOptim(lr=1e-3, muon_lr=1e-2))
    names = {id(p): n for n, p in model.named_parameters()}
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    by_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert by_muon | by_adamw == set(names.values()) and not by_muon & by_adamw
    assert all(".layers." in n and n.endswith("proj.weight") for n in by_muon) and len(by_muon) == 14
    assert "backbone.model.embed_tokens.weight" in by_adamw
    assert {g["peak_lr"] for g in muon.param_groups} == {1e-2}
    assert {g["peak_lr"] for g in adamw.param_groups} == {1e-3}


def test_it_overfits_three_rows_and_the_sampler_gives_them_back(tokenizer):
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    texts = [("add one", "x + 1"), ("two away", "x - 2"), ("double it", "x * 2")]
    pairs = [(tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]) for prompt, completion in texts]
    width, window = max(len(p) for p, _ in pairs), max(len(c) for _, c in pairs) + 2
    rows = []
    for prompt, completion in pairs:
        left, fill = width - len(prompt), window - len(completion) - 1
        ids = (*[pad] * left, *prompt, *completion, end, *[pad] * fill)
        rows.append(Row(ids=ids, lengths=(len(ids) - left,), prompts=(len(prompt),), left=left, fill=fill))
    batch = collate(rows * 2, length=width + window, pad_token_id=pad, pad_weight=1.0)
    model = small_model(tokenizer)
    config = sft_config(optim={"lr": 1e-2, "muon_lr": 1e-2, "weight_decay": 0.0})
    losses = [metrics["loss/diffusion"] for metrics in train(model, config, lambda step: batch, 120)]
    assert sum(losses[-20:]) / 20 < 0.1 < 3 < losses[0]
    result = sample(
        model.eval(),
        batch.ids_NL[:3, :width],
        batch.document_NL[:3, :width].bool(),
        num_tokens=window,
        params=SamplingParams(steps=window, temperature=0.0, top_p=None, top_k=None),
        seeds=[1, 2, 3],
    )
    assert torch.equal(result.completion_ids_BC, batch.ids_NL[:3, width:])
