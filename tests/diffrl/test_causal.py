"""The autoregressive baseline: scored, trained and sampled as transformers does it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2ForCausalLM

from diffrl.causal_sampler import CausalEngine, engine_for
from diffrl.config import ModelConfig, PretrainConfig, RLConfig, SftConfig
from diffrl.config_file import validate
from diffrl.data.shards import SupervisedRows
from diffrl.diffusion import batch_loss
from diffrl.estimators import ESTIMATORS
from diffrl.models.causal import CausalModel
from diffrl.models.dream import DreamModel
from diffrl.models.folders import check_attention, load_model, save_model
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.models.tiny import tiny_config, tiny_model, tiny_of, train_tokenizer
from diffrl.sampler import Canvas, Engine, SamplingParams
from diffrl.scoring import completion_logprobs
from diffrl.supervised import noised_batch
from diffrl.types import ScoringBatch
from diffrl.views import ViewOptions

GREEDY = SamplingParams(steps=1, temperature=0.0, top_p=None, top_k=None)
FREE = SamplingParams(steps=1, temperature=1.0, top_p=None, top_k=None)
WINDOW = 9


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def f(x):\n    return x + 1\n"], vocab_size=300)


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock Qwen2 with random weights, written by transformers."""
    path = tmp_path_factory.mktemp("qwen")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = Qwen2ForCausalLM(tiny_config(tokenizer, hidden_size=32, num_layers=2, max_positions=64))
        for parameter in stock.parameters():
            parameter.data.mul_(4)  # else all tokens are about as probable
    stock.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stock(folder: Path) -> Qwen2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.fixture(scope="module")
def model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> CausalModel:
    model = load_policy(ModelConfig(path=str(folder), family="causal"), tokenizer, seed=0)
    assert isinstance(model, CausalModel)
    return model.eval()


def batch_of(vocab_size: int) -> ScoringBatch:
    """Two prompts, one of them padded on the left, two completions of each."""
    generator = torch.Generator().manual_seed(1)
    prompt_BP = torch.randint(6, vocab_size, (2, 5), generator=generator).repeat_interleave(2, 0)
    mask_BP = torch.ones(4, 5, dtype=torch.bool)
    mask_BP[2:, :2] = False
    return ScoringBatch(
        prompt_ids_BP=prompt_BP,
        prompt_mask_BP=mask_BP,
        completion_ids_BC=torch.randint(6, vocab_size, (4, WINDOW), generator=generator),
        scored_BC=torch.arange(WINDOW)[None] < torch.tensor([[9], [4], [7], [1]]),
        views=(ESTIMATORS["causal"].views(torch.Generator(), 4, WINDOW, ViewOptions()),),
        group_size=2,
    )


