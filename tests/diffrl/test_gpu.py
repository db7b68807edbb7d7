"""Sampler and scoring on a GPU beside the CPU: the same tokens in the same order, the same log-probs and gradients."""

import copy

import pytest
import torch

from diffrl.models import head
from diffrl.models.folders import load_model
from diffrl.sampler import Canvas, Engine, Filled, SamplingParams, filters, sample
from diffrl.scoring import completion_logprobs, to_device
from tests.diffrl.test_sampler import tiny_dream
from tests.diffrl.test_scoring import make_batch
from tests.diffrl.test_scoring import tiny_dream as tiny_scored
from tests.golden_files import golden_file, golden_json
from tests.test_golden_generate import params_of, peer_completion, peer_step_map

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees (nvidia-smi, a CUDA build)"),
]
EXACT = {
    f"{algorithm}, T={temperature}, {name}": SamplingParams(
        **{"algorithm": algorithm, "temperature": temperature, "steps": 9, "top_p": None, "top_k": None, **filtered}
    )
    for algorithm in ("origin", "maskgit_plus", "topk_margin", "entropy")
    for temperature in (0.0, 1.0)
    for name, filtered in {
        "plain": {},
        "filtered": {"top_p": 0.9, "top_k": 20},
        "nucleus": {"top_p": 0.8},
        "drawn order": {"alg_temp": 0.4},
    }.items()
    if not (algorithm == "origin" and "alg_temp" in filtered)
}
GREEDY = {"temperature": 0.0, "top_p": None, "top_k": None, "steps": 12}
APPROXIMATE = {
    "prefix cache": SamplingParams(**GREEDY, cache="prefix", block_size=8),
    "dual cache": SamplingParams(**GREEDY, cache="dual", block_size=8),
    "threshold": SamplingParams(**GREEDY, confidence_threshold=0.3),
    "factor": SamplingParams(**GREEDY, confidence_factor=1.5),
    "entropy budget": SamplingParams(**GREEDY, entropy_budget=3.0),
    "several tokens": SamplingParams(**GREEDY, tokens_per_step=3),
    "early end": SamplingParams(**GREEDY, early_end=True),
}


def filled(device: str, params: SamplingParams) -> list[Filled]:
    """Rows of different lengths and prompts, in more than one batch."""
    tiny = tiny_dream(layers=2).to(device)
    generator = torch.Generator().manual_seed(5)
    engine = Engine(tiny, params, max_tokens=200, end_ids=[11], device=device)
    for seed, length in enumerate((40, 33, 47, 20, 40)):
        ids_L = torch.randint(8, tiny.vocab_size - 1, (length,), generator=generator)
        engine.add(Canvas(ids_L=ids_L, hidden_L=torch.arange(length) >= 12, seed=seed))
    return engine.run()


@pytest.mark.parametrize("params", [*EXACT.values(), *APPROXIMATE.values()], ids=[*EXACT, *APPROXIMATE])
def test_rows_are_those_of_the_cpu(params: SamplingParams):
    for here, there in zip(filled("cpu", params), filled("cuda", params), strict=True):
        assert torch.equal(here.ids_L, there.ids_L.cpu())
        assert torch.equal(here.step_map_L, there.step_map_L.cpu())
        torch.testing.assert_close(here.probability_L, there.probability_L.cpu(), atol=1e-5, rtol=1e-4, equal_nan=True)
        assert here.passes == there.passes


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    params = EXACT["entropy, T=1.0, filtered"]
    whole = filled("cuda", params)
    monkeypatch.setitem(filters.CHUNK_ELEMENTS, "cuda", 1)
    for one, other in zip(whole, filled("cuda", params), strict=True):
        assert torch.equal(one.ids_L, other.ids_L) and torch.equal(one.step_map_L, other.step_map_L)


def test_golden_sequences_and_step_maps():
    """As tests/test_golden_generate.py, whose numbers were computed by Dream's own code."""
    golden_file("generate/model.safetensors")
    model = load_model(golden_file("generate/config.json").parent).to("cuda")
    cases = [case for case in golden_json("generate/deterministic.json")["deterministic"] if case["alg"] != "origin"]
    assert cases  # of origin the peer's random stream would be replayed
    for case in cases:
        prompt = torch.tensor(case["prompt_ids"])
        mask = torch.ones_like(prompt) if case["attention_mask"] is None else torch.tensor(case["attention_mask"])
        result = sample(
            model,
            prompt.to("cuda"),
            mask[:, : prompt.shape[1]].to("cuda"),
            num_tokens=case["max_new_tokens"],
            params=params_of(case),
            seeds=range(len(prompt)),
        )
        step_map = peer_step_map(torch.tensor(case["history"]), model.mask_token_id)
        assert torch.equal(result.completion_ids_BC.cpu(), peer_completion(case)), case["id"]
        assert torch.equal(result.step_map_BC.cpu(), step_map), case["id"]


@pytest.mark.parametrize("chunk", [None, 64])
def test_logprobs_and_gradients_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch, chunk: int | None):
    if chunk is not None:
        monkeypatch.setitem(head.CHUNK_LOGITS, "cuda", chunk)
    results = []
    for device in ("cpu", "cuda"):
        scored, batch = tiny_scored().to(device), to_device(make_batch(), device)
        logprobs_BC = completion_logprobs(scored, batch, batch.views[0], mask_token_id=scored.mask_token_id)
        (logprobs_BC * torch.linspace(-1, 1, logprobs_BC.numel(), device=device).view_as(logprobs_BC)).sum().backward()
        grads = {name: parameter.grad.cpu() for name, parameter in scored.named_parameters()}
        results.append((logprobs_BC.detach().cpu(), grads))
    (here, here_grads), (there, there_grads) = results
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    for name, grad in here_grads.items():
        torch.testing.assert_close(grad, there_grads[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_bfloat16_scores_stay_near():
    exact, rounded = tiny_scored().to("cuda"), tiny_scored().to("cuda", torch.bfloat16)
    batch = to_device(make_batch(), "cuda")
    with torch.no_grad():
        gaps = [
            completion_logprobs(exact, batch, view, mask_token_id=exact.mask_token_id)
            - completion_logprobs(rounded, batch, view, mask_token_id=exact.mask_token_id)
            for view in batch.views
        ]
    assert torch.stack(gaps).abs().mean() < 0.05


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_layers_fill_the_same_rows():
    """`rollout.compile`, as actors/weights.py does it."""
    tiny = tiny_dream(layers=3).to("cuda")
    compiled = copy.deepcopy(tiny)
    for layer in compiled.backbone.model.layers[:-1]:
        layer.compile(dynamic=True)
    generator = torch.Generator().manual_seed(5)
    ids_RL = torch.randint(8, tiny.vocab_size - 1, (6, 40), generator=generator)
    rows = []
    for policy in (tiny, compiled):
        engine = Engine(policy, SamplingParams(**GREEDY), max_tokens=1000, device="cuda")
        for ids_L in ids_RL:
            engine.add(Canvas(ids_L=ids_L, hidden_L=torch.arange(40) >= 16, seed=0))
        rows.append(engine.run())
    for one, other in zip(*rows, strict=True):
        assert torch.equal(one.ids_L, other.ids_L) and torch.equal(one.step_map_L, other.step_map_L)
