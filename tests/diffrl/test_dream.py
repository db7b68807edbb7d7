"""The model against stock transformers, its folders bit for bit, and what is said about folders that cannot be used."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from diffrl.config import ModelConfig, TinyModel
from diffrl.models import folders, loading
from diffrl.models.dream import DreamModel, qwen2_config
from diffrl.models.folders import check_attention, load_model, save_model
from diffrl.models.tiny import train_tokenizer

ROPE_THETA = 5000.0


def qwen_config(*, tied: bool = False, attention: str = "sdpa") -> Qwen2Config:
    torch.set_num_threads(1)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    config._attn_implementation = attention
    return config


def make_model(*, tied: bool = False, seed: int = 0) -> DreamModel:
    model = DreamModel.from_config(
        qwen_config(tied=tied), mask_token_id=63, generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():  # biases that are not all zero
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()))
    return model


def stock_of(model: DreamModel) -> Qwen2ForCausalLM:
    """transformers' own model with the same tensors, attention written out (eager)."""
    stock = Qwen2ForCausalLM(qwen_config(tied=model.config.tie_word_embeddings, attention="eager")).eval()
    stock.load_state_dict(model.backbone.state_dict())
    return stock


def token_ids(rows: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(7))


def logits_of(model: DreamModel) -> torch.Tensor:
    ids = token_ids()
    with torch.no_grad():
        return model(ids, torch.ones_like(ids, dtype=torch.bool))


def edit_config(folder: Path, *drop: str, **fields) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in drop} | fields))


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.count("model.path") <= 1
    return message


# The forward pass


def test_equals_stock_qwen2_under_full_attention_with_the_shift():
    model = make_model()
    ids = token_ids()
    with torch.no_grad():
        stock = stock_of(model)(input_ids=ids, attention_mask=torch.zeros(3, 1, 10, 10), use_cache=False).logits
    got = logits_of(model)
    assert torch.allclose(got[:, 1:], stock[:, :-1], atol=1e-5)  # position i - 1 predicts token i
    assert torch.allclose(got[:, 0], stock[:, 0], atol=1e-5)
    assert (got[:, 1:] - stock[:, 1:]).abs().max() > 0.1


def test_equals_stock_qwen2_on_padded_rows():
    model = make_model()
    ids = token_ids()
    keep = torch.arange(10) >= torch.tensor([[4], [0], [1]])
    additive = torch.zeros(3, 1, 10, 10).masked_fill(~keep[:, None, None, :], torch.finfo(torch.float32).min)
    positions = (torch.arange(10) - torch.tensor([[4], [0], [1]])).clamp(min=0)
    with torch.no_grad():
        stock = stock_of(model)(input_ids=ids, attention_mask=additive, position_ids=positions, use_cache=False).logits
        got = model(ids, keep)
    visible = keep[:, :-1]
    assert torch.allclose(got[:, 1:][visible], stock[:, :-1][visible], atol=1e-5)
    assert got.isfinite().all()


def test_selected_positions_in_row_major_order():
    model = make_model()
    ids = token_ids()
    select = torch.zeros(3, 10, dtype=torch.bool)
    select[0, [2, 9]] = select[2, [0, 5]] = True
    with torch.no_grad():
        got = model(ids, torch.ones_like(select), select)
    everything = logits_of(model)
    expected = torch.stack([everything[0, 2], everything[0, 9], everything[2, 0], everything[2, 5]])
    assert torch.allclose(got, expected, atol=1e-6)


def test_random_weights_come_from_the_generator_alone():
    state = torch.get_rng_state()
    first, again, other = make_model(), make_model(), make_model(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits_of(first), logits_of(again)) and not torch.equal(logits_of(first), logits_of(other))
    weight = first.backbone.model.embed_tokens.weight
    assert weight.std().item() == pytest.approx(0.3, rel=0.05) and abs(weight.mean().item()) < 0.03


def test_casting_keeps_the_rotary_frequencies_exact():
    model = make_model()
    exact = ROPE_THETA ** -(torch.arange(4) / 4)  # head size 8
    assert torch.allclose(model.backbone.model.rotary_emb.inv_freq, exact, rtol=1e-6)
    for cast in (model.to(torch.bfloat16), model.half(), model.float(), model.to("cpu")):
        rotary = cast.backbone.model.rotary_emb
        assert rotary.inv_freq.dtype == torch.float32 and torch.allclose(rotary.inv_freq, exact, rtol=1e-6)
    assert model.to(torch.bfloat16).backbone.lm_head.weight.dtype == torch.bfloat16
    assert model.to("meta").backbone.model.rotary_emb.inv_freq.is_meta


# Folders


