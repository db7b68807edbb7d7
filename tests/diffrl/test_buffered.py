"""Groups that wait in a checkpoint come back as they were, twins included."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffrl.buffered import load_groups, save_groups
from diffrl.config import ModelConfig
from diffrl.models.loading import load_policy_tokenizer
from diffrl.prompts import chat_ids
from diffrl.types import Judgement, Problem, Rollout, RolloutGroup, ScoredGroup

TOKENIZER = load_policy_tokenizer(ModelConfig())
PROBLEM = Problem(id="p", prompt="Do.", prompt_tests=(), reward_tests=("assert g()",))
JUDGED = Judgement(
    reward=1.1, format=1.0, pass_rate=0.3, statuses=("passed", "failed"), cpu_s=0.25, detail="no", details=("", "no")
)
UNJUDGED = Judgement(reward=0.0, format=0.0, pass_rate=0.0, statuses=None, cpu_s=0.0, detail="judge died")


def rollout(index: int) -> Rollout:
    return Rollout(
        sample_index=index,
        seed=2**64 - 1 - index,
        completion_ids_C=np.array([index, 7, 2**31 - 1], dtype=np.int32),
        step_map_C=np.array([2, 0, 1], dtype=np.int32),
        probability_C=np.array([0.5, 0.1, np.nan], dtype=np.float16),
        num_tokens=2,
        text=f"é{index}",
    )


def scored(ordinal: int, *, twins: tuple[int, ...] = ()) -> ScoredGroup:
    group = RolloutGroup(
        problem=PROBLEM,
        ordinal=ordinal,
        policy_version=4,
        prompt_ids_P=np.asarray(chat_ids(TOKENIZER, PROBLEM), dtype=np.int32),
        rollouts=(rollout(0), rollout(1)),
        twins=tuple(map(rollout, twins)),
    )
    return ScoredGroup(group=group, judgements=(JUDGED, UNJUDGED), twin_judgements=(UNJUDGED,) * len(twins))


def test_groups_and_scores_come_back(tmp_path):
    steps = [[scored(7, twins=(1,)), scored(9)], [scored(8)], []]
    scores = {ordinal: torch.randn(2, 2, 3) for ordinal in (7, 8, 9)}
    save_groups(tmp_path, steps, scores)
    groups, got = load_groups(tmp_path, {"p": PROBLEM}, TOKENIZER)
    assert repr(groups) == repr([group for step in steps for group in step])
    assert got.keys() == scores.keys() and all(got[ordinal].equal(scores[ordinal]) for ordinal in got)


def test_other_data_is_refused(tmp_path):
    save_groups(tmp_path, [[scored(7)]], {})
    for problems, what in (({}, "missing"), ({"p": replace(PROBLEM, prompt="Do it.")}, "another one")):
        with pytest.raises(
            ValueError, match=rf"^data: problem 'p' is {what}, and there are rollouts of it; use the data"
        ):
            load_groups(tmp_path, problems, TOKENIZER)
