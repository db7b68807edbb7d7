"""Groups of a checkpoint that wait for their step: sampled, judged and scored by the reference, not learned from yet."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from diffrl.rollout_store import read_step, scored_groups, write_step
from diffrl.types import Problem, ScoredGroup

GROUPS = "groups"  # of a checkpoint
TWINS = "twins"
REFERENCE = "ref_logprobs.safetensors"


def save_groups(folder: Path, steps: Sequence[Sequence[ScoredGroup]], ref_logprobs: Mapping[int, torch.Tensor]) -> None:
    """The groups of each step that has any, and their reference scores ([I, G, C] each, by ordinal)."""
    for number, groups in enumerate(steps):
        own, twins = [replace(s, twin_judgements=()) for s in groups], [as_rollouts(s) for s in groups if s.group.twins]
        for name, kind in (("rollouts", own), (TWINS, twins)):
            write_step(folder / name, number, kind, [0.0] * sum(len(s.group.rollouts) for s in kind))
    save_file({str(ordinal): scores.contiguous() for ordinal, scores in ref_logprobs.items()}, folder / REFERENCE)


def as_rollouts(scored: ScoredGroup) -> ScoredGroup:
    """A group's twins as a group."""
    group = replace(scored.group, rollouts=scored.group.twins, twins=())
    return ScoredGroup(group=group, judgements=scored.twin_judgements)


def load_groups(
    folder: Path, problems: Mapping[str, Problem], tokenizer: PreTrainedTokenizerFast
) -> tuple[list[ScoredGroup], dict[int, torch.Tensor]]:
    """What was saved. Raises ValueError for files that cannot be read and problems that are not there."""
    groups = []
    for file in sorted((folder / "rollouts").glob("*.parquet")):
        twins = {s.group.ordinal: s for s in scored_groups(read_step(folder / TWINS / file.name), problems, tokenizer)}
        for scored in scored_groups(read_step(file), problems, tokenizer):
            twin = twins.get(scored.group.ordinal)
            if twin is not None:
                group = replace(scored.group, twins=twin.group.rollouts)
                scored = replace(scored, group=group, twin_judgements=twin.judgements)
            groups.append(scored)
    return groups, {int(ordinal): scores for ordinal, scores in load_file(folder / REFERENCE).items()}
