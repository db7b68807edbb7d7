"""What DeepSpeed really keeps under every ZeRO stage, on two ranks, against diffrl/estimate.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffrl.estimate import memory
from diffrl.models.sizes import sizes_of
from tests.actors.engine_memory import CASES, case
from tests.conftest import free_ports

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_state_of_a_rank_is_what_the_estimate_says():
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.actors.engine_memory"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(port)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        made = [rank.communicate(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], made
    for stdout, _ in made:
        measured = json.loads(stdout.splitlines()[-1])
        for stage, dtype in CASES:
            config = case(stage, dtype)
            found = sizes_of(config.model)
            assert found is not None
            expected = memory(
                found, config.learner, dtype=dtype, num_ranks=2, tokens=0, length=1, hidden_positions=0, device="cpu"
            )
            # DeepSpeed divides padded buffers, which shows in so small a model.
            assert measured[f"{stage}/{dtype}"] == pytest.approx(expected.state / found.parameters, rel=0.03), (
                stage,
                dtype,
            )
