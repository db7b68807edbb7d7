"""Documents that share a row, padding, and attention between causal and full: what a position sees, and what it does not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from diffrl.config import LoraConfig
from diffrl.diffusion import batch_loss, noised_rows
from diffrl.models.base import PolicyModel
from diffrl.models.dream import DreamModel
from diffrl.models.llada import LladaModel
from diffrl.models.lora import add_adapters

MASK, VOCABULARY = 63, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "attn_implementation": "sdpa",
}
# Two rows: three documents and padding; padding, two documents, padding.
DOCUMENT = torch.tensor([[1] * 5 + [2] * 1 + [3] * 6 + [0] * 4, [0] * 3 + [1] * 6 + [2] * 6 + [0]])
LENGTH = DOCUMENT.shape[1]


@pytest.fixture(params=[DreamModel, LladaModel])
def model(request) -> PolicyModel:
    torch.set_num_threads(1)
    config = Qwen2Config(**SIZES) if request.param is DreamModel else LlamaConfig(**SIZES)
    return request.param.from_config(config, mask_token_id=MASK, generator=torch.Generator().manual_seed(0)).eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(60, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: PolicyModel, ids: Tensor, document: Tensor, opened: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        everywhere = model(ids, document, opened_LL=opened)
        real = document.bool()
        selected = model(ids, document, real, opened_LL=opened)
    assert torch.allclose(selected, everywhere[real], atol=2e-5)  # the two ways through the last layer
    return everywhere


OPENED = {
    "full": None,
    "half": torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5,
    "causal": torch.zeros(LENGTH, LENGTH, dtype=torch.bool),
}


@pytest.mark.parametrize("opened", OPENED)
@pytest.mark.parametrize(("row", "number"), [(0, 1), (0, 2), (0, 3), (0, 0), (1, 1), (1, 2), (1, 0)])
def test_a_document_leaves_all_others_as_they_are_to_the_last_bit(model, row, number, opened):
    ids = draw(2, LENGTH)
    changed = ids.clone()
    inside = DOCUMENT[row] == number
    changed[row, inside] = (changed[row, inside] + 7) % 60
    before, after = (logits(model, x, DOCUMENT, OPENED[opened]) for x in (ids, changed))
    same = DOCUMENT.bool()
    same[row] &= ~inside
    assert torch.equal(before[same], after[same])
    if number:
        assert not torch.equal(before[row, inside], after[row, inside])


@pytest.mark.parametrize("opened", OPENED)
def test_a_document_in_company_equals_the_document_alone(model, opened):
    """To 2e-5: kernels of other lengths add up in another order."""
    ids = draw(2, LENGTH)
    together = logits(model, ids, DOCUMENT, OPENED[opened])
    for row, number in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]:
        place = (DOCUMENT[row] == number).nonzero().flatten()
        part = OPENED[opened]
        alone = logits(
            model,
            ids[row, place][None],
            torch.ones(1, len(place), dtype=torch.long),
            None if part is None else part[place[:, None], place],
        )
        assert torch.allclose(alone[0], together[row, place], atol=2e-5)


def test_documents_that_may_see_each_other_would_differ(model):
    ids = draw(1, LENGTH)
    apart = logits(model, ids, DOCUMENT[:1])
    joined = logits(model, ids, DOCUMENT[:1].clamp(max=1))
    assert (apart - joined)[DOCUMENT[:1].bool()].abs().max() > 0.1


def test_full_rows_of_documents_leak_nothing_either(model):
    """Without any padding, where a row of one document needs no mask."""
    document = torch.tensor([[1] * 5 + [2] * 7])
    ids = draw(1, 12)
    changed = ids.clone()
    changed[0, 5:] += 1
    before, after = logits(model, ids, document), logits(model, changed, document)
    assert torch.equal(before[0, :5], after[0, :5]) and not torch.equal(before[0, 5], after[0, 5])


def test_a_position_sees_what_is_opened_and_nothing_else_later(model):
    """Of one layer: in several, what is opened for one position reaches others through it."""
    model.backbone.model.layers = model.backbone.model.layers[:1]
    shift = int(model.shifted)
    for i, j in [(2, 4), (6, 11), (8, 9)]:  # in documents 1, 3 and 3 of row 0
        ids = draw(1, LENGTH)
        changed = ids.clone()
        changed[0, j] += 1
        opened = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
        opened[i, j] = True
        difference = (
            (logits(model, ids, DOCUMENT[:1], opened) - logits(model, changed, DOCUMENT[:1], opened)).abs().amax(-1)[0]
        )
        document = DOCUMENT[0]
        sees = {i} | {k for k in range(LENGTH) if k >= j and document[k] == document[j]}
        # What position k computes is about token k + 1 where states are shifted, and about k too at a document's start.
        about = {k + shift for k in sees if k + shift < LENGTH and document[k + shift] == document[k]}
        about |= {k for k in sees if shift and (k == 0 or document[k - 1] != document[k])}
        real = {k for k in range(LENGTH) if document[k]}
        assert {k for k in real if difference[k] > 0} == about


def test_opened_everywhere_is_full_attention(model):
    ids = draw(2, LENGTH)
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    assert torch.equal(logits(model, ids, DOCUMENT), logits(model, ids, DOCUMENT, everything))


def test_bool_masks_mean_one_document(model):
    ids = draw(2, LENGTH)
    assert torch.equal(logits(model, ids, DOCUMENT.bool()), logits(model, ids, DOCUMENT.clamp(max=1)))
    ones = torch.ones_like(DOCUMENT)
    assert torch.equal(logits(model, ids, ones.bool()), logits(model, ids, 3 * ones))


# The loss


def packed_batch(document: Tensor = DOCUMENT, seed: int = 1, opened: Tensor | None = None):
    ids = draw(*document.shape, seed=seed)
    hidden = (torch.rand(document.shape, generator=torch.Generator().manual_seed(5)) < 0.6) & document.bool()
    return noised_rows(
        ids, document, document.bool().float(), hidden, torch.tensor([0.5, 0.25]), mask_token_id=MASK, opened_LL=opened
    )


@pytest.mark.parametrize("opened", OPENED)
def test_loss_and_gradient_equal_those_of_whole_logits(model, opened):
    batch = packed_batch(opened=OPENED[opened])
    loss, metrics = batch_loss(model, batch)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    everything = model(batch.noised_ids_BL, batch.document_BL, opened_LL=batch.opened_LL)
    nll = torch.nn.functional.cross_entropy(everything.flatten(0, 1), batch.ids_BL.flatten(), reduction="none")
    hidden = batch.hidden_BL.flatten()
    weight = (batch.hidden_BL / torch.tensor([[0.5], [0.25]])).flatten()
    expected = (nll * weight).sum() / DOCUMENT.bool().sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["loss/nll"] == pytest.approx(nll[hidden].mean().item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(ours[name], p.grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("more", [1, 5, 48])
def test_padding_on_the_right_changes_nothing(model, more):
    """The loss to 1e-6, since kernels of other lengths add up in another order."""
    batch = packed_batch()
    wider = torch.nn.functional.pad(DOCUMENT, (0, more))
    padded = noised_rows(
        torch.nn.functional.pad(batch.ids_BL, (0, more), value=17),
        wider,
        wider.bool().float(),
        torch.nn.functional.pad(batch.hidden_BL, (0, more)),
        batch.t_B,
        mask_token_id=MASK,
    )
    with torch.no_grad():
        (loss, metrics), (same, same_metrics) = batch_loss(model, batch), batch_loss(model, padded)
    assert loss.item() == pytest.approx(same.item(), rel=1e-6)
    assert metrics == pytest.approx(same_metrics, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of dynamo
@pytest.mark.parametrize("way", ["recompute", "lora", "compile"])
def test_other_ways_to_the_same_gradient(model, way):
    batch = packed_batch(opened=OPENED["half"])
    model.train()
    if way == "lora":
        add_adapters(model, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    loss, _ = batch_loss(model, batch)
    expected = torch.autograd.grad(loss, trained)
    if way == "recompute":
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    if way == "compile":
        model.backbone.model.layers[0].compile(backend="aot_eager")
    again, _ = batch_loss(model, batch)
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(expected, torch.autograd.grad(again, trained), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    if way == "lora":
        assert any(g.any() for g in expected) and len(trained) == 2 * 7 * 3


# The autoregressive parent


def test_causal_attention_with_everything_visible_is_the_parent():
    """What adaptation starts from: the loss of stock Qwen2 on its shifted targets, document by document."""
    torch.set_num_threads(1)
    model = DreamModel.from_config(
        Qwen2Config(**SIZES), mask_token_id=MASK, generator=torch.Generator().manual_seed(0)
    ).double()
    stock = Qwen2ForCausalLM(Qwen2Config(**SIZES)).double().eval()
    stock.load_state_dict(model.backbone.state_dict())
    ids, weight = draw(2, LENGTH), DOCUMENT.bool().float()
    weight[:, 1:] *= DOCUMENT[:, 1:] == DOCUMENT[:, :-1]  # the first token of a document has no past
    weight[:, 0] = 0.0
    masked = noised_rows(
        ids, DOCUMENT, weight, DOCUMENT.bool(), torch.ones(2), mask_token_id=MASK, opened_LL=OPENED["causal"]
    )
    loss, _ = batch_loss(model, replace(masked, noised_ids_BL=ids))
    total, count = 0.0, 0
    for row in range(2):
        for number in range(1, int(DOCUMENT[row].max()) + 1):
            alone = ids[row, DOCUMENT[row] == number][None]
            if alone.shape[1] > 1:
                total += stock(input_ids=alone, labels=alone).loss.item() * (alone.shape[1] - 1)
                count += alone.shape[1] - 1
    assert count == weight.sum()
    assert loss.item() == pytest.approx(total / count, rel=1e-6)
    assert abs(batch_loss(model, masked)[0].item() - loss.item()) > 0.1
