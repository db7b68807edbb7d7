"""The messages that pass between actors. Each stage makes a new type; no field is ever "not filled in yet".

Shapes: G rollouts of one prompt, B rollouts of a step (B = groups * G, siblings adjacent), P prompt tokens,
C completion tokens (always the whole window), S mask views, I inner iterations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

TestModeName = Literal["asserts", "check_function", "stdin", "unittest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A task with unit tests.

    Problem(id="mbpp/11", prompt="Write a python function to remove ...", prompt_tests=("assert remove_Occ(...) == ...",),
            reward_tests=("assert remove_Occ(...) == ...", ...), test_mode="asserts", entry_point="remove_Occ",
            setup="", solution="def remove_Occ(s, ch): ...", family="mbpp")
    """

    id: str
    prompt: str  # the instruction, without tests
    prompt_tests: tuple[str, ...]  # shown in the prompt, never graded
    reward_tests: tuple[str, ...]  # graded, never shown; at least one
    test_mode: TestModeName = "asserts"
    entry_point: str | None = None
    setup: str = ""  # source that the tests need
    solution: str | None = None  # canonical solution, a whole program
    family: str = ""  # kind of problem, for tables
    license: str = field(default="", repr=False)  # of its text; not part of what fingerprints look at


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled completion.

    Rollout(sample_index=3, seed=8812..., completion_ids_C=array([412, 9, ...]), step_map_C=array([4, 0, ...]),
            probability_C=array([0.93, 0.41, ...]), num_tokens=23, text="```python\\ndef f(x): ...")
    """

    sample_index: int
    seed: int
    completion_ids_C: np.ndarray  # int32, the whole window, end and padding tokens included
    step_map_C: np.ndarray  # int32, the denoising step at which each position was revealed
    probability_C: np.ndarray  # float16, what the policy itself gave each token when it was revealed
    num_tokens: int  # up to and including the first end token
    text: str  # decoded, up to the first end token


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All completions of one prompt.

    RolloutGroup(problem=Problem(...), ordinal=17, policy_version=2, prompt_ids_P=array([...]), rollouts=(Rollout(...), ...))
    """

    problem: Problem
    ordinal: int  # place in the run's own stream of prompts
    policy_version: int
    prompt_ids_P: np.ndarray  # int32, not padded
    rollouts: tuple[Rollout, ...]
    twins: tuple[Rollout, ...] = ()  # some of them once more, sampled exactly: judged, and never learned from

    @property
    def judged(self) -> tuple[Rollout, ...]:
        """All that needs a judgement, in the order in which they are judged."""
        return self.rollouts + self.twins


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the graded tests said about one completion; `statuses` is None when the judge failed on it.

    Judgement(reward=2.5, format=1.0, pass_rate=1.0, statuses=("passed", "passed"), cpu_s=0.01)
    """

    reward: float  # 0.0 and meaningless when not valid
    format: float
    pass_rate: float  # share of graded tests that passed; 0 unless the format is right
    statuses: tuple[str, ...] | None
    cpu_s: float
    low_trust: bool = False  # a test ran in the program's own process, where it could forge the status
    detail: str = ""  # why the judge failed, or the first thing that it said
    details: tuple[str, ...] = ()  # a line for each graded test, "" where there is nothing to say

    @property
    def valid(self) -> bool:
        return self.statuses is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with its rewards. ScoredGroup(group=RolloutGroup(...), judgements=(Judgement(...), ...))"""

    group: RolloutGroup
    judgements: tuple[Judgement, ...]  # one per rollout
    twin_judgements: tuple[Judgement, ...] = ()  # one per twin


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskViews:
    """Which tokens each view hides, and how much a hidden token's log-prob counts: logprob = sum_S weight * view_logprob.

    MaskViews(hidden_SBC=tensor([[[True, True]], [[True, False]], [[False, True]]]), weight_SBC=tensor([[[.5, .5]], ...]))
    """

    hidden_SBC: torch.Tensor  # bool
    weight_SBC: torch.Tensor  # float32, zero where not hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringBatch:
    """What is scored: no rewards in it, so the reference can begin while the tests run.

    ScoringBatch(prompt_ids_BP=..., prompt_mask_BP=..., completion_ids_BC=..., scored_BC=...,
                 views=(MaskViews(...), ...), group_size=10)
    """

    prompt_ids_BP: torch.Tensor  # int64, padded on the left
    prompt_mask_BP: torch.Tensor  # bool, False on padding
    completion_ids_BC: torch.Tensor  # int64
    scored_BC: torch.Tensor  # bool: up to and including the first end token, all that a loss can use
    views: tuple[MaskViews, ...]  # one per inner iteration
    group_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """One step of the learner.

    TrainBatch(scoring=ScoringBatch(...), loss_mask_BC=..., advantages_B=..., ref_logprobs_IBC=..., num_loss_tokens=7421,
               num_loss_rows=80)
    """

    scoring: ScoringBatch
    loss_mask_BC: torch.Tensor  # bool: up to and including the first end token, of samples that were judged
    advantages_B: torch.Tensor  # float32
    ref_logprobs_IBC: torch.Tensor | None  # float32; None when kl_coef is 0
    num_loss_tokens: int  # of the WHOLE step, the one divisor for all ranks and micro-batches
    num_loss_rows: int  # completions with such tokens, the divisor of sequence-level objectives


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one update reports. UpdateResult(version=3, metrics={"loss/policy": 0.01, "loss/kl": 0.0004, ...})"""

    version: int  # of the weights after the update
    metrics: Mapping[str, float]
