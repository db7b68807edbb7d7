"""Scoring, loss and gradients against numbers computed by the released code (tests/golden/README.md says how).

The release draws its masks from global generators reseeded per call; `release_views` replays that stream here, in
the test, so that the masks are the files' own. `attend_padding`, leave-one-out and the local token count are what
`method.compat: release` switches on.
"""

import random

import pytest
import torch
from torch import nn

from diffrl.coupled_grpo import coupled_grpo_loss, leave_one_out_advantages, scale_by_std
from diffrl.models.base import PolicyModel
from diffrl.models.folders import load_model, load_state_dict
from diffrl.models.head import VocabularyHead
from diffrl.scoring import completion_logprobs, slice_rows
from diffrl.types import MaskViews, ScoringBatch
from tests.golden_files import golden_dir, golden_json, golden_tensors

TOLERANCE = 1e-5


def cases(kind: str) -> list[dict]:
    return [c for c in golden_json("logps/cases.json")["cases"] if c["kind"] == kind]


def tensors(name: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}."
    everything = golden_tensors("logps/tensors.safetensors")
    return {k.removeprefix(prefix): v for k, v in everything.items() if k.startswith(prefix)}


def mask_ratio(seed: int) -> float:
    return random.Random(seed).uniform(0.2, 0.8)


