"""Learner and whole runs on one GPU that the roles share, beside the CPU."""

import json
import math
from pathlib import Path

import pytest
import ray
import torch

from actors.driver import train
from actors.weights import fetch
from diffrl.models.folders import state_dict_for_export
from diffrl.models.loading import load_policy, load_policy_tokenizer
from tests.actors.conftest import rl_config
from tests.actors.learner_case import STEPS, ZERO_3, config_of, plain_updates, random_batch, running
from tests.actors.test_loop import metric_lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees (nvidia-smi, a CUDA build)"),
]
ON_GPU = {
    "learner": {"gpus_per_rank": 0.4, "cpus_per_rank": 0.25},
    "rollout": {"gpus_per_worker": 0.2, "cpus_per_worker": 0.25},
    "reference": {"gpus": 0.2, "cpus": 0.25},
}


@pytest.mark.parametrize(
    "learner",
    [{}, {"zero_stage": 1, "max_tokens_per_micro_batch": 1}, {"recompute": True, **ZERO_3}, {"compile": True}],
    ids=["ZeRO 0", "ZeRO 1, micro-batches", "ZeRO 3, recompute", "compile"],
)
def test_updates_equal_plain_torch_on_the_cpu(ray_cluster, tuned_model: Path, tmp_path: Path, learner: dict):
    config = config_of(tuned_model, tmp_path, learner={"gpus_per_rank": 1.0, **learner})
    tokenizer = load_policy_tokenizer(config.model)
    model = load_policy(config.model, tokenizer, seed=0)
    batches = [random_batch(config, model, seed) for seed in range(STEPS)]
    with running(config, tokenizer) as group:
        results = [group.update(ray.put(batch)) for batch in batches]
        trained = fetch(group.publish())
    for result, row in zip(results, plain_updates(config, model, batches), strict=True):
        for key, value in row.items():
            assert result.metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for name, tensor in state_dict_for_export(model).items():
        gap = (trained[name] - tensor).abs()
        assert gap.max() < 5e-4 and gap.mean() < 2e-6, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_one_gpu(ray_cluster, tuned_model: Path, problems_file: Path, tmp_path: Path, dtype: str):
    """Rollout, reference and learner each with a part of it. What a worker samples with is what the learner trains."""
    run_dir = tmp_path / "run"
    train(rl_config(tuned_model, problems_file, run_dir, model={"dtype": dtype}, sync={"every": 1}, **ON_GPU))
    rows = [json.loads(line) for line in metric_lines(run_dir)]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["first/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert rows[0]["first/kl"] == pytest.approx(0.0, abs=1e-6 if dtype == "float32" else 1e-3)
    assert any(0 < row["reward/pass_rate"] < 1 for row in rows), "the model is meant to solve some problems, not all"
    for row in rows:
        assert row["optim/grad_norm"] > 0 and math.isfinite(row["loss/total"])
        assert row["sync/logprob_absdiff_max"] < (1e-4 if dtype == "float32" else 0.5)
