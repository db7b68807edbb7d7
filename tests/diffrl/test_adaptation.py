"""Adaptation pre-training pays: an autoregressive model becomes a diffusion model sooner than random weights do."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from diffrl.config import PretrainConfig
from diffrl.data.corpus import microcode_text
from diffrl.data.shards import SupervisedRows
from diffrl.diffusion import batch_loss
from diffrl.models.dream import DreamModel
from diffrl.models.tiny import tiny_config, tiny_model, train_tokenizer
from diffrl.supervised import validation_batch
from tests.diffrl.training import pretrain_config, text_rows, train

LENGTH, BATCH, HELD_OUT = 64, 16, 64
PARENT_STEPS, STEPS, EVERY = 100, 40, 10
GOAL = 2.6  # of the validation loss, nats per token; random weights start at 8


class Corpus:
    """Windows of microcode text, some of them held out; the rows of a step are drawn from it alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str):
        rows = text_rows(tokenizer(text, add_special_tokens=False)["input_ids"], LENGTH)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        self.held_out, self.training = pick(rows, order[:HELD_OUT]), pick(rows, order[HELD_OUT:])

    def rows(self, step: int) -> SupervisedRows:
        generator = torch.Generator().manual_seed(step)
        return pick(self.training, torch.randint(len(self.training), (BATCH,), generator=generator))


def pick(rows: SupervisedRows, index: torch.Tensor) -> SupervisedRows:
    return replace(rows, **{name: getattr(rows, name)[index] for name in SupervisedRows.__slots__})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([microcode_text()], vocab_size=512)


@pytest.fixture(scope="module")
def corpus(tokenizer) -> Corpus:
    return Corpus(tokenizer, microcode_text())


def random_model(tokenizer) -> DreamModel:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    return tiny_model(tokenizer, generator=generator, hidden_size=112, num_layers=3, max_positions=LENGTH)


@pytest.fixture(scope="module")
def parent(tokenizer, corpus) -> Qwen2ForCausalLM:
    """Stock Qwen2, trained by transformers' own causal loss from the same random weights."""
    config = tiny_config(tokenizer, hidden_size=112, num_layers=3, max_positions=LENGTH)
    stock = Qwen2ForCausalLM(config)
    stock.load_state_dict(random_model(tokenizer).backbone.state_dict())
    optimizer = torch.optim.AdamW(stock.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(PARENT_STEPS):
        ids = corpus.rows(1_000_000 + step).ids_NL
        loss = stock(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1
    return stock


def adapted(parent: Qwen2ForCausalLM, tokenizer) -> DreamModel:
    model = random_model(tokenizer)
    model.backbone.load_state_dict(parent.state_dict())
    return model


def curve(model: DreamModel, corpus: Corpus, config: PretrainConfig, num_steps: int) -> list[float]:
    """Validation loss, under full attention, before and after every `EVERY` steps."""
    validation = validation_batch(corpus.held_out, config, mask_token_id=model.mask_token_id)

    def measured() -> float:
        with torch.no_grad():
            return batch_loss(model, validation)[0].item()

    losses = []

    def rows(step: int) -> SupervisedRows:
        if step % EVERY == 0:
            losses.append(measured())
        return corpus.rows(step)

    train(model, config, rows, num_steps)
    return [*losses, measured()]


def test_an_adapted_parent_needs_at_most_half_the_tokens_of_random_weights(parent, tokenizer, corpus):
    def config(anneal_steps: int) -> PretrainConfig:
        optim = {"lr": 3e-3, "weight_decay": 0.0}
        return pretrain_config(optim=optim, adaptation={"anneal_steps": anneal_steps})

    curves = {
        "annealed": curve(adapted(parent, tokenizer), corpus, config(STEPS // 2), STEPS),
        "at once": curve(adapted(parent, tokenizer), corpus, config(0), STEPS),
        "random weights": curve(random_model(tokenizer), corpus, config(0), 2 * STEPS),
    }
    tokens = EVERY * BATCH * LENGTH
    for name, losses in curves.items():
        print(f"{name:>15}: " + "  ".join(f"{i * tokens // 1000}k {loss:.2f}" for i, loss in enumerate(losses)))
    for name in ("annealed", "at once"):
        reached = next(i for i, loss in enumerate(curves[name]) if loss <= GOAL)
        assert min(curves["random weights"][: 2 * reached + 1]) > GOAL, name
