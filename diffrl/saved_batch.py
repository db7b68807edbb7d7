"""A TrainBatch in two files, to look at it or learn from it again: NAME.safetensors with its tensors, NAME.json with
the rest. Nothing in it can run code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from diffrl.types import MaskViews, ScoringBatch, TrainBatch


def save_batch(path: Path, batch: TrainBatch, facts: Mapping[str, Any]) -> None:
    """Write `path`.safetensors and `path`.json, which holds `facts` too (why it was saved, of which version)."""
    scoring = batch.scoring
    tensors = {
        "prompt_ids_BP": scoring.prompt_ids_BP,
        "prompt_mask_BP": scoring.prompt_mask_BP,
        "completion_ids_BC": scoring.completion_ids_BC,
        "scored_BC": scoring.scored_BC,
        "loss_mask_BC": batch.loss_mask_BC,
        "advantages_B": batch.advantages_B,
    }
    if batch.ref_logprobs_IBC is not None:
        tensors["ref_logprobs_IBC"] = batch.ref_logprobs_IBC
    for number, views in enumerate(scoring.views):
        tensors |= {f"hidden_SBC.{number}": views.hidden_SBC, f"weight_SBC.{number}": views.weight_SBC}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copies, since the format refuses tensors that share memory: loss mask and scored tokens may be one.
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        f"{path}.safetensors",
    )
    rest = {
        "group_size": scoring.group_size,
        "num_views": len(scoring.views),
        "num_loss_tokens": batch.num_loss_tokens,
        "num_loss_rows": batch.num_loss_rows,
    }
    Path(f"{path}.json").write_text(json.dumps({**rest, **facts}, indent=2) + "\n")


def load_batch(path: Path) -> TrainBatch:
    """What `save_batch` wrote to `path`. Raises FileNotFoundError."""
    tensors = load_file(f"{path}.safetensors")
    rest = json.loads(Path(f"{path}.json").read_text())
    views = tuple(
        MaskViews(hidden_SBC=tensors[f"hidden_SBC.{i}"], weight_SBC=tensors[f"weight_SBC.{i}"])
        for i in range(rest["num_views"])
    )
    return TrainBatch(
        scoring=ScoringBatch(
            prompt_ids_BP=tensors["prompt_ids_BP"],
            prompt_mask_BP=tensors["prompt_mask_BP"],
            completion_ids_BC=tensors["completion_ids_BC"],
            scored_BC=tensors["scored_BC"],
            views=views,
            group_size=rest["group_size"],
        ),
        loss_mask_BC=tensors["loss_mask_BC"],
        advantages_B=tensors["advantages_B"],
        ref_logprobs_IBC=tensors.get("ref_logprobs_IBC"),
        num_loss_tokens=rest["num_loss_tokens"],
        num_loss_rows=rest["num_loss_rows"],
    )
