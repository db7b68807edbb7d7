"""In vLLM's own processes: new weights for a model that is loaded. Named to vLLM as its worker's extension."""

from collections.abc import Sequence
from typing import Any

import torch


class Reloading:
    """Mixed into vLLM's worker, of which there is one for each part of a divided model; each keeps its part of the weights."""

    reload_weights: Any  # vLLM's own

    def stage_tensor(self, name: str, dtype: str, shape: Sequence[int], data: bytes) -> None:
        """A tensor of the next weights, under its name in the folder."""
        tensor = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(list(shape))
        self.__dict__.setdefault("staged", {})[name] = tensor

    def load_staged(self) -> None:
        """vLLM loads anew, layer by layer; copying into the loaded parameters fails where they are kept repacked (CPU)."""
        self.reload_weights(weights_iterator=iter(self.__dict__.pop("staged").items()))
