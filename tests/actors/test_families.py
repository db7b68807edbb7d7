"""Whole runs of what differs from a Dream trained in full: LLaDA, and adapters published merged or alone."""

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen2Config

from actors.driver import train
from actors.prepare import prepare
from actors.stages import train_supervised
from actors.weights import PolicyHolder, Weights, fetch, put_model
from diffrl.config import LoraConfig, ModelConfig, RLConfig, SftConfig
from diffrl.config_file import validate
from diffrl.errors import ConfigError
from diffrl.models.base import PolicyModel
from diffrl.models.dream import DreamModel
from diffrl.models.folders import load_model, load_state_dict, save_model, state_dict_for_export
from diffrl.models.llada import LladaModel
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.models.lora import adapter_state, add_adapters
from diffrl.models.tokens import special_id
from diffrl.rollout_store import read_all
from diffrl.types import Problem
from tests.actors.conftest import rl_config, tune
from tests.actors.test_loop import Interrupted, metric_lines, run_with

PADDING = 24  # embeddings beyond the tokenizer
LORA = {"rank": 4, "alpha": 16.0}


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in metric_lines(run_dir)]


def assert_a_sound_run(run_dir: Path) -> None:
    """Three steps with finite numbers, of which the first is on policy, and something to learn from."""
    rows = rows_of(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["first/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert rows[0]["first/kl"] == pytest.approx(0.0, abs=1e-6)
    assert any(0 < row["reward/pass_rate"] < 1 for row in rows)
    assert all(row["optim/grad_norm"] > 0 for row in rows)


def completions(run_dir: Path) -> list[list[int]]:
    return [row["completion_ids"] for row in read_all(run_dir / "rollouts").to_pylist()]


# LLaDA


@pytest.fixture(scope="module")
def tuned_llada(
    ray_cluster, tuned_model: Path, problems: list[Problem], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A LLaDA of random weights with the tiny tokenizer and padded embeddings, tuned as `tuned_model` is."""
    folder = tmp_path_factory.mktemp("llada")
    tokenizer = load_policy_tokenizer(ModelConfig(path=str(tuned_model)))
    config = LlamaConfig(
        vocab_size=len(tokenizer) + PADDING,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
    )
    config._attn_implementation = "sdpa"
    generator = torch.Generator().manual_seed(0)
    save_model(
        LladaModel.from_config(config, mask_token_id=special_id(tokenizer, "mask"), generator=generator),
        folder / "random",
    )
    tokenizer.save_pretrained(folder / "random")
    return tune(folder, problems, {"path": str(folder / "random")}, steps=300)


def test_llada_runs(ray_cluster, tuned_llada: Path, problems_file: Path, tmp_path: Path):
    train(rl_config(tuned_llada, problems_file, tmp_path / "run"))
    assert_a_sound_run(tmp_path / "run")
    before, after = load_state_dict(tuned_llada), load_state_dict(tmp_path / "run" / "model")
    assert before.keys() == after.keys() and "model.transformer.blocks.1.attn_out.weight" in after
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name.endswith("_proj.weight")} <= changed
    model = load_model(tmp_path / "run" / "model")
    assert isinstance(model, LladaModel) and not (tmp_path / "run" / "adapter").exists()
    stored = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert stored == json.loads((tuned_llada / "config.json").read_text())
    tokenizer = load_policy_tokenizer(ModelConfig(path=str(tmp_path / "run" / "model")))
    assert model.vocab_size == len(tokenizer) + PADDING
    assert max(token for ids in completions(tmp_path / "run") for token in ids) < len(tokenizer)


@pytest.mark.slow
def test_llada_with_adapters_runs(ray_cluster, tuned_llada: Path, problems_file: Path, tmp_path: Path):
    config = rl_config(
        tuned_llada, problems_file, tmp_path / "run", model={"lora": {**LORA, "publish": "adapter"}}, optim={"lr": 3e-3}
    )
    train(config)
    assert_a_sound_run(tmp_path / "run")
    assert isinstance(load_model(tmp_path / "run" / "model"), LladaModel)
    assert_peft_reads(tmp_path / "run", tuned_llada)


# Adapters


def lora_config(tuned_model: Path, problems_file: Path, run_dir: Path, mode: str, **sections: dict) -> RLConfig:
    model = {"lora": {**LORA, "publish": mode, "targets": ["q_proj", "v_proj", "mlp.down_proj"]}}
    return rl_config(tuned_model, problems_file, run_dir, model=model, optim={"lr": 3e-3}, **sections)


@pytest.fixture(scope="module")
def lora_runs(ray_cluster, tuned_model, problems_file, tmp_path_factory) -> dict[str, Path]:
    """Equal runs that publish the merged weights and the adapters alone."""
    folder = tmp_path_factory.mktemp("lora")
    for mode in ("merged", "adapter"):
        train(lora_config(tuned_model, problems_file, folder / mode, mode))
    return {mode: folder / mode for mode in ("merged", "adapter")}


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_adapters_run(lora_runs: dict[str, Path], mode: str, tuned_model: Path):
    run_dir = lora_runs[mode]
    assert_a_sound_run(run_dir)
    before, after = load_state_dict(tuned_model), load_state_dict(run_dir / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name for name in before if name.split(".")[-2] in ("q_proj", "v_proj", "down_proj") and "weight" in name
    }
    assert_peft_reads(run_dir, tuned_model)


def assert_peft_reads(run_dir: Path, base: Path) -> None:
    """The adapters on a stock backbone are the exported model."""
    exported, stock = load_model(run_dir / "model").backbone.eval(), load_model(base)
    backbone = stock.backbone_class(stock.config).eval()
    backbone.load_state_dict(stock.backbone.state_dict())
    adapted = peft.PeftModel.from_pretrained(backbone, str(run_dir / "adapter"))
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    with torch.no_grad():
        got = adapted(input_ids=ids, attention_mask=mask, use_cache=False).logits
        expected = exported(input_ids=ids, attention_mask=mask, use_cache=False).logits
        unadapted = stock.backbone(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(got, expected, atol=1e-4)
    assert (expected - unadapted).abs().max() > 1e-2
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["lora_alpha"] == LORA["alpha"]


def test_both_ways_of_publishing_give_equal_rollouts(lora_runs: dict[str, Path]):
    merged, adapter = lora_runs["merged"], lora_runs["adapter"]
    assert completions(merged) == completions(adapter)
    assert metric_lines(merged) == metric_lines(adapter)
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (merged / name).read_bytes() == (adapter / name).read_bytes(), name


@pytest.mark.slow
def test_lost_workers_get_base_and_adapters_again(lora_runs: dict[str, Path], tuned_model, problems_file, tmp_path):
    config = lora_config(tuned_model, problems_file, tmp_path / "lost", "adapter", rollout={"num_workers": 2})
    run = run_with(Interrupted, config)
    assert all(pool.num_restarts >= 2 for pool in run.system.pools().values())
    assert metric_lines(tmp_path / "lost") == metric_lines(lora_runs["adapter"])


@pytest.mark.slow
def test_two_learner_ranks_train_the_same_adapters(lora_runs: dict[str, Path], tuned_model, problems_file, tmp_path):
    learner = {"num_ranks": 2, "zero_stage": 1}
    train(lora_config(tuned_model, problems_file, tmp_path / "ranks", "adapter", learner=learner))
    one, two = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (lora_runs["adapter"], tmp_path / "ranks")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        gap = (tensor - two[name]).abs()
        assert gap.max() < 5e-4 and gap.mean() < 2e-5 and tensor.abs().mean() > 1e-3, name


def test_targets_that_are_no_layers_are_refused_before_anything_starts(tuned_model, problems_file, tmp_path):
    config = rl_config(tuned_model, problems_file, tmp_path / "run", model={"lora": {"targets": ["attn"]}})
    with pytest.raises(ConfigError, match=r"^model\.lora\.targets: 'attn' is no linear layer of the blocks; known: q_"):
        prepare(config)
    assert not (tmp_path / "run").exists()


def test_a_supervised_stage_exports_both(ray_cluster, tmp_path):
    data = tmp_path / "sft.jsonl"
    data.write_text(json.dumps({"prompt": "one", "completion": "x + 1"}) + "\n")
    config = validate(
        {
            "stage": "sft",
            "run_dir": str(tmp_path / "run"),
            "model": {
                "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1},
                "lora": {"rank": 2, "targets": ["v_proj"]},
            },
            "data": {"source": "files", "path": str(data), "max_prompt_tokens": 12, "completion_tokens": 8},
            "train": {"steps": 2, "batch_size": 2},
            "workers": {"threads": 1},
        },
        "test",
    )
    assert isinstance(config, SftConfig)
    train_supervised(config)
    tokenizer = load_policy_tokenizer(config.model)
    before = state_dict_for_export(load_policy(config.model, tokenizer, seed=config.seed))
    after = state_dict_for_export(load_model(tmp_path / "run" / "model"))
    assert [n for n in after if not torch.equal(before[n], after[n])] == ["model.layers.0.self_attn.v_proj.weight"]
    adapters = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 2 and all(tensor.ne(0).any() for tensor in adapters.values())


# The weight store


def adapted_model(family: type[PolicyModel], mode: str, version: int) -> PolicyModel:
    """As a learner has it after `version` updates."""
    config = (Qwen2Config if family is DreamModel else LlamaConfig)(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    model = family.from_config(config, mask_token_id=63, generator=torch.Generator().manual_seed(0))
    add_adapters(model, LoraConfig.model_validate({**LORA, "publish": mode}), torch.Generator().manual_seed(1))
    model.num_tokens = 60
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.01 * version)
    return model


@pytest.mark.parametrize("family", [DreamModel, LladaModel])
def test_the_base_travels_once(ray_cluster, family):
    versions: list[Weights] = []
    for version in range(4):
        base = versions[0].tensors if versions else None
        versions.append(put_model(adapted_model(family, "adapter", version), version, base))
    assert len({weights.tensors for weights in versions}) == 1
    assert len({weights.adapter for weights in versions}) == 4
    follower = PolicyHolder("cpu")
    for version in (0, 2, 3, 2, 0):
        model = follower.at(versions[version])
        fresh = PolicyHolder("cpu").at(versions[version])
        expected = state_dict_for_export(adapted_model(family, "adapter", version))
        for state in (state_dict_for_export(model), state_dict_for_export(fresh), fetch(versions[version])):
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert model.lora is None and model.num_tokens == fresh.num_tokens == 60
    assert follower.at(versions[0]) is model


def test_merged_adapters_travel_with_the_weights(ray_cluster):
    for version in range(2):
        trained = adapted_model(DreamModel, "merged", version)
        weights = put_model(trained, version)
        held = state_dict_for_export(PolicyHolder("cpu").at(weights))
        assert all(torch.equal(held[name], tensor) for name, tensor in state_dict_for_export(trained).items())
        assert weights.adapter is not None and weights.adapter.merged and weights.adapter.scale == 4.0
        assert {entry.name for entry in weights.adapter.tensors.entries} == adapter_state(trained).keys()


def test_weights_without_adapters_follow_those_with(ray_cluster):
    """A holder makes no assumption about what it held before."""
    holder = PolicyHolder("cpu")
    for version, mode in enumerate(("adapter", "merged", "adapter")):
        trained = adapted_model(DreamModel, mode, version)
        held = state_dict_for_export(holder.at(put_model(trained, version)))
        assert all(torch.equal(held[name], tensor) for name, tensor in state_dict_for_export(trained).items())
