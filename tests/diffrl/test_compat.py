"""`diffusion_generate`: the golden runs of the release, its silent defaults, and the code in the module's docstring."""

import re
from pathlib import Path

import pytest
import torch

from diffrl import compat
from diffrl.compat import DiffusionOutput
from diffrl.models.base import PolicyModel
from diffrl.models.folders import load_model
from tests.diffrl.tiny_folder import tiny_folder
from tests.golden_files import golden_file, golden_json
from tests.test_golden_generate import PeerNoise

OPTIONS = ("alg", "steps", "eps", "temperature", "top_p", "top_k", "alg_temp", "max_new_tokens")


@pytest.fixture(scope="module")
def model() -> PolicyModel:
    golden_file("generate/model.safetensors")
    return load_model(golden_file("generate/config.json").parent).eval()


def run_case(model: PolicyModel, case: dict, **options) -> DiffusionOutput:
    prompt = torch.tensor(case["prompt_ids"])
    mask = None if case["attention_mask"] is None else torch.tensor(case["attention_mask"])[:, : prompt.shape[1]]
    noise = PeerNoise(case["seed"]) if options.get("alg") == "origin" else None
    output = model.diffusion_generate(
        prompt, attention_mask=mask, output_history=True, return_dict_in_generate=True, noise=noise, **options
    )
    assert isinstance(output, DiffusionOutput)
    return output


def test_golden_histories(model):
    """Step for step, prompts and padding included."""
    cases = golden_json("generate/deterministic.json")["deterministic"]
    assert {case["alg"] for case in cases} >= {"entropy", "origin"}
    for case in cases:
        output = run_case(model, case, **{name: case[name] for name in OPTIONS})
        assert torch.equal(output.sequences, torch.tensor(case["sequences"])), case["id"]
        history = torch.tensor(case["history"])
        assert output.history is not None and len(output.history) == case["steps"] == len(history)
        prompt_ids = torch.tensor(case["prompt_ids"])
        for ours, peer in zip(output.history, history, strict=True):
            assert torch.equal(ours, torch.cat([prompt_ids, peer], 1)), case["id"]


def test_golden_defaults_are_those_that_the_release_uses(model):
    cases = golden_json("generate/sampled.json")["peer_defaults"]
    assert any(case["effective_temperature"] == 0 for case in cases)
    for case in cases:
        tokens, passed = case["max_new_tokens"], case["passed"]
        output = run_case(model, case, max_new_tokens=tokens, **passed)
        effective = {name: case[f"effective_{name}"] for name in ("temperature", "top_p", "top_k")}
        same = run_case(model, case, max_new_tokens=tokens, **{**passed, **effective})
        assert torch.equal(output.sequences, same.sequences), case["id"]
        if case["effective_temperature"] == 0:
            assert torch.equal(output.sequences, torch.tensor(case["sequences"])), case["id"]
        elif "top_k" not in passed:  # and the default plays a part
            wide = run_case(model, case, max_new_tokens=tokens, **passed, top_k=None)
            assert not torch.equal(output.sequences, wide.sequences), case["id"]


def test_algorithm_and_steps_that_are_not_given(model):
    prompt = torch.tensor([[5, 6, 7]])
    given = model.diffusion_generate(prompt, max_new_tokens=6, alg="origin", steps=512, eps=1e-3)
    assert isinstance(given, torch.Tensor) and given.shape == (1, 9)
    assert torch.equal(model.diffusion_generate(prompt, max_new_tokens=6), given)


def test_rows_of_a_prompt_differ_and_seeds_repeat(model):
    prompt = torch.tensor([[1, 5, 6], [501, 501, 9]])
    options = {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]]), "max_new_tokens": 8, "steps": 8}
    rows = model.diffusion_generate(prompt, num_return_sequences=2, seed=3, **options)
    assert torch.equal(rows[:, :3], prompt[[0, 0, 1, 1]])
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[2], rows[3])
    assert torch.equal(model.diffusion_generate(prompt, num_return_sequences=2, seed=3, **options), rows)
    assert not torch.equal(model.diffusion_generate(prompt, num_return_sequences=2, seed=4, **options), rows)
    # padding is not attended to: the second prompt is [9] alone
    greedy = {"temperature": 0.0, "alg": "entropy", "max_new_tokens": 8, "steps": 8}
    padded = model.diffusion_generate(prompt, options["attention_mask"], **greedy)
    assert torch.equal(padded[1:, 3:], model.diffusion_generate(prompt[1:, 2:], **greedy)[:, 1:])


def test_a_row_longer_than_the_context_is_refused(model):
    prompt, context = torch.ones(1, 30, dtype=torch.long), model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"30 tokens and {context} to fill .* more than the {context} of"):
        model.diffusion_generate(prompt, max_new_tokens=context)
    with pytest.raises(ValueError, match="did you mean 'entropy'"):
        model.diffusion_generate(prompt, max_new_tokens=2, alg="entropie")
    with pytest.raises(TypeError, match="max_new_tokens"):
        model.diffusion_generate(prompt)


def test_the_documented_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = re.search(r"```python\n(.*?)```", compat.__doc__ or "", re.DOTALL)
    assert found and found[1].count("runs/quickstart/rl/model") == 1
    names: dict = {}
    exec(found[1].replace("runs/quickstart/rl/model", str(tiny_folder(tmp_path / "model"))), names)
    output, prompt = names["output"], names["inputs"].input_ids
    assert output.sequences.shape[1] == prompt.shape[1] + 16 == output.history[0].shape[1]
    assert torch.equal(output.history[-1], output.sequences) and len(output.history) == 16
    assert capsys.readouterr().out.startswith("def f(x):")
