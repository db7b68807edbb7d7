"""A Qwen2 folder gets the tokens of masked diffusion, and loses nothing."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from diffrl.config import ModelConfig
from diffrl.errors import ConfigError
from diffrl.models.added_tokens import add_tokens
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.models.tiny import load_tokenizer

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "def", "return", "x", "+", "1"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def qwen(path: Path, *, tied: bool = False, num_rows: int = len(WORDS), dtype=torch.float32) -> Qwen2ForCausalLM:
    """A model as transformers writes it, with an embedding of `num_rows` for eight tokens."""
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="x"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=TEMPLATE,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=num_rows, num_key_value_heads=1, tie_word_embeddings=tied, **sizes)
    model = Qwen2ForCausalLM(config).to(dtype)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("num_rows", "grown"), [(8, 10), (9, 10), (12, 12)])
def test_new_rows_are_means_and_old_ones_stay(tmp_path: Path, tied: bool, num_rows: int, grown: int):
    before = qwen(tmp_path / "ar", tied=tied, num_rows=num_rows)
    said = add_tokens(tmp_path / "ar", tmp_path / "out")
    assert "<|mask|> 8, <|dlm_pad|> 9" in said and ("spare rows" in said) == (grown == num_rows)
    tokenizer = load_policy_tokenizer(ModelConfig(path=str(tmp_path / "out")))
    policy = load_policy(ModelConfig(path=str(tmp_path / "out")), tokenizer, seed=0)
    assert (policy.mask_token_id, tokenizer.pad_token_id, policy.vocab_size) == (8, 9, grown)
    after = policy.backbone.state_dict()
    for name, old in before.state_dict().items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(after[name], old), name
            continue
        assert torch.equal(after[name][:8], old[:8]) and len(after[name]) == grown
        assert torch.allclose(after[name][8:10], old[:8].mean(0).expand(2, -1), atol=1e-7)
    shares = after["lm_head.weight"].data_ptr() == after["model.embed_tokens.weight"].data_ptr()
    assert shares == tied
    ids = torch.tensor([[3, 5, 4, 5, 6, 7]])
    stock = Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(stock(ids).logits[..., :8], before(ids).logits[..., :8])  # what it was, it still is


def test_tokenizer_template_and_settings_are_kept(tmp_path: Path):
    qwen(tmp_path / "ar", dtype=torch.bfloat16)
    (tmp_path / "ar/LICENSE").write_text("free")
    add_tokens(tmp_path / "ar", tmp_path / "out")
    old, new = (load_tokenizer(tmp_path / name) for name in ("ar", "out"))
    assert new.chat_template == old.chat_template == TEMPLATE
    text = "def <|im_start|> x + 1 <|im_end|> <|endoftext|>"
    assert new(text)["input_ids"] == old(text)["input_ids"] == [3, 1, 5, 6, 7, 2, 0]
    assert new("x <|mask|> <|dlm_pad|>")["input_ids"] == [5, 8, 9]
    assert (new.eos_token, new.mask_token, new.pad_token) == ("<|endoftext|>", "<|mask|>", "<|dlm_pad|>")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ar", "out")]
    changed = {key for key in configs[1] if configs[1][key] != configs[0].get(key)}
    assert changed == {"vocab_size", "mask_token_id", "pad_token_id", "torch_dtype"}
    assert configs[0].keys() <= configs[1].keys() and configs[1]["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out/LICENSE").read_text() == "free"


def test_the_refusal_names_the_way_out(tmp_path: Path):
    qwen(tmp_path / "ar")
    with pytest.raises(ValueError, match=rf"has no mask token; .* `diffrl data add-tokens {tmp_path}/ar OUT`"):
        load_policy_tokenizer(ModelConfig(path=str(tmp_path / "ar")))


def test_what_cannot_be_copied_is_named(tmp_path: Path):
    qwen(tmp_path / "ar")
    add_tokens(tmp_path / "ar", tmp_path / "out")
    with pytest.raises(ConfigError, match="out has a mask and a padding token; use the folder as it is"):
        add_tokens(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ConfigError, match=r"OUT: .*out is not empty"):
        add_tokens(tmp_path / "ar", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"nowhere holds no config\.json"):
        add_tokens(tmp_path / "nowhere", tmp_path / "new")
    raw = json.loads((tmp_path / "ar/config.json").read_text())
    (tmp_path / "ar/config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"model_type 'llama' .* is not supported; supported: qwen2"):
        add_tokens(tmp_path / "ar", tmp_path / "new")
    (tmp_path / "ar/config.json").write_text(json.dumps(raw))
    (tmp_path / "ar/model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ConfigError, match=r"damaged safetensors file .*; download it again"):
        add_tokens(tmp_path / "ar", tmp_path / "new")
    (tmp_path / "ar/model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot be read \(no model\.safetensors"):
        add_tokens(tmp_path / "ar", tmp_path / "new")
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())
