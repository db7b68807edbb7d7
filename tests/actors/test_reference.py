"""The reference policy: scores on any number of workers, refreshed by copy or by mixture."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from actors.driver import Run
from actors.pool import WorkerPool
from actors.reference import Reference
from actors.system import spawner
from actors.weights import Weights, fetch, fill_bucket, plan_buckets, received, sealed
from diffrl.config import RLConfig
from diffrl.models.folders import load_model, state_dict_for_export
from diffrl.scoring import completion_logprobs
from tests.actors.conftest import opened, rl_config
from tests.actors.learner_case import config_of, end, random_batch
from tests.actors.test_loop import metric_lines

BUCKET_BYTES = 100_000  # several buckets for the small model


def published(version: int, state: dict[str, torch.Tensor], hf_config: dict) -> Weights:
    plan = plan_buckets({name: tensor.nbytes for name, tensor in state.items()}, BUCKET_BYTES)
    buckets = (fill_bucket({name: state[name] for name in names}, i) for i, names in enumerate(plan))
    tensors = received([ray.put(piece) for piece in sealed(buckets)])
    return Weights(version=version, hf_config=hf_config, num_tokens=None, tensors=tensors, adapter=None)


def test_scores_and_mixtures(ray_cluster, tuned_model: Path, tmp_path: Path):
    """One worker at a time computes, and any of them scores under what it published."""
    model = load_model(tuned_model)
    old = {name: tensor.clone() for name, tensor in state_dict_for_export(model).items()}
    generator = torch.Generator().manual_seed(0)
    new = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in old.items()}
    pool = WorkerPool(spawner(Reference, {"num_cpus": 0.1}, threads=1, attend_padding=False), 2)
    try:
        reference, policy = (published(v, s, model.hf_config) for v, s in ((0, old), (7, new)))
        assert len(reference.tensors.buckets) > 2
        end(pool.workers[0])  # the call is made again on the worker in its place
        mixed = replace(policy, version=-7, tensors=received(pool.call("mixed", policy, reference, 0.6)))
        assert pool.num_restarts == 1 and mixed.num_bytes == policy.num_bytes
        expected = {name: 0.4 * old[name] + 0.6 * new[name] for name in old}
        got = dict(fetch(mixed))
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-7)
        config = config_of(tuned_model, tmp_path)
        batch = random_batch(config, model, 3).scoring  # padded, so what the worker crops matters
        scores_W = pool.broadcast("logprobs", batch, mixed)
        model.backbone.load_state_dict(got, strict=False)
        with torch.no_grad():
            exact = [completion_logprobs(model, batch, v, mask_token_id=model.mask_token_id) for v in batch.views]
        for scores_IBC in scores_W:
            torch.testing.assert_close(scores_IBC, torch.stack(exact), rtol=1e-5, atol=1e-4)
    finally:
        pool.close()


def run_of(config: RLConfig) -> list[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """For each step: version of the reference, its tensors, and the policy's."""
    seen = []

    class Watched(Run):
        def follow(self, step: int) -> None:
            super().follow(step)
            seen.append((self.reference.version, fetch(self.reference), fetch(self.weights)))

    with opened(config, Watched) as run:
        run.train()
    return seen


@pytest.mark.parametrize(
    ("mix", "versions"), [(0.6, [0, -2, -2, -4]), pytest.param(1.0, [0, 2, 2, 4], marks=pytest.mark.slow)]
)
def test_refreshed_every_second_step(
    ray_cluster, tuned_model, problems_file, tmp_path, mix: float, versions: list[int]
):
    config = rl_config(
        tuned_model,
        problems_file,
        tmp_path / "run",
        method={"reference_refresh_steps": 2, "reference_mix": mix, "kl_coef": 0.02},
        train={"steps": 4, "prompts_per_step": 2},
        reference={"num_workers": 2, "cpus": 0.1},
    )
    seen = run_of(config)
    assert [version for version, _, _ in seen] == versions
    reference = seen[0][1]
    for step, (_, got, policy) in enumerate(seen):
        if step % 2:
            reference = {name: mix * policy[name] + (1 - mix) * tensor for name, tensor in reference.items()}
        for name, tensor in reference.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-7)


def test_without_kl_there_is_no_reference(tuned_model, problems_file, tmp_path):
    config = rl_config(
        tuned_model, problems_file, tmp_path, method={"kl_coef": 0.0}, reference={"num_workers": 3, "cpus": 1.0}
    )
    assert config.num_reference_workers == 0
    assert rl_config(tuned_model, problems_file, tmp_path, reference={"num_workers": 3}).num_reference_workers == 3


def test_the_learner_without_its_adapters_is_the_reference(ray_cluster, tuned_model, problems_file, tmp_path):
    """Equal to a reference actor that never moves: it holds the base, with adapters that add nothing."""
    rows = {}
    for mode in ("actor", "adapter_off"):
        config = rl_config(
            tuned_model,
            problems_file,
            tmp_path / mode,
            model={"lora": {"rank": 4, "alpha": 16.0}},
            optim={"lr": 3e-3},
            method={"reference_refresh_steps": None, "kl_coef": 0.05},
            train={"steps": 2, "prompts_per_step": 2},
            reference={"mode": mode, "cpus": 0.1},
        )
        assert config.num_reference_workers == (1 if mode == "actor" else 0)
        run_of(config)
        rows[mode] = [json.loads(line) for line in metric_lines(tmp_path / mode)]
    assert rows["actor"][1]["first/kl"] > 1e-4
    for actor, off in zip(rows["actor"], rows["adapter_off"], strict=True):
        assert actor.keys() == off.keys()
        for key, value in actor.items():
            assert off[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
