"""The tiny model and its tokenizer: round trips, short chats, numbers as single tokens, same input same result."""

import pytest
import torch

from diffrl.data.corpus import microcode_text
from diffrl.models.folders import check_attention
from diffrl.models.tiny import load_tokenizer, tiny_model, train_tokenizer

TEXT = microcode_text()[:60_000]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=512)


def test_text_survives_a_round_trip(tokenizer):
    for text in (
        "def f(x):\n    return x * 3 + 12",
        "```python\ndef f(s):\n\treturn 'é→' + s\n```",
        "a  b\r\n 1234 `x`",
        "",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_number_is_one_token_wherever_it_stands(tokenizer):
    (twelve,) = tokenizer("12")["input_ids"]
    for text in ("x * 12", "x times 12, plus", "range(12)", "xs[12:]", "+12", "\n12"):
        assert tokenizer(text)["input_ids"].count(twelve) == 1, text


def test_special_tokens_and_the_chat_header_cost_one_token_each(tokenizer):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "xs"}], add_generation_prompt=True, return_dict=False
    )
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "<|im_start|>user\n" and tokens[-2:] == ["<|im_end|>", "<|im_start|>assistant\n"]
    assert len(ids) == 3 + len(tokenizer("xs")["input_ids"])
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.mask_token) == ("<|dlm_pad|>", "<|im_end|>", "<|mask|>")
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id}) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "xs"


def test_training_is_deterministic_and_a_folder_gives_the_same_tokenizer(tokenizer, tmp_path):
    again = train_tokenizer([TEXT], vocab_size=512)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"] == again(TEXT)["input_ids"]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert (
        loaded.apply_chat_template(chat, tokenize=False)
        == "<|im_start|>system\ns<|im_end|><|im_start|>user\nu<|im_end|>"
    )
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.mask_token_id, loaded.padding_side) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.mask_token_id,
        "left",
    )


def test_the_model_comes_from_its_generator_alone_and_is_bidirectional(tokenizer):
    def build(seed: int):
        return tiny_model(tokenizer, generator=torch.Generator().manual_seed(seed), hidden_size=32, num_layers=2)

    first, second, other = build(0), build(0), build(1)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert name.endswith(("norm.weight", "bias")) or not torch.equal(a, c), name
    assert first.mask_token_id == tokenizer.mask_token_id and first.vocab_size == len(tokenizer)
    assert first.backbone.lm_head.weight is first.backbone.model.embed_tokens.weight
    check_attention(first)


def test_heads_begin_as_copiers(tokenizer):
    """o_proj after v_proj is 0.7 squared times a projection: what a head looks at keeps its direction."""
    model = tiny_model(tokenizer, generator=torch.Generator().manual_seed(0), hidden_size=32, num_layers=1)
    attention = model.backbone.model.layers[0].self_attn
    values = attention.v_proj.weight.reshape(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)  # 4 heads share 2
    copied = attention.o_proj.weight @ values / 0.49
    assert torch.allclose(copied, copied.T, atol=1e-5) and torch.allclose(copied @ copied, copied, atol=1e-5)
    assert copied.trace().item() == pytest.approx(16, abs=1e-3)