def test_logprobs_are_those_of_transformers(model: CausalModel, stock: Qwen2ForCausalLM):
    batch = batch_of(model.config.vocab_size)
    ids_BL = torch.cat([batch.prompt_ids_BP, batch.completion_ids_BC], 1)
    mask_BL = torch.cat([batch.prompt_mask_BP, torch.ones_like(batch.completion_ids_BC, dtype=torch.bool)], 1)
    positions_BL = (mask_BL.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits_BLV = stock(ids_BL, attention_mask=mask_BL.long(), position_ids=positions_BL).logits
        for chunked in (False, True):
            ours_BC = completion_logprobs(
                model, batch, batch.views[0], mask_token_id=model.mask_token_id, chunked=chunked, share=False
            )
            picked_BC = logits_BLV[:, 4:-1].gather(2, batch.completion_ids_BC[:, :, None])[:, :, 0]
            theirs_BC = picked_BC - logits_BLV[:, 4:-1].logsumexp(-1)
            assert torch.equal(ours_BC, theirs_BC.masked_fill(~batch.scored_BC, 0.0))  # to the last bit
    assert float(ours_BC.min()) < -8


def test_the_probe_tells_the_families_apart(model: CausalModel):
    check_attention(model)
    with pytest.raises(RuntimeError, match="the diffusion model does not attend to later tokens"):

        class Closed(CausalModel):
            family = "diffusion"

        check_attention(Closed(model.backbone, mask_token_id=2))
    with pytest.raises(RuntimeError, match="the causal model attends to later tokens"):

        class Open(DreamModel):
            family = "causal"

        check_attention(Open(model.backbone, mask_token_id=2))
    assert Open.model_types == DreamModel.model_types


def test_the_export_is_a_stock_qwen2(
    folder: Path, model: CausalModel, stock: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    save_model(model, tmp_path / "export")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto").eval()
    ids = torch.arange(7, 20)[None]
    assert torch.equal(again(ids).logits, stock(ids).logits)
    tiny = tiny_of(CausalModel, tokenizer, generator=torch.Generator().manual_seed(0), hidden_size=32, num_layers=1)
    save_model(tiny, tmp_path / "tiny")
    loaded = load_model(tmp_path / "tiny", causal=True)
    assert isinstance(loaded, CausalModel) and torch.equal(
        loaded(ids, torch.ones_like(ids)), tiny(ids, torch.ones_like(ids))
    )
    assert isinstance(load_model(folder, mask_token_id=2), DreamModel)  # an adaptation begins with it
    save_model(tiny_model(tokenizer, generator=torch.Generator(), hidden_size=32, num_layers=1), tmp_path / "dream")
    with pytest.raises(ValueError, match=r"model\.family: 'causal' must be diffusion for .*dream"):
        load_model(tmp_path / "dream", causal=True)


def test_tuning_is_transformers_own_loss(model: CausalModel, stock: Qwen2ForCausalLM):
    generator = torch.Generator().manual_seed(3)
    ids_NL = torch.randint(6, model.config.vocab_size, (2, 12), generator=generator)
    document_NL = torch.ones(2, 12, dtype=torch.long)
    document_NL[1, 10:] = 0
    maskable_NL = (torch.arange(12) >= 5)[None] & (document_NL != 0)
    rows = SupervisedRows(
        ids_NL=ids_NL, document_NL=document_NL, maskable_NL=maskable_NL, loss_weight_NL=maskable_NL.float()
    )
    config = validate({"stage": "sft", "model": {"family": "causal"}, "data": {"source": "microcode"}}, "test")
    assert isinstance(config, SftConfig)
    batch = noised_batch(rows, config, step=0, mask_token_id=model.mask_token_id, epoch_steps=10)
    loss, metrics = batch_loss(model, batch)
    theirs = stock(ids_NL, attention_mask=document_NL, labels=ids_NL.masked_fill(~maskable_NL, -100)).loss
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=0)
    assert metrics["loss/nll"] == metrics["loss/diffusion"] and metrics["loss/hidden_frac"] == 1.0


# Sampling


def engine_of(
    model: CausalModel, tokenizer: PreTrainedTokenizerFast, params: SamplingParams, max_tokens: int = 1 << 20
):
    engine = engine_for(
        model, params, max_tokens=max_tokens, vocab_size=len(tokenizer), end_ids=(ENDS[0], tokenizer.pad_token_id)
    )
    assert isinstance(engine, CausalEngine)
    return engine


ENDS = (299,)  # a token that the model does not come to


def canvases(prompt: list[int], seeds: list[int]) -> list[Canvas]:
    ids_L = torch.tensor([*prompt, *[0] * WINDOW])
    return [Canvas(ids_L=ids_L, hidden_L=torch.arange(len(ids_L)) >= len(prompt), seed=seed) for seed in seeds]


def test_greedy_rows_are_what_transformers_generates(
    model: CausalModel, stock: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
):
    engine = engine_of(model, tokenizer, GREEDY)
    prompts = [[9, 20, 31], [40, 8, 7, 30, 12]]
    for prompt in prompts:
        for canvas in canvases(prompt, [5]):
            engine.add(canvas)
    for prompt, row in zip(prompts, engine.run(), strict=True):
        ids = torch.tensor([prompt])
        out = stock.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=WINDOW, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        theirs = out.sequences[0, len(prompt) :].tolist()
        ours = row.ids_L[len(prompt) :].tolist()
        assert ours == theirs and ENDS[0] not in ours
        probabilities = torch.stack([logits[0].softmax(-1).max() for logits in out.logits])
        torch.testing.assert_close(row.probability_L[len(prompt) :], probabilities, rtol=1e-5, atol=0)
        assert row.step_map_L.tolist() == [-1] * len(prompt) + list(range(WINDOW))
        assert row.passes == row.exact_passes == WINDOW


def test_a_row_depends_on_its_own_call_alone(model: CausalModel, tokenizer: PreTrainedTokenizerFast):
    first, second = canvases([9, 20, 31], [1, 2, 3, 4, 5, 6, 7, 8]), canvases([9, 20, 31], [11, 12])
    alone = engine_of(model, tokenizer, FREE)
    for canvas in first:
        alone.add(canvas)
    expected = alone.run()
    beside = engine_of(model, tokenizer, FREE)
    tickets = [beside.add(canvas) for canvas in (*second, *first)]
    filled = dict(beside.step() + beside.step())
    assert sorted(filled) == tickets and not beside.busy
    for row, ticket in zip(expected, tickets[2:], strict=True):
        assert torch.equal(row.ids_L, filled[ticket].ids_L)
        assert torch.equal(row.probability_L, filled[ticket].probability_L)
    assert len({tuple(row.ids_L.tolist()) for row in expected}) == 8
    small = engine_of(model, tokenizer, FREE, max_tokens=3 * 12)
    for canvas in first:
        small.add(canvas)
    assert [len(batch) for batch in small.waiting] == [3, 3, 2]
    assert [row.ids_L.tolist() for row in small.run()] == [row.ids_L.tolist() for row in expected]


def test_what_follows_the_end_is_padding(model: CausalModel, tokenizer: PreTrainedTokenizerFast):
    """With every token an end, a completion is one token and padding."""
    pad = int(tokenizer.pad_token_id or 0)
    engine = CausalEngine(model, GREEDY, max_tokens=99, vocab_size=300, end_ids=(*range(300), pad))
    engine.add(canvases([9, 20, 31], [5])[0])
    (row,) = engine.run()
    assert row.ids_L[4:].tolist() == [pad] * (WINDOW - 1) and row.ids_L[3] != pad
    assert row.passes == 1 and engine.num_passes == 1
    assert row.probability_L[3] < 1 and bool((row.probability_L[4:] == 1).all())


def test_no_holes_are_filled(model: CausalModel, tokenizer: PreTrainedTokenizerFast):
    engine = engine_of(model, tokenizer, GREEDY)
    hidden_L = torch.tensor([False, True, False])
    with pytest.raises(ValueError, match="no infilling"):
        engine.add(Canvas(ids_L=torch.tensor([7, 0, 9]), hidden_L=hidden_L, seed=0))
    dream = tiny_model(tokenizer, generator=torch.Generator(), hidden_size=32, num_layers=1)
    assert isinstance(engine_for(dream, GREEDY, max_tokens=9, vocab_size=300, end_ids=(1, 0)), Engine)


# Configs


RL = {"stage": "rl", "model": {"family": "causal"}, "data": {"source": "microcode"}, "method": {"estimator": "causal"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {}}, "method.estimator: 'coupled' must be one for a model of model.family causal: causal"),
        ({"model": {}}, "method.estimator: 'causal' must be one for a model of model.family diffusion: coupled"),
        ({"sampling": {"early_end": True}}, "sampling.early_end: True must be left out with model.family causal"),
        ({"sampling": {"tokens_per_step": 2}}, "sampling.tokens_per_step: 2 must be left out with model.family causal"),
        ({"rollout": {"compile": True}}, "rollout.compile: True must be left out with model.family causal"),
        ({"stage": "pretrain", "method": None}, "model.family: 'causal' must be diffusion in pretrain"),
    ],
)
def test_what_a_causal_model_cannot_do_is_said(change: dict, message: str):
    raw = {key: value for key, value in {**RL, **change}.items() if value is not None}
    with pytest.raises(ValueError) as error:
        validate(raw, "test")
    assert message in str(error.value)
    assert isinstance(validate(RL, "test"), RLConfig)


def test_a_causal_tokenizer_needs_no_mask(folder: Path, tmp_path: Path):
    tokenizer = load_policy_tokenizer(ModelConfig(path=str(folder), family="causal"))
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_policy_tokenizer(ModelConfig(path=str(tmp_path), family="causal")).mask_token_id is None
    with pytest.raises(ValueError, match="no mask token"):
        load_policy_tokenizer(ModelConfig(path=str(tmp_path)))
    assert PretrainConfig.model_fields["adaptation"].default is None
