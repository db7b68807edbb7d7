"""LLaDA against its block written out by hand (llada_peer.py), its folders bit for bit, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from diffrl.config import ModelConfig
from diffrl.estimators import ESTIMATORS, draw_views
from diffrl.models import folders
from diffrl.models.folders import check_attention, load_model, save_model
from diffrl.models.llada import LladaModel, llama_config
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.models.tiny import train_tokenizer
from diffrl.sampler import SamplingParams, sample
from diffrl.scoring import completion_logprobs
from diffrl.types import ScoringBatch
from diffrl.views import ViewOptions
from tests.diffrl.llada_peer import llada_logits
from tests.diffrl.training import pretrain_config, text_rows, train

MASK_ID = 58
NUM_TOKENS = 60  # of 64 embeddings

# As LLaDA-8B's config.json, in small.
CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": 64,
    "eos_token_id": 1,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK_ID,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": 1,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 5000.0,
    "scale_logits": False,
    "torch_dtype": "float32",
    "use_cache": False,
    "vocab_size": 62,
    "weight_tying": False,
}


def random_state(raw: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint, under the names that LLaDA's own code gives them."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(seed)
    dim, mlp = raw["d_model"], raw["mlp_hidden_size"]
    kv = dim // raw["n_heads"] * raw["n_kv_heads"]
    shapes = {
        **{"attn_norm": (dim,), "ff_norm": (dim,), "q_proj": (dim, dim), "k_proj": (kv, dim), "v_proj": (kv, dim)},
        **{"attn_out": (dim, dim), "ff_proj": (mlp, dim), "up_proj": (mlp, dim), "ff_out": (dim, mlp)},
    }
    names = {f"blocks.{i}.{name}": shape for i in range(raw["n_layers"]) for name, shape in shapes.items()}
    names |= {"wte": (raw["embedding_size"], dim), "ln_f": (dim,)}
    if not raw["weight_tying"]:
        names["ff_out"] = (raw["embedding_size"], dim)
    return {
        f"model.transformer.{name}.weight": torch.randn(shape, generator=g) * 0.3 + (len(shape) == 1)
        for name, shape in names.items()
    }


def write_folder(path: Path, **changes: Any) -> dict:
    raw = CONFIG | changes
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    save_file(random_state(raw), path / "model.safetensors", metadata={"format": "pt"})
    return raw


def token_ids(rows: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(0, MASK_ID, (rows, length), generator=torch.Generator().manual_seed(7))


# The forward pass


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"weight_tying": True}])
def test_equals_the_block_written_out_under_padding(changes, tmp_path):
    raw = write_folder(tmp_path, **changes)
    model = load_model(tmp_path)
    assert isinstance(model, LladaModel) and model.mask_token_id == MASK_ID and model.vocab_size == 64
    check_attention(model)
    ids = token_ids()
    keep = torch.arange(10) >= torch.tensor([[4], [0], [1]])
    with torch.no_grad():
        got, expected = model(ids, keep), llada_logits(raw, random_state(raw), ids, keep)
        assert torch.allclose(got[keep], expected[keep], atol=2e-5)
        assert got.isfinite().all() and expected[keep].std() > 0.5
        # no shift: what a position holds changes its own row most of all, and rows see later positions
        select = torch.zeros_like(keep)
        select[1, [0, 9]] = True
        assert torch.allclose(model(ids, keep, select), expected[1, [0, 9]], atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "kv_heads"),
    [({"n_kv_heads": None}, 4), ({"n_kv_heads": None, "multi_query_attention": True}, 1), ({"n_kv_heads": 2}, 2)],
)
def test_sizes_that_follow_from_others(changes, kv_heads):
    config = llama_config(CONFIG | changes | {"mlp_hidden_size": None, "embedding_size": None})
    assert config.num_key_value_heads == kv_heads
    assert config.intermediate_size == 4 * 32 and config.vocab_size == 62


def test_the_released_config():
    """The numbers of LLaDA-8B."""
    large = {"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288}
    large |= {"vocab_size": 126464, "embedding_size": 126464, "rope_theta": 500000.0, "mask_token_id": 126336}
    backbone = LladaModel.empty_backbone(llama_config(CONFIG | large))
    assert sum(p.numel() for p in backbone.parameters()) == 8_015_581_184
    assert backbone.config.rope_parameters["rope_theta"] == 500000.0


# Folders


@pytest.mark.parametrize("shard_bytes", [1 << 30, 10_000])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_bit_for_bit(tied, shard_bytes, tmp_path, monkeypatch):
    raw = write_folder(tmp_path / "llada", weight_tying=tied)
    monkeypatch.setattr(folders, "SHARD_BYTES", shard_bytes)
    model = load_model(tmp_path / "llada")
    save_model(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == raw
    expected = load_file(tmp_path / "llada" / "model.safetensors")
    files = list((tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 10_000)
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_random_model_has_a_config_of_its_own(tmp_path):
    model = LladaModel.from_config(
        llama_config(CONFIG), mask_token_id=MASK_ID, generator=torch.Generator().manual_seed(0)
    )
    differing = {key: value for key, value in model.hf_config.items() if value != CONFIG[key]}
    assert differing == {"vocab_size": 64, "pad_token_id": None}
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(loaded(ids, ids >= 0), model(ids, ids >= 0))


# What is refused


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"model.path: {path}: ")
    return message


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("block_type", "sequential", "'llama'"),
        ("block_group_size", 4, "1"),
        ("activation_type", "swiglu", "'silu'"),
        ("layer_norm_type", "default", "'rms'"),
        ("layer_norm_with_affine", False, "True"),
        ("bias_for_layer_norm", True, "False"),
        ("attention_layer_norm", True, "False"),
        ("include_bias", True, "False"),
        ("include_qkv_bias", True, "False"),
        ("rope", False, "True"),
        ("rope_scaling", {"type": "linear"}, "None"),
        ("alibi", True, "False"),
        ("input_emb_norm", True, "False"),
        ("scale_logits", True, "False"),
        ("clip_qkv", 8.0, "None"),
        ("attention_dropout", 0.1, "0.0"),
        ("residual_dropout", 0.1, "0.0"),
        ("embedding_dropout", 0.1, "0.0"),
    ],
)
def test_features_that_a_llama_does_not_have(key, value, wanted, tmp_path):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    message = refusal(tmp_path)
    assert f"{key}: {value!r} is not supported; take a checkpoint that has {wanted}, as LLaDA-8B does" in message


def test_what_config_leaves_out_has_lladas_default(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "block_type"}))
    assert "block_type: 'sequential' (LLaDA's default, since config.json leaves it out)" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["d_model", "n_layers", "n_heads", "embedding_size", "max_sequence_length"])
@pytest.mark.parametrize("value", [0, "32", True])
def test_sizes_that_are_none(key, value, tmp_path):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    assert f"{key}: {value!r} is no positive integer; copy the checkpoint's own config.json" in refusal(tmp_path)


def test_sizes_that_do_not_divide(tmp_path):
    write_folder(tmp_path)
    for changes, message in (
        ({"n_heads": 5}, "d_model: 32 is no multiple of n_heads 5"),
        ({"n_kv_heads": 3}, "n_heads: 4 is no multiple of n_kv_heads 3"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
        assert message in refusal(tmp_path)


def test_tensors_that_do_not_fit_are_named_as_in_the_folder(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    name = "model.transformer.blocks.1.attn_out.weight"
    save_file({k: v for k, v in state.items() if k != name}, file)
    assert f"missing ['{name}'], unexpected []" in refusal(tmp_path)
    save_file(state | {"model.transformer.blocks.1.att_proj.weight": torch.zeros(1)}, file)
    assert "missing [], unexpected ['model.transformer.blocks.1.att_proj.weight']" in refusal(tmp_path)
    save_file(state | {name: torch.zeros(32, 16)}, file)
    assert f"{name} is [32, 16] and would be [32, 32]" in refusal(tmp_path)


# Sampling, scoring, training


@pytest.fixture
def model(tmp_path: Path) -> LladaModel:
    write_folder(tmp_path)
    model = load_model(tmp_path)
    assert isinstance(model, LladaModel)
    model.num_tokens = NUM_TOKENS
    return model


def test_sampling_greedily_equals_the_loop_written_out(model):
    """One token per step, the most certain position first; neither [MASK] nor padded embeddings are ever drawn."""
    raw, state = CONFIG, random_state(CONFIG)
    prompts, keep = token_ids(2, 5), torch.arange(5) >= torch.tensor([[2], [0]])
    params = SamplingParams(algorithm="entropy", steps=6, temperature=0.0, top_p=None, top_k=None)
    # With as many steps as tokens the first step reveals none and the last two.
    result = sample(model, prompts, keep, num_tokens=6, params=params, seeds=(1, 2), vocab_size=NUM_TOKENS)
    ids = torch.cat([prompts, torch.full((2, 6), MASK_ID)], dim=1)
    keep = torch.cat([keep, torch.ones(2, 6, dtype=torch.bool)], dim=1)
    for count in (1, 1, 1, 1, 2):
        logits = llada_logits(raw, state, ids, keep)
        logprobs = logits.log_softmax(-1)
        entropy = (-logprobs.exp() * logprobs).sum(-1).masked_fill(ids != MASK_ID, torch.inf)
        logits[..., MASK_ID], logits[..., NUM_TOKENS:] = -torch.inf, -torch.inf
        chosen = entropy.topk(count, largest=False).indices
        ids.scatter_(1, chosen, logits.argmax(-1).gather(1, chosen))
    assert torch.equal(result.completion_ids_BC, ids[:, 5:])


def test_scores_equal_the_naive_ones_and_padded_embeddings_have_no_share(model):
    group_size, prompt, completion = 2, 5, 7
    ids = token_ids(2, prompt).repeat_interleave(group_size, 0)
    keep = (torch.arange(prompt) >= torch.tensor([[2], [0]])).repeat_interleave(group_size, 0)
    views = draw_views(
        ESTIMATORS["coupled"], seeds=[3, 4], group_size=group_size, num_tokens=completion, options=ViewOptions()
    )
    batch = ScoringBatch(
        prompt_ids_BP=ids,
        prompt_mask_BP=keep,
        completion_ids_BC=token_ids(4, completion),
        scored_BC=torch.ones(4, completion, dtype=torch.bool),
        views=(views,),
        group_size=group_size,
    )
    with torch.no_grad():
        got = completion_logprobs(model, batch, views, mask_token_id=MASK_ID)
        model.num_tokens = None
        all_embeddings = completion_logprobs(model, batch, views, mask_token_id=MASK_ID)
    expected, padded = (torch.zeros(4, completion) for _ in range(2))
    everywhere = torch.cat([keep, torch.ones(4, completion, dtype=torch.bool)], dim=1)
    for hidden, weight in zip(views.hidden_SBC, views.weight_SBC, strict=True):
        noised = torch.cat([ids, batch.completion_ids_BC.masked_fill(hidden, MASK_ID)], dim=1)
        logits = llada_logits(CONFIG, random_state(CONFIG), noised, everywhere)[:, prompt:]
        for total, vocabulary in ((expected, NUM_TOKENS), (padded, 64)):
            logprobs = logits[..., :vocabulary].log_softmax(-1)
            total += weight * logprobs.gather(-1, batch.completion_ids_BC[..., None])[..., 0]
    assert torch.allclose(got, expected, atol=2e-5)
    assert torch.allclose(all_embeddings, padded, atol=2e-5)
    assert (got - all_embeddings).min() > 1e-3  # what padding had is now shared out


def test_the_end_token_that_also_pads_is_trained(model):
    ids = torch.full((1, 4), CONFIG["pad_token_id"])
    model(ids, ids >= 0).square().sum().backward()
    assert model.backbone.model.embed_tokens.weight.grad[CONFIG["pad_token_id"]].abs().max() > 0


def test_training_learns_a_text(model):
    rows = text_rows([5, 9, 2, 7, 11, 30, 8, 4] * 16, 8)
    config = pretrain_config(optim={"lr": 1e-2, "weight_decay": 0.0})
    losses = [metrics["loss/nll"] for metrics in train(model, config, lambda step: rows, 100)]
    assert losses[0] > 3 and sum(losses[-10:]) / 10 < 1


# From a config to a policy


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def f(x):\n    return x + 1\n"], vocab_size=300)


def test_the_vocabulary_may_be_larger_than_the_tokenizer(tmp_path, tokenizer):
    size = len(tokenizer)
    write_folder(tmp_path, embedding_size=size + 7, vocab_size=size, mask_token_id=tokenizer.mask_token_id)
    tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    model = load_policy(config, load_policy_tokenizer(config), seed=0)
    assert model.vocab_size == size + 7 and model.num_tokens == size
    ids = token_ids()
    with torch.no_grad():
        every_token = torch.arange(size)
        logprobs = model(ids[:1], ids[:1] >= 0, ids[:1] == ids[0, 3], torch.zeros(size, dtype=torch.long), every_token)
    assert logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_the_mask_token_that_only_config_json_names(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["mask_token"]
    file.write_text(json.dumps(settings))
    config = ModelConfig(path=str(tmp_path))
    write_folder(tmp_path, mask_token_id=tokenizer.mask_token_id)
    found = load_policy_tokenizer(config)
    assert (found.mask_token, found.mask_token_id) == (tokenizer.mask_token, tokenizer.mask_token_id)
    write_folder(tmp_path, mask_token_id=len(tokenizer))
    with pytest.raises(ValueError, match="has no mask token; add `mask_token`"):
        load_policy_tokenizer(config)


def test_a_vocabulary_smaller_than_the_tokenizer(tmp_path, tokenizer):
    write_folder(tmp_path, mask_token_id=tokenizer.mask_token_id)
    tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    with pytest.raises(ValueError, match=f"has 64 embeddings for a tokenizer of {len(tokenizer)} tokens"):
        load_policy(config, load_policy_tokenizer(config), seed=0)