@pytest.mark.parametrize("shard_bytes", [None, 10_000, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_bit_for_bit(tied, shard_bytes, tmp_path, monkeypatch):
    if shard_bytes is not None:
        monkeypatch.setattr(folders, "SHARD_BYTES", shard_bytes)
    model = make_model(tied=tied)
    save_model(model, tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    index = tmp_path / "model/model.safetensors.index.json"
    assert (len(shards) > 1) == index.exists() == (shard_bytes is not None)
    tensors = {name: shard.name for shard in shards for name in load_file(shard)}
    assert tensors.keys() == model.backbone.state_dict().keys() - ({"lm_head.weight"} if tied else set())
    if index.exists():
        stored = json.loads(index.read_text())
        assert stored["weight_map"] == tensors
        assert stored["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
        if shard_bytes == 1:
            assert len(shards) == len(tensors)
    loaded = load_model(tmp_path / "model")
    assert loaded.mask_token_id == 63 and loaded.config.tie_word_embeddings == tied
    state = loaded.backbone.state_dict()
    assert state.keys() == model.backbone.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.backbone.state_dict().items())
    assert (loaded.backbone.lm_head.weight is loaded.backbone.model.embed_tokens.weight) == tied
    assert torch.equal(logits_of(loaded), logits_of(model))
    save_model(loaded, tmp_path / "again")
    for file in (tmp_path / "model").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_bfloat16_round_trip(tmp_path):
    model = make_model().to(torch.bfloat16)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits_of(loaded), logits_of(model))  # rebuilt from its tensors it is the very same model
    assert {p.dtype for p in load_model(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_saving_over_an_older_save_leaves_nothing_of_it(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(folders, "SHARD_BYTES", 10_000)
        save_model(make_model(), tmp_path)
    newer = make_model(seed=1)
    save_model(newer, tmp_path)
    assert torch.equal(logits_of(load_model(tmp_path)), logits_of(newer))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 10_000])
def test_stock_transformers_reads_our_folders(tied, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARD_BYTES", shard_bytes)
    model = make_model(tied=tied)
    save_model(model, tmp_path)
    config = qwen2_config(json.loads((tmp_path / "config.json").read_text()))
    loaded: Any = Qwen2ForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    stock, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(stock.state_dict()[k], v) for k, v in model.backbone.state_dict().items())


@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_qwen2_folder_loads_with_a_mask_token(tied, old_style, tmp_path):
    """As transformers writes it: version 5 puts rope_theta into rope_parameters, version 4 beside it."""
    torch.manual_seed(0)
    stock = Qwen2ForCausalLM(qwen_config(tied=tied, attention="eager")).eval()
    stock.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "qwen2" and raw["rope_parameters"]["rope_theta"] == ROPE_THETA
    if old_style:
        edit_config(tmp_path, "rope_parameters", rope_theta=ROPE_THETA, rope_scaling=None)
    assert "config.json names no mask_token_id" in refusal(load_model, tmp_path)
    model = load_model(tmp_path, mask_token_id=62)
    assert model.mask_token_id == 62 and model.hf_config["mask_token_id"] == 62
    ids = token_ids()
    with torch.no_grad():
        expected = stock(input_ids=ids, attention_mask=torch.zeros(3, 1, 10, 10), use_cache=False).logits
    assert torch.allclose(logits_of(model)[:, 1:], expected[:, :-1], atol=1e-5)
    save_model(model, tmp_path / "converted")
    again = load_model(tmp_path / "converted")  # now the folder knows its mask token
    assert again.mask_token_id == 62 and torch.equal(logits_of(again), logits_of(model))


def test_the_folders_own_mask_token_wins(tmp_path):
    save_model(make_model(), tmp_path)
    assert load_model(tmp_path, mask_token_id=5).mask_token_id == 63
    edit_config(tmp_path, mask_token_id=None)
    assert load_model(tmp_path, mask_token_id=5).mask_token_id == 5


def test_folders_that_cannot_be_used(tmp_path):
    assert "holds no config.json; give a Hugging Face model folder" in refusal(load_model, tmp_path / "nowhere")
    save_model(make_model(), tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)

    edit_config(tmp_path, model_type="gpt2")
    message = refusal(load_model, tmp_path)
    assert "model_type 'gpt2' is not supported; supported: Dream, DiffuCoder, Qwen2, LLaDA" in message
    assert str(tmp_path) in message
    for rope in ({"rope_scaling": {"type": "yarn"}}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}):
        edit_config(tmp_path, model_type="Dream", **rope)
        assert "rope_scaling is set, which is not supported" in refusal(load_model, tmp_path)
        edit_config(tmp_path, *rope)
    load_model(tmp_path)

    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, weights)
    assert "missing ['model.norm.weight'], unexpected []" in refusal(load_model, tmp_path)
    save_file({**tensors, "model.extra.weight": torch.zeros(1)}, weights)
    assert "missing [], unexpected ['model.extra.weight']" in refusal(load_model, tmp_path)
    save_file({**tensors, "model.norm.weight": torch.zeros(5)}, weights)
    message = refusal(load_model, tmp_path)
    assert "do not fit config.json" in message and "model.norm.weight" in message
    weights.write_bytes(b"cut off")
    assert "cannot be read" in refusal(load_model, tmp_path)
    weights.unlink()
    assert "no model.safetensors in the folder; convert" in refusal(load_model, tmp_path)


def test_a_missing_shard_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARD_BYTES", 10_000)
    save_model(make_model(), tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    assert "no model-00002-of-" in refusal(load_model, tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    save_model(make_model(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "convert the weights to safetensors first" in refusal(load_model, tmp_path)
    assert not (tmp_path / "opened").exists()


# The probe for causal attention


class CausalDream(DreamModel):
    def hidden_states(self, ids_BL, attention_mask_BL, opened_LL=None):
        length = ids_BL.shape[1]
        return super().hidden_states(ids_BL, attention_mask_BL, torch.zeros(length, length, dtype=torch.bool))


class CausalOnlyWhenPadded(CausalDream):
    def hidden_states(self, ids_BL, attention_mask_BL, opened_LL=None):
        if bool(attention_mask_BL.all()):
            return DreamModel.hidden_states(self, ids_BL, attention_mask_BL)
        return super().hidden_states(ids_BL, attention_mask_BL)


@pytest.mark.parametrize(("family", "padding"), [(CausalDream, 0), (CausalOnlyWhenPadded, 2)])
def test_causal_attention_is_found(family, padding):
    model = family(make_model().backbone, mask_token_id=63)
    with pytest.raises(RuntimeError, match=rf"does not attend to later tokens \(padding {padding}\)"):
        check_attention(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_is_bidirectional(dtype):
    model = make_model().to(dtype)
    before = {k: v.clone() for k, v in model.named_parameters()}
    check_attention(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(torch.equal(before[k], v) and v.grad is None for k, v in model.named_parameters())


# From a config to a model and a tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def f(x):\n    return x + 1\n"], vocab_size=300)


def policy_folder(path: Path, tokenizer: PreTrainedTokenizerFast, *drop: str) -> ModelConfig:
    config = qwen_config()
    config.vocab_size = len(tokenizer)
    mask_token_id = tokenizer.convert_tokens_to_ids("<|mask|>")
    assert isinstance(mask_token_id, int)
    model = DreamModel.from_config(config, mask_token_id=mask_token_id, generator=torch.Generator().manual_seed(0))
    save_model(model, path)
    tokenizer.save_pretrained(path)
    stored = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in stored.items() if k not in drop}))
    return ModelConfig(path=str(path))


@pytest.mark.parametrize("name", ["mask", "eos", "pad"])
def test_a_tokenizer_without_a_special_token(name, tmp_path, tokenizer):
    config = policy_folder(tmp_path, tokenizer, f"{name}_token")
    message = refusal(loading.load_policy_tokenizer, config)
    assert f"has no {name} token; add `{name}_token`" in message and str(tmp_path) in message


def test_a_folder_without_tokenizer(tmp_path):
    save_model(make_model(), tmp_path)
    message = refusal(loading.load_policy_tokenizer, ModelConfig(path=str(tmp_path)))
    assert f"{tmp_path} holds no tokenizer" in message and "tokenizer.json" in message
    missing = ModelConfig(path=str(tmp_path / "nowhere"))
    assert "is not a folder; give a local Hugging Face folder" in refusal(loading.load_policy_tokenizer, missing)


def test_a_model_smaller_than_its_tokenizer(tmp_path, tokenizer):
    config = policy_folder(tmp_path, tokenizer)
    save_model(make_model(), tmp_path)  # 64 embeddings
    message = refusal(loading.load_policy, config, loading.load_policy_tokenizer(config), seed=0)
    assert f"has 64 embeddings for a tokenizer of {len(tokenizer)} tokens" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_policy_from_a_folder(dtype, tmp_path, tokenizer):
    config = policy_folder(tmp_path, tokenizer).model_copy(update={"dtype": dtype})
    loaded = loading.load_policy_tokenizer(config)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    model = loading.load_policy(config, loaded, seed=0)
    expected = load_model(tmp_path).to(getattr(torch, dtype))
    for (name, got), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert got.dtype == getattr(torch, dtype) and torch.equal(got, want), name


def test_load_policy_from_a_seed(tokenizer):
    config = ModelConfig(tiny=TinyModel(hidden_size=32, intermediate_size=48, num_layers=1, max_length=64))
    first, again, other = (loading.load_policy(config, tokenizer, seed=seed) for seed in (3, 3, 4))
    assert first.vocab_size == len(tokenizer) and first.mask_token_id == tokenizer.mask_token_id
    name = "backbone.model.embed_tokens.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_a_causal_policy_is_refused(tmp_path, tokenizer, monkeypatch):
    config = policy_folder(tmp_path, tokenizer)
    monkeypatch.setattr(
        loading, "load_model", lambda *a, **k: CausalDream(load_model(tmp_path).backbone, mask_token_id=2)
    )
    with pytest.raises(RuntimeError, match="does not attend to later tokens"):
        loading.load_policy(config, tokenizer, seed=0)
