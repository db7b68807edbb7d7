"""Forward pass, schedule, filters and sampling against numbers computed by Dream's own code (tests/golden/README.md).

At temperature 0 ours must equal the peer's token for token and step for step. `origin` reveals at random: there the
peer's stream is replayed (`PeerNoise`). At other temperatures the random streams differ on purpose (one per row), so
that what is compared is the distribution.

Where ours differs on purpose: the peer can draw [MASK], which leaves holes in its output; ours never does. In those
cases ours is compared up to the step where the peer first does so, and must be complete.
"""

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffrl.models.base import PolicyModel
from diffrl.models.folders import load_model
from diffrl.sampler import Noise, SampleResult, SamplingParams, sample
from diffrl.sampler.filters import confidences, draw_tokens, filtered_distributions, probability_of
from diffrl.sampler.params import reveal_counts
from tests.golden_files import golden_file, golden_json, golden_tensors

TOLERANCE = 1e-5


class PeerNoise:
    """The peer's stream: torch.manual_seed(seed), then one torch.rand per step over the batch's hidden positions."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, seeds: Sequence[int], tickets: Sequence[int], where_RW: Tensor) -> Tensor:
        draws = torch.rand(int(where_RW.sum()), generator=self.generator)
        counts = where_RW.sum(1)[torch.tensor(tickets).argsort()].tolist()  # the peer's rows stand as they were given
        by_ticket = dict(zip(sorted(tickets), draws.split(counts), strict=True))
        return torch.cat([by_ticket[ticket] for ticket in tickets])


@pytest.fixture(scope="module")
def model() -> PolicyModel:
    golden_file("generate/model.safetensors")
    return load_model(golden_file("generate/config.json").parent)


def with_mask_row(case: dict) -> PolicyModel:
    """The golden model with another head row for [MASK], so that it can be the most probable token."""
    model = load_model(golden_file("generate/config.json").parent)
    weight = model.backbone.lm_head.weight.detach().clone()
    weight[model.mask_token_id] = torch.tensor(case["lm_head_mask_row"])
    model.backbone.lm_head.weight = torch.nn.Parameter(weight)
    return model


def params_of(case: dict, **changes) -> SamplingParams:
    names = ("steps", "temperature", "top_p", "top_k", "alg_temp", "eps")
    return SamplingParams(**{"algorithm": case["alg"], **{name: case[name] for name in names}, **changes})


def default_params(case: dict) -> SamplingParams:
    """`peer_defaults`: what was passed, and what the peer made of what was not."""
    passed = case["passed"]
    return SamplingParams(
        algorithm=passed.get("alg", "origin"),
        steps=passed["steps"],
        temperature=case["effective_temperature"],
        top_p=case["effective_top_p"],
        top_k=case["effective_top_k"],
        alg_temp=passed.get("alg_temp") or 0.0,
        eps=passed.get("eps", 1e-3),
    )


def run_case(model: PolicyModel, case: dict, params: SamplingParams, noise: Noise | None = None) -> SampleResult:
    prompt = torch.tensor(case["prompt_ids"])
    mask = torch.ones_like(prompt) if case["attention_mask"] is None else torch.tensor(case["attention_mask"])
    return sample(
        model,
        prompt,
        mask[:, : prompt.shape[1]],
        num_tokens=case["max_new_tokens"],
        params=params,
        seeds=range(len(prompt)),
        noise=noise,
    )


def peer_noise(case: dict, params: SamplingParams) -> Noise | None:
    return PeerNoise(case["seed"]) if params.algorithm == "origin" else None


def peer_completion(case: dict) -> Tensor:
    return torch.tensor(case["sequences"])[:, len(case["prompt_ids"][0]) :]


def peer_step_map(history_SBC: Tensor, mask_token_id: int) -> Tensor:
    """The first step after which a position is no longer [MASK]; the number of steps where it never is."""
    return (history_SBC == mask_token_id).long().cumprod(0).sum(0)


def assert_complete(result: SampleResult, mask_token_id: int, params: SamplingParams) -> None:
    assert not (result.completion_ids_BC == mask_token_id).any()
    batch, num_tokens = result.completion_ids_BC.shape
    if params.algorithm != "origin":
        counts = reveal_counts(num_tokens, params.steps, params.eps)
        for steps_C in result.step_map_BC:
            assert torch.bincount(steps_C, minlength=params.steps).tolist() == list(counts)
    assert result.step_map_BC.shape == (batch, num_tokens)


def test_golden_forward_without_padding(model):
    data = golden_tensors("generate/forward.safetensors")
    ids = data["input_ids"]
    logits = model(ids, torch.ones_like(ids).bool())
    # The file's logits are unshifted: what it holds at i is about token i + 1.
    torch.testing.assert_close(logits[:, 1:], data["logits"][:, :-1], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits[:, 0], data["logits"][:, 0], atol=TOLERANCE, rtol=0)


def test_golden_forward_with_left_padding(model):
    data = golden_tensors("generate/forward.safetensors")
    mask = data["pad_attention_mask"].bool()
    real = mask[:, :-1]  # where the source of the shifted row is a token
    assert not mask.all() and real.any()
    logits = model(data["pad_input_ids"], mask)[:, 1:]
    torch.testing.assert_close(logits[real], data["pad_logits"][:, :-1][real], atol=TOLERANCE, rtol=0)
    select = mask.clone()
    select[:, 0] = False
    picked = model(data["pad_input_ids"], mask, select)
    torch.testing.assert_close(picked, logits[select[:, 1:]], atol=TOLERANCE, rtol=0)


def test_golden_schedule():
    cases = golden_json("generate/schedule.json")
    assert cases
    for case in cases:
        counts = reveal_counts(case["new_tokens"], case["steps"], case["eps"])
        assert list(counts) == case["transfers"], case
        assert sum(counts) == case["new_tokens"] - case["left"]
        assert counts.count(0) == case["zero_steps"]


def test_golden_deterministic_sequences_and_step_maps(model):
    cases = golden_json("generate/deterministic.json")["deterministic"]
    assert cases
    wrong = []
    for case in cases:
        params = params_of(case)
        assert params.temperature == 0 and params.alg_temp == 0
        result = run_case(model, case, params, peer_noise(case, params))
        step_map = peer_step_map(torch.tensor(case["history"]), model.mask_token_id)
        if not torch.equal(result.completion_ids_BC, peer_completion(case)):
            wrong.append(f"{case['id']}: tokens")
        if not torch.equal(result.step_map_BC, step_map):
            wrong.append(f"{case['id']}: step map")
        if torch.bincount(result.step_map_BC[0], minlength=params.steps).tolist() != case["transfer_counts"]:
            wrong.append(f"{case['id']}: transfer counts")
        assert_complete(result, model.mask_token_id, params)
    assert not wrong, f"{len(wrong)} of {len(cases)} cases: {wrong[:10]}"


def test_golden_mask_token_is_never_emitted_at_temperature_0():
    """Ours differs on purpose: the peer reveals [MASK] as a token and so leaves holes."""
    cases = golden_json("generate/deterministic.json")["mask_token_argmax"]
    assert cases
    for case in cases:
        model, params = with_mask_row(case), params_of(case)
        result = run_case(model, case, params, peer_noise(case, params))
        assert_complete(result, model.mask_token_id, params)
        if params.algorithm == "origin":
            continue  # how many the peer meant to reveal is not in the file
        history = torch.tensor(case["history"])
        peer_steps = peer_step_map(history, model.mask_token_id)
        first = first_mask_step(peer_steps, params)
        assert first < params.steps or not torch.tensor(case["mask_left"]).any(), case["id"]
        before = peer_steps < first
        assert torch.equal(result.step_map_BC < first, before), case["id"]
        assert torch.equal(result.step_map_BC[before], peer_steps[before]), case["id"]
        # As the peer had it before that step: once out of step, it writes [MASK] over tokens it had revealed.
        peer_tokens = history[max(first - 1, 0)]
        assert torch.equal(result.completion_ids_BC[before], peer_tokens[before]), case["id"]


def first_mask_step(peer_steps_BC: Tensor, params: SamplingParams) -> int:
    """The step at which some row of the peer first reveals fewer positions than the schedule says: it drew [MASK]."""
    counts = reveal_counts(peer_steps_BC.shape[1], params.steps, params.eps)
    for step, count in enumerate(counts):
        if ((peer_steps_BC == step).sum(1) < count).any():
            return step
    return params.steps


def test_golden_mask_token_is_never_emitted_when_sampling():
    cases = golden_json("generate/sampled.json")["mask_token_sampled"]
    assert cases
    for case in cases:
        model, params = with_mask_row(case), params_of(case)
        assert_complete(run_case(model, case, params), model.mask_token_id, params)


def test_golden_peer_defaults(model):
    """The values that the peer falls back on silently, passed in the open."""
    cases = golden_json("generate/sampled.json")["peer_defaults"]
    greedy = [case for case in cases if case["effective_temperature"] == 0]
    assert greedy
    for case in cases:
        params = default_params(case)
        result = run_case(model, case, params, peer_noise(case, params) if case in greedy else None)
        assert_complete(result, model.mask_token_id, params)
        if case in greedy:
            assert torch.equal(result.completion_ids_BC, peer_completion(case)), case["id"]
            step_map = peer_step_map(torch.tensor(case["history"]), model.mask_token_id)
            assert torch.equal(result.step_map_BC, step_map), case["id"]


def dense(logits: Tensor, params: SamplingParams) -> Tensor:
    """filtered_distributions as one [N, V] matrix."""
    out = torch.zeros(logits.shape)
    for rows, probs, ids in filtered_distributions(logits, params):
        out[rows] = probs if ids is None else torch.zeros(len(probs), logits.shape[1]).scatter_(1, ids, probs)
    return out


def filter_params(**changes) -> SamplingParams:
    return SamplingParams(**{"steps": 1, "temperature": 1.0, "top_p": None, "top_k": None, **changes})


def test_golden_top_p_and_top_k_filters():
    data = golden_tensors("generate/filters.safetensors")
    names = [name for name in data if re.fullmatch(r"top_[pk]_[\d.]+", name)]
    assert {name[:6] for name in names} == {"top_p_", "top_k_"}
    for name in names:
        value = name[6:]
        params = filter_params(top_p=float(value)) if name.startswith("top_p") else filter_params(top_k=int(value))
        probs = dense(data["logits"], params)
        assert torch.equal(probs > 0, data[name] > torch.finfo(torch.float32).min), name
        torch.testing.assert_close(probs, data[name].softmax(-1), atol=1e-6, rtol=1e-5)


def test_golden_sample_tokens_confidences_and_tokens():
    data = golden_tensors("generate/filters.safetensors")
    logits = data["logits"]
    checked = 0
    for name, wanted in data.items():
        found = re.fullmatch(r"(conf|tok)_(\w+)_T([\d.]+)_p([\d.]+|None)", name)
        if found is None:
            assert name == "logits" or re.fullmatch(r"top_[pk]_[\d.]+", name), f"{name}: what is it?"
            continue
        kind, algorithm, temperature, top_p = found.groups()
        nucleus = None if top_p == "None" else float(top_p)
        params = filter_params(algorithm=algorithm, temperature=float(temperature), top_p=nucleus)
        if kind == "tok" and params.temperature > 0:
            continue  # drawn by the peer's stream; used below, for their confidence
        everything = torch.ones(logits.shape[1], dtype=torch.bool)
        tokens, confidence = draw_tokens(logits, torch.zeros(len(logits)), everything, params)
        if kind == "tok":
            assert torch.equal(tokens, wanted), name
        elif algorithm != "maskgit_plus":
            torch.testing.assert_close(confidences(logits, params), wanted, atol=1e-5, rtol=1e-5)
        elif params.temperature == 0:
            torch.testing.assert_close(confidence, wanted, atol=1e-6, rtol=1e-5)
        else:
            drawn = data["tok" + name.removeprefix("conf")]
            peer = probability_of(drawn, dense(logits, params), None)
            torch.testing.assert_close(peer, wanted, atol=1e-6, rtol=1e-5)
        checked += 1
    assert checked


def test_golden_sampled_cases_complete_and_reproducible(model):
    """Settings of the peer's sampled runs; its random stream is not ours, so no tokens are compared."""
    cases = golden_json("generate/sampled.json")["sampled"]
    assert cases
    for case in cases:
        params = params_of(case)
        result = run_case(model, case, params)
        assert_complete(result, model.mask_token_id, params)
        if case["attention_mask"] is not None:
            assert torch.equal(run_case(model, case, params).completion_ids_BC, result.completion_ids_BC)


