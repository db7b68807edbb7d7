"""The reference policy: log-probs of completions under frozen weights, with the very views that the learner uses."""

import ray
import torch

from actors.weights import PolicyHolder, Weights
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
        model = self.holder.at(weights)
        batch = to_device(batch, self.holder.device)
        with torch.no_grad():
            scores = [
                completion_logprobs(
                    model, batch, views, mask_token_id=model.mask_token_id, attend_padding=self.attend_padding
                )
                for views in batch.views
            ]
        return torch.stack(scores).cpu()
