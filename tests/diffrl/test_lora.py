"""Adapters: nothing at first, then W + scale * B A whoever computes it; and folders that stock peft reads."""

import json
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen2Config

from diffrl.config import LoraConfig, ModelConfig, TinyModel
from diffrl.config.supervised import SupervisedOptim
from diffrl.config_file import validate
from diffrl.data.shards import SupervisedRows
from diffrl.errors import ConfigError
from diffrl.models.base import PolicyModel
from diffrl.models.dream import DreamModel
from diffrl.models.folders import load_model, save_model, state_dict_for_export
from diffrl.models.llada import LladaModel
from diffrl.models.loading import check_policy, load_policy
from diffrl.models.lora import adapter_state, adapters_off, add_adapters, merge, save_adapter
from diffrl.models.tiny import train_tokenizer
from diffrl.supervised import make_optimizers
from tests.diffrl.training import pretrain_config, text_rows, train

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_model(family: type[PolicyModel] = DreamModel, *, tied: bool = False) -> PolicyModel:
    torch.set_num_threads(1)
    config = (Qwen2Config if family is DreamModel else LlamaConfig)(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "sdpa"
    return family.from_config(config, mask_token_id=63, generator=torch.Generator().manual_seed(0))


def with_adapters(model: PolicyModel, *, seed: int = 1, trained: bool = True, **options: Any) -> PolicyModel:
    """`trained`: B is not 0 any more."""
    generator = torch.Generator().manual_seed(seed)
    add_adapters(model, LoraConfig(**{"rank": 4, "alpha": 8.0, **options}), generator)
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.1, generator=generator)
    return model


def logits_of(model: Any, seed: int = 7) -> torch.Tensor:
    ids = torch.randint(0, 60, (3, 10), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids, torch.arange(10) >= torch.tensor([[3], [0], [1]]))


@pytest.mark.parametrize("family", [DreamModel, LladaModel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_its_base_exactly(family, dtype):
    base = make_model(family).to(dtype)
    expected, tensors = logits_of(base), {k: v.clone() for k, v in state_dict_for_export(base).items()}
    state = torch.get_rng_state()
    model = with_adapters(base, trained=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits_of(model), expected)
    merged = state_dict_for_export(model)
    assert merged.keys() == tensors.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name) and parameter.dtype == dtype
        if ".lora_" in name:
            assert bool(parameter.eq(0).all()) == (".lora_B." in name)


def test_adapters_come_from_the_generator_alone():
    first, again, other = (adapter_state(with_adapters(make_model(), seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())
    assert not any(torch.equal(first[name], tensor) for name, tensor in other.items())
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    assert first[name].shape == (4, 48)
    assert first[name].abs().max() <= 48**-0.5  # uniform in +-1/sqrt(inputs), as peft draws


@pytest.mark.parametrize("family", [DreamModel, LladaModel])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_it_is_the_same_model(family, tied, tmp_path):
    model = with_adapters(make_model(family, tied=tied))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    merged = load_model(tmp_path)
    assert type(merged) is family and merged.lora is None
    assert torch.allclose(logits_of(merged), logits_of(model), atol=1e-4)
    assert (logits_of(merged) - logits_of(make_model(family, tied=tied))).abs().max() > 0.1
    base, stored = state_dict_for_export(make_model(family, tied=tied)), state_dict_for_export(merged)
    assert base.keys() == stored.keys()
    changed = {name for name in base if not torch.equal(base[name], stored[name])}
    assert changed == {name for name in base if base[name].ndim == 2 and ("layers." in name or "blocks." in name)}


def test_merging_by_hand():
    weight, a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5], [2.0]])
    assert merge(weight, a, b, 2.0).tolist() == [[2.0, 1.0], [7.0, 0.0]]
    rounded = merge(weight.bfloat16(), a.bfloat16(), b.bfloat16() / 512, 2.0)
    assert rounded.dtype == torch.bfloat16 and rounded[0, 0] == 1.0  # below half a unit in the last place


def test_merged_tensors_are_computed_when_read(monkeypatch):
    model = with_adapters(make_model())
    calls: list[torch.Size] = []
    monkeypatch.setattr("diffrl.models.lora.merge", lambda w, *rest: calls.append(w.shape) or merge(w, *rest))
    state = state_dict_for_export(model)
    assert calls == [] and len(state) == len(state_dict_for_export(make_model()))
    assert state["model.norm.weight"].data_ptr() == model.backbone.model.norm.weight.data_ptr()
    assert calls == []
    first = state["model.layers.0.mlp.up_proj.weight"]
    assert calls == [torch.Size([48, 32])] and first.data_ptr() != state["model.layers.0.mlp.up_proj.weight"].data_ptr()


def test_with_adapters_off_it_is_the_base():
    base = logits_of(make_model())
    model = with_adapters(make_model())
    adapted = logits_of(model)
    assert not torch.equal(adapted, base)
    with adapters_off(model):
        assert torch.equal(logits_of(model), base)
        assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
    assert torch.equal(logits_of(model), adapted)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(logits_of(model), adapted)
    with pytest.raises(AssertionError), adapters_off(make_model()):
        pass


