"""The reference policy: log-probs of completions under frozen weights, with the very views that the learner uses.

Workers are interchangeable: what they score under travels with the call. A refresh is a copy of the policy (the paper;
then the policy's own version is named, and nothing is computed) or a mixture of policy and reference (the release).
"""

from collections.abc import Iterator

import numpy as np
import ray
import torch

from actors.weights import Bucket, Contents, PolicyHolder, Weights, fetch, fill_bucket, plan_buckets, sealed
from diffrl.micro_batches import crop_prompts
from diffrl.models.base import PolicyModel
from diffrl.scoring import completion_logprobs, to_device
from diffrl.types import ScoringBatch


class Reference:
    """Scores batches under whatever version the driver names; the driver refreshes it by naming another."""

    def __init__(self, *, threads: int, attend_padding: bool):
        torch.set_num_threads(threads)
        self.attend_padding = attend_padding
        self.holder = PolicyHolder("cuda" if torch.cuda.is_available() else "cpu")

    @ray.method
    def logprobs(self, batch: ScoringBatch, weights: Weights) -> torch.Tensor:
        """float32 [I, B, C]: one estimate per inner iteration."""
        return logprobs_under(self.holder.at(weights), batch, attend_padding=self.attend_padding)

    @ray.method(num_returns="streaming")
    def mixed(self, policy: Weights, reference: Weights, mix: float) -> Iterator[np.ndarray | Contents]:
        """mix * policy + (1 - mix) * reference, as `weights.sealed` says."""
        yield from sealed(mixed_buckets(policy, reference, mix))


def logprobs_under(model: PolicyModel, batch: ScoringBatch, *, attend_padding: bool) -> torch.Tensor:
    """float32 [I, B, C], on the CPU: the batch's own estimates under a model."""
    batch = to_device(batch if attend_padding else crop_prompts(batch), str(next(model.parameters()).device))
    with torch.no_grad():
        scores = [
            completion_logprobs(model, batch, views, mask_token_id=model.mask_token_id, attend_padding=attend_padding)
            for views in batch.views
        ]
    return torch.stack(scores).cpu()


def mixed_buckets(policy: Weights, reference: Weights, mix: float) -> Iterator[Bucket]:
    """Computed in float32, one bucket after the other; adapters are merged in."""
    new, old = fetch(policy), fetch(reference)
    plan = plan_buckets({entry.name: entry.num_bytes for entry in policy.tensors.entries})
    for number, names in enumerate(plan):
        pairs = {name: (old[name], new[name]) for name in names}
        yield fill_bucket(
            {name: torch.lerp(a.float(), b.float(), mix).to(b.dtype) for name, (a, b) in pairs.items()}, number
        )