def release_views(seed: int, batch_size: int, prompt: int, completion: int, accumulate: int) -> MaskViews:
    """The release's views: one t, one random matrix for `batch_size / accumulate` rows, repeated."""
    t = mask_ratio(seed)
    rows = torch.rand(batch_size // accumulate, prompt + completion, generator=torch.Generator().manual_seed(seed))
    uniform_BC = rows.repeat(accumulate, 1)[:, prompt:]
    part_BC, rest_BC = uniform_BC < t, uniform_BC > t
    hidden = torch.stack([torch.ones_like(part_BC), part_BC, rest_BC])
    weight = torch.stack([torch.full_like(uniform_BC, 0.5), part_BC / (2 * t), rest_BC / (2 * (1 - t))])
    return MaskViews(hidden_SBC=hidden, weight_SBC=weight)


def scoring_batch(data: dict[str, torch.Tensor], views: tuple[MaskViews, ...]) -> ScoringBatch:
    prompt = data["prompt_ids"]
    mask = data.get("prompt_mask", torch.ones_like(prompt)).bool()
    return ScoringBatch(
        prompt_ids_BP=prompt,
        prompt_mask_BP=mask,
        completion_ids_BC=data["completion_ids"],
        scored_BC=torch.ones_like(data["completion_ids"], dtype=torch.bool),
        views=views,
        group_size=1,
    )


def release_logprobs(model: PolicyModel, batch: ScoringBatch, views: MaskViews) -> torch.Tensor:
    return completion_logprobs(model, batch, views, mask_token_id=model.mask_token_id, attend_padding=True)


def policy_and_reference() -> tuple[PolicyModel, PolicyModel]:
    policy, reference = load_model(golden_dir() / "generate"), load_model(golden_dir() / "generate")
    delta = golden_tensors("logps/ref_model_delta_fp16.safetensors")
    base = load_state_dict(golden_dir() / "generate")
    reference.backbone.load_state_dict({k: base[k] + delta[k].float() if k in delta else base[k] for k in base})
    return policy, reference


@pytest.mark.parametrize("case", cases("forward_process"), ids=lambda c: c["name"])
def test_golden_forward_process(case):
    data = tensors(case["name"])
    mask_id = golden_json("generate/config.json")["mask_token_id"]
    prompt = case["prompt"]
    accumulate = case["gradient_accumulation_steps"] if case["accumulate"] else 1
    views = release_views(case["seed"], case["batch"], prompt, case["completion"], accumulate)
    assert mask_ratio(case["seed"]) == pytest.approx(case["mask_ratio"], abs=1e-12)
    for view, noisy in zip(views.hidden_SBC, ("noisy0", "noisy1", "noisy2"), strict=True):
        assert torch.equal(data["ids"][:, prompt:].masked_fill(view, mask_id), data[noisy][:, prompt:])
        assert torch.equal(data["ids"][:, :prompt], data[noisy][:, :prompt])
    expected = torch.tensor(case["weights"]) / 2
    assert torch.allclose(views.weight_SBC.amax((1, 2)), expected, atol=TOLERANCE)


@pytest.mark.parametrize("case", cases("selective_log_softmax"), ids=lambda c: c["name"])
def test_golden_weighted_sum_of_views(case):
    data = tensors(case["name"])
    iterations, batch = case["num_iterations"], case["batch"]
    num_rows, num_tokens = data["index"].shape
    assert num_rows == iterations * batch
    logits = data["logits"].reshape(iterations, 3, batch, num_tokens, -1)
    index = data["index"].reshape(iterations, batch, num_tokens)
    mask = data["mask"].reshape(iterations, batch, num_tokens)
    weights = data["weights"].reshape(iterations, 3)
    head = VocabularyHead(nn.Parameter(torch.eye(logits.shape[-1])))  # hidden states that are the logits
    everything = torch.arange(batch * num_tokens)
    total = torch.zeros(iterations, batch, num_tokens)
    for i in range(iterations):
        for s, hidden in enumerate((torch.ones_like(mask[i]), mask[i], ~mask[i])):
            logprobs = head(logits[i, s].flatten(0, 1), everything, index[i].flatten()).reshape(batch, num_tokens)
            total[i] += hidden * weights[i, s] / 2 * logprobs
    assert torch.allclose(total.reshape(num_rows, num_tokens), data["out"], atol=TOLERANCE)


@pytest.mark.parametrize("case", cases("loss"), ids=lambda c: c["name"])
def test_golden_logprobs_loss_and_gradients(case):
    data = tensors(case["name"])
    policy, reference = policy_and_reference()
    batch_size, prompt, completion = case["batch"], case["prompt"], case["completion"]
    accumulate = case["gradient_accumulation_steps"]
    views = tuple(release_views(seed, batch_size, prompt, completion, accumulate) for seed in case["mask_seeds"])
    batch = scoring_batch(data, views)
    for i, view in enumerate(views):
        with torch.no_grad():
            for model, name in ((policy, "policy_logps_all_iters"), (reference, "ref_logps")):
                if name not in data:
                    assert case["beta"] == 0.0
                    continue
                got = release_logprobs(model, batch, view)
                assert torch.allclose(got, data[name][:, i], atol=TOLERANCE), name
    for number, step in enumerate(case["steps"]):
        start, stop = step["chunk"]
        i = step["iteration_index"]
        assert step["mask_seed"] == case["mask_seeds"][i]
        part = slice_rows(batch, start, stop)
        policy.zero_grad()
        logprobs = release_logprobs(policy, part, part.views[i])
        loss_mask = data["completion_mask"][start:stop].bool()
        ref = data["ref_logps"][start:stop, i] if case["beta"] else None
        on_policy = case["num_iterations"] == 1  # then old is the forward pass itself, in the release and here
        old = logprobs.detach() if on_policy else data["old_logps"][start:stop, i]
        loss, metrics = coupled_grpo_loss(
            logprobs,
            old,
            ref,
            data["advantages"][start:stop],
            loss_mask,
            num_loss_tokens=int(loss_mask.sum()),  # the release's local count
            clip_low=case["epsilon"],
            clip_high=case["epsilon"],
            kl_coef=case["beta"],
        )
        loss.backward()
        assert loss.item() == pytest.approx(step["loss"], abs=TOLERANCE, rel=TOLERANCE)
        if ref is not None:  # the release prints an inflated kl (broadcast bug): recomputed from the log-probs
            delta = (data["ref_logps"][start:stop, i] - data["policy_logps_all_iters"][start:stop, i]).double()
            kl = ((delta.exp() - delta - 1) * loss_mask).sum() / loss_mask.sum()
            assert metrics["loss/kl"].item() == pytest.approx(kl.item(), rel=1e-4, abs=TOLERANCE)
        gradients = {k: p.grad for k, p in policy.backbone.named_parameters() if p.grad is not None}
        for key, norm in step["grad_norms"].items():
            assert gradients[key].norm().item() == pytest.approx(norm, rel=TOLERANCE, abs=TOLERANCE), key
        total = torch.stack([g.norm() for g in gradients.values()]).norm().item()
        assert total == pytest.approx(step["total_grad_norm"], rel=TOLERANCE)
        q_rows = data[f"s{number}.grad.q0"]
        got_rows = gradients["model.layers.0.self_attn.q_proj.weight"][: q_rows.shape[0]]
        assert torch.allclose(got_rows, q_rows, atol=TOLERANCE, rtol=1e-4)
        got_norm = gradients["model.norm.weight"]
        assert torch.allclose(got_norm, data[f"s{number}.grad.norm_weight"], atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("case", cases("loss_onpolicy"), ids=lambda c: c["name"])
def test_golden_on_policy_loss(case):
    """One inner iteration: old = the learner's own forward pass, so every ratio is 1."""
    data = tensors(case["name"])
    loss_case = next(c for c in cases("loss") if c["name"] == case["name"])
    new = data["policy_logps_all_iters"][:, 0]
    mask = data["completion_mask"].bool()
    loss, metrics = coupled_grpo_loss(
        new,
        new,
        data["ref_logps"][:, 0],
        data["advantages"],
        mask,
        num_loss_tokens=int(mask.sum()),
        clip_low=loss_case["epsilon"],
        clip_high=loss_case["epsilon"],
        kl_coef=case["beta"],
    )
    assert loss.item() == pytest.approx(case["loss"], abs=TOLERANCE)
    assert metrics["loss/ratio_mean"].item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("case", cases("rollout_and_score"), ids=lambda c: c["name"])
def test_golden_old_and_reference_scores_of_rollouts(case):
    """The rollouts' tokens come from the file; the scores that the release stored with them are recomputed."""
    data = tensors(case["name"])
    policy, reference = policy_and_reference()
    batch_size, prompt = data["prompt_ids"].shape
    completion = data["completion_ids"].shape[1]
    accumulate = case["gradient_accumulation_steps"]
    seeds = case["mask_seeds"]
    views = tuple(release_views(seed, batch_size, prompt, completion, accumulate) for seed in seeds)
    batch = scoring_batch(data, views)
    for i, view in enumerate(views):
        for model, name in ((policy, "old_per_token_logps"), (reference, "ref_per_token_logps")):
            with torch.no_grad():
                got = release_logprobs(model, batch, view)
            assert torch.allclose(got, data[name][:, i], atol=TOLERANCE), name
    rewards = sum(
        w * torch.tensor([0.0 if r is None else r for r in row])
        for w, row in zip(case["reward_weights"], case["rewards"], strict=True)
    )
    assert isinstance(rewards, torch.Tensor)
    group_size, valid = case["num_generations"], torch.ones(len(rewards), dtype=torch.bool)
    got = leave_one_out_advantages(rewards, valid, group_size)
    if case["scale_rewards"]:
        got = scale_by_std(got, rewards, valid, group_size)
    assert torch.allclose(got, torch.tensor(case["advantages"]), atol=TOLERANCE)
    assert torch.allclose(got, data["advantages"], atol=TOLERANCE)


def test_golden_leave_one_out():
    cases_ = golden_json("logps/cases.json")["leave_one_out"]
    assert cases_
    for case in cases_:
        rewards, group_size = torch.tensor(case["rewards"]), case["num_generations"]
        valid = torch.ones(len(rewards), dtype=torch.bool)
        got = leave_one_out_advantages(rewards, valid, group_size)
        assert torch.allclose(got, torch.tensor(case["advantages"]), atol=TOLERANCE)
        scaled = scale_by_std(got, rewards, valid, group_size)
        assert torch.allclose(scaled, torch.tensor(case["advantages_scaled"]), atol=TOLERANCE)


def test_golden_padding_is_what_we_mend():
    """The release attends to padding; ours does not. On padded prompts the two must differ, and only there."""
    padded = False
    for case in cases("loss"):
        data = tensors(case["name"])
        if "prompt_mask" not in data or bool(data["prompt_mask"].all()):
            continue
        padded = True
        policy, _ = policy_and_reference()
        views = (release_views(case["mask_seeds"][0], case["batch"], case["prompt"], case["completion"], 1),)
        batch = scoring_batch(data, views)
        with torch.no_grad():
            ours = completion_logprobs(policy, batch, views[0], mask_token_id=policy.mask_token_id)
            release = release_logprobs(policy, batch, views[0])
        has_padding = ~data["prompt_mask"].bool().all(1)
        gap = (ours - release).abs().amax(1)
        assert (gap[has_padding] > 1e-3).all()
        assert (gap[~has_padding] < TOLERANCE).all()
    assert padded or all(bool(tensors(c["name"]).get("prompt_mask", torch.ones(1)).all()) for c in cases("loss"))
