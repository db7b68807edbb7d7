"""The table of metrics against what the code writes: every name in a writer is defined, every defined one is in a writer."""

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffrl.metrics import LABELS, METRICS, check_defined, find, undefined, unit, varies
from sandbox.types import TestStatus

ROOT = Path(__file__).parents[2]
# All that makes lines of metrics.jsonl.
WRITERS = (
    *("actors/driver.py", "actors/collector.py", "actors/telemetry.py", "actors/system.py", "actors/learner_rank.py"),
    *(
        "actors/stage_worker.py",
        "diffrl/batches.py",
        "diffrl/step_metrics.py",
        "diffrl/drift.py",
        "diffrl/diffusion.py",
    ),
    "diffrl/coupled_grpo.py",
)
NAME = re.compile(r"[a-z]+/[a-z0-9_@{}/]*[a-z0-9_}]")


def strings(tree: ast.AST) -> Iterator[str]:
    """Literals, and formatted ones with {} for what is put in."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def written() -> dict[str, str]:
    """Names in the writers' code, and where."""
    found = {}
    for file in WRITERS:
        for text in strings(ast.parse((ROOT / file).read_text())):
            if NAME.fullmatch(text):
                found[text] = file
    return found


def test_what_is_written_is_defined_and_what_is_defined_is_written():
    names = written()
    defined = {re.sub(r"\{\w+\}", "{}", metric.name) for metric in METRICS}
    unknown = {name: file for name, file in names.items() if name not in defined and find(name) is None}
    assert unknown == {"guard/{}": "diffrl/drift.py"}, "which reads what the same file writes"
    assert defined - names.keys() == set()


def test_a_name_stands_for_one_metric_everywhere():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert len({metric.prometheus for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"diffrl(_[a-z0-9]+)+", metric.prometheus), metric.prometheus
        assert set(metric.labels) <= LABELS.keys() and metric.unit and metric.help


@pytest.mark.parametrize(
    ("key", "name", "labels", "prometheus"),
    [
        ("reward/mean", "reward/mean", (), "diffrl_reward_mean"),
        ("eval/pass@1", "eval/pass@1", (), "diffrl_eval_pass_at_1"),
        ("group/pass@8", "group/pass@{k}", ("8",), "diffrl_group_pass_at_k"),
        ("pool/12/busy_slots", "pool/{worker}/busy_slots", ("12",), "diffrl_pool_busy_slots"),
        ("pool/errors/SandboxError", "pool/errors/{error}", ("SandboxError",), "diffrl_pool_errors"),
        ("memory/rollout_mb", "memory/{role}_mb", ("rollout",), "diffrl_memory_mb"),
        ("queue/judge", "queue/{role}", ("judge",), "diffrl_queue"),
        ("queue/buffered", "queue/buffered", (), "diffrl_queue_buffered"),
        (
            "throughput/learner_tokens_per_s",
            "throughput/learner_tokens_per_s",
            (),
            "diffrl_throughput_learner_tokens_per_s",
        ),
    ],
)
def test_keys_belong_to_metrics(key: str, name: str, labels: tuple[str, ...], prometheus: str):
    found = find(key)
    assert found is not None and (found[0].name, found[1], found[0].prometheus) == (name, labels, prometheus)


def test_every_verdict_has_a_name():
    assert undefined(f"verdicts/{status}" for status in TestStatus) == []


def test_a_key_that_nobody_has_defined_is_warned_of():
    assert undefined(["step", "reward/mean", "reward/means", "pool/x/busy_slots"]) == [
        "reward/means",
        "pool/x/busy_slots",
    ]
    with pytest.warns(
        UserWarning, match=r"metric 'reward/means' is not defined; add it to METRICS in diffrl/metrics\.py"
    ):
        check_defined(["step", "reward/means"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_defined(["step", "reward/mean"])


def test_what_may_differ_between_equal_runs():
    assert varies("time/learner") and varies("restarts/judge") and varies("calls/judge_p95_s")
    assert not varies("reward/mean") and not varies("batch/loss_tokens") and not varies("never/heard_of")
    assert unit("loss/kl") == "nats per token"
