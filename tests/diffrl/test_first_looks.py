"""Confidence at the first steps, against whole rows through the model and against what the sampler did with it."""

import numpy as np
import torch

from diffrl.analysis.confidence import first_looks
from diffrl.models.tiny import tiny_model
from diffrl.sampler import SamplingParams, sample
from tests.diffrl.tiny_folder import tiny_tokenizer

PROMPT, WINDOW = [20, 31, 25], 10


def test_looks_are_what_the_sampler_saw():
    """Without filters and at temperature 1, `entropy` reveals the position whose own distribution has the least of it."""
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "max_positions": 64}
    model = tiny_model(tokenizer, generator=torch.Generator().manual_seed(3), **sizes).eval()
    params = SamplingParams(algorithm="entropy", steps=WINDOW, temperature=1.0, top_p=None, top_k=None)
    prompt = torch.tensor([PROMPT])
    made = sample(model, prompt, torch.ones_like(prompt), num_tokens=WINDOW, params=params, seeds=[0])
    ids_C, step_map_C = made.completion_ids_BC[0].numpy(), made.step_map_BC[0].numpy()
    found = first_looks(model, np.array(PROMPT), ids_C, step_map_C, num_looks=WINDOW, device="cpu")

    steps = np.unique(step_map_C)
    assert len(steps) == WINDOW - 1 and np.isnan(found.probability_KC[-1]).all(), "the last step reveals two"
    for number, step in enumerate(steps):
        hidden_C = step_map_C >= step
        row_L = torch.tensor([*PROMPT, *np.where(hidden_C, model.mask_token_id, ids_C)])[None]
        with torch.no_grad():
            logits_CV = model.logits(model.hidden_states(row_L, torch.ones_like(row_L, dtype=torch.bool))[0, -WINDOW:])
        probs_CV = logits_CV.softmax(-1)
        probability_C, entropy_C = probs_CV.amax(-1).numpy(), torch.special.entr(probs_CV).sum(-1).numpy()
        np.testing.assert_allclose(found.probability_KC[number][hidden_C], probability_C[hidden_C], rtol=1e-4)
        np.testing.assert_allclose(found.entropy_KC[number][hidden_C], entropy_C[hidden_C], rtol=1e-4)
        assert np.isnan(found.probability_KC[number][~hidden_C]).all()
        if step < steps[-1]:
            assert step_map_C[np.nanargmin(found.entropy_KC[number])] == step