def peer_filters(logits: Tensor, params: SamplingParams, slack: float = 0.0) -> Tensor:
    """Temperature, top_p, top_k in the peer's order, by a full sort: float64 probabilities. `slack` widens top_p."""
    logits = logits.double() / params.temperature
    if params.top_p is not None and params.top_p < 1:
        values, order = logits.sort(descending=True)
        before = torch.nn.functional.pad(values.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
        drop = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before > params.top_p + slack)
        logits = logits.masked_fill(drop, -torch.inf)
    if params.top_k is not None:
        kth = logits.topk(min(params.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return logits.softmax(-1)


def test_golden_sampled_first_tokens_follow_the_filtered_softmax(model):
    """Chi-square of the tokens drawn at the first step against the exact distribution, for the peer's settings."""
    cases = golden_json("generate/sampled.json")["sampled"]
    settings = {}
    for case in cases:
        if case["temperature"] > 0 and case["attention_mask"] is None:
            settings.setdefault((case["temperature"], case["top_p"], case["top_k"]), case)
    assert settings
    rows, num_tokens = 1000, 3
    for case in settings.values():
        params = params_of(case, algorithm="entropy", steps=1, alg_temp=0.0)
        prompt = torch.tensor(case["prompt_ids"][:1]).expand(rows, -1)
        mask = torch.ones_like(prompt)
        result = sample(model, prompt, mask, num_tokens=num_tokens, params=params, seeds=range(rows))
        ids = torch.cat([prompt[:1], torch.full((1, num_tokens), model.mask_token_id)], 1)
        with torch.no_grad():
            logits = model(ids, torch.ones_like(ids).bool())[0, -num_tokens:]
        exact = peer_filters(logits, params)
        possible = peer_filters(logits, params, slack=1e-5) > 0
        exact[:, model.mask_token_id] = 0
        exact /= exact.sum(-1, keepdim=True)
        for position in range(num_tokens):
            drawn = result.completion_ids_BC[:, position]
            assert possible[position][drawn].all(), case["id"]
            assert chi_square_z(drawn, exact[position]) < 6, case["id"]


def chi_square_z(drawn: Tensor, probs: Tensor) -> float:
    """Standard deviations by which chi-square exceeds its mean; tokens expected fewer than 5 times are pooled."""
    expected = probs * len(drawn)
    observed = torch.bincount(drawn, minlength=len(probs)).double()
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    chi_square = ((observed - expected) ** 2 / expected.clamp(min=1.0)).sum().item()
    freedom = max(1, len(expected) - 1)
    return (chi_square - freedom) / (2 * freedom) ** 0.5