# Targets


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (None, {f"model.layers.{i}" for i in range(2)}),
        (["q_proj", "1.mlp.up_proj"], {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}),
        (["model.layers.0.self_attn.v_proj"], {"0.self_attn.v_proj"}),
    ],
)
def test_targets_are_ends_of_names(targets, layers):
    names = adapter_state(with_adapters(make_model(), targets=targets))
    adapted = {n.split(".lora_")[0].removeprefix("base_model.model.") for n in names}
    if targets is None:
        assert adapted == {
            f"{layer}.{'self_attn' if m[0] in 'qkvo' else 'mlp'}.{m}" for layer in layers for m in MATRICES
        }
    else:
        assert adapted == {f"model.layers.{layer}" for layer in layers}
    assert len(names) == 2 * len(adapted)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "mlp", "q_pro", "norm", "proj"])
def test_a_target_that_is_no_layer_is_refused(target):
    model = make_model()
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError) as caught:
        with_adapters(model, targets=["q_proj", target])
    message = str(caught.value)
    assert message.startswith(f"model.lora.targets: {target!r} is no linear layer of the blocks")
    assert message.endswith(f"known: {', '.join(MATRICES)}") and "\n" not in message
    assert ("did you mean 'q_proj'?" in message) == (target == "q_pro")
    assert before == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("from_folder", [False, True])
def test_targets_are_checked_before_any_weights_are_read(from_folder, tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["x + 1"], vocab_size=270)
    path = None
    tiny = TinyModel(hidden_size=32, intermediate_size=48, num_layers=1, max_length=64)
    if from_folder:
        path = str(tmp_path)
        save_model(load_policy(ModelConfig(tiny=tiny), tokenizer, seed=0), path)
        monkeypatch.setattr("diffrl.models.folders.load_file", None)
    config = ModelConfig(path=path, tiny=tiny, lora=LoraConfig(targets=["attn_out"]))
    with pytest.raises(ValueError, match=r"model\.lora\.targets: 'attn_out'"):
        check_policy(config, tokenizer)
    check_policy(config.model_copy(update={"lora": LoraConfig(targets=["o_proj"])}), tokenizer)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"dropout": 0.1}, "model.lora.dropout: 0.1 must be 0 in RL: old and new scores"),
        ({"rank": 0}, "model.lora.rank: 0 must be greater than or equal to 1"),
        ({"alpha": 0}, "model.lora.alpha: 0 must be greater than 0"),
        ({"targets": []}, "model.lora.targets: [] "),
        ({"publish": "both"}, "model.lora.publish: 'both' must be 'merged' or 'adapter'"),
        ({"r": 4}, "model.lora.r: unknown key"),
    ],
)
def test_settings_that_cannot_be_used(lora, message):
    with pytest.raises(ConfigError) as caught:
        validate({"stage": "rl", "data": {"source": "microcode"}, "model": {"lora": lora}}, "c.yaml")
    assert f"c.yaml: {message}" in str(caught.value) and "\n" not in str(caught.value)


# Folders of peft


@pytest.mark.parametrize("family", [DreamModel, LladaModel])
@pytest.mark.parametrize("targets", [None, ["q_proj", "1.mlp.up_proj"]])
def test_stock_peft_reads_the_adapters(family, targets, tmp_path):
    model = with_adapters(make_model(family), targets=targets)
    assert model.lora is not None
    save_adapter(adapter_state(model), model.lora, tmp_path, base_path="some/base")
    stock = family.backbone_class(model.config).eval()
    stock.load_state_dict(make_model(family).backbone.state_dict())
    loaded = peft.PeftModel.from_pretrained(stock, str(tmp_path))
    ids = torch.randint(0, 60, (2, 10), generator=torch.Generator().manual_seed(3))
    full = torch.ones(2, 1, 10, 10, dtype=torch.bool)
    with torch.no_grad():
        hidden = loaded.base_model.model.model(input_ids=ids, attention_mask=full, use_cache=False).last_hidden_state
        expected = model.backbone.model(input_ids=ids, attention_mask=full, use_cache=False).last_hidden_state
        logits = loaded(input_ids=ids, attention_mask=full, use_cache=False).logits
    assert torch.equal(hidden, expected)
    assert torch.equal(logits, hidden @ stock.lm_head.weight.T)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["r"] == 4 and config["lora_alpha"] == 8
    assert config["target_modules"] == (sorted(MATRICES) if targets is None else targets)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == adapter_state(model).keys()


# Training


def test_only_adapters_are_trained():
    model = with_adapters(make_model(), trained=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = text_rows([5, 9, 2, 7, 11, 30, 8, 4] * 8, 8)
    config = pretrain_config(optim={"lr": 1e-2})
    losses = [metrics["loss/nll"] for metrics in train(model, config, lambda step: rows, 60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_muon_may_train_them():
    model = with_adapters(make_model())
    (muon,) = make_optimizers(model, SupervisedOptim(muon_lr=1e-2))
    assert isinstance(muon, torch.optim.Muon)
    assert {id(p) for g in muon.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_dropout_is_drawn_from_the_seed_and_the_step():
    def trained(seed: int, disturbance: int) -> list[float]:
        model = with_adapters(make_model(), dropout=0.5)

        def rows(step: int) -> SupervisedRows:
            torch.rand(disturbance)
            return text_rows(list(range(32)), 8)

        config = pretrain_config(optim={"lr": 1e-2}, seed=seed)
        return [metrics["loss/nll"] for metrics in train(model, config, rows, 3)]

    assert trained(0, 0) == trained(0, 5) != trained(1, 0)
