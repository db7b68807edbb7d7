"""The learning-rate schedule at its corners, by hand."""

import pytest

from diffrl.schedule import cosine_lr


def test_warm_up_then_cosine():
    lr = [cosine_lr(step, total=11, peak=2.0, warmup=4, min_ratio=0.1) for step in range(12)]
    assert lr[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert lr[7] == pytest.approx(2.0 * 0.55)  # half way down
    assert lr[10] == lr[11] == pytest.approx(0.2)
    assert lr[4:] == sorted(lr[4:], reverse=True)


def test_without_warm_up_the_first_step_has_the_peak():
    assert cosine_lr(0, total=5, peak=3.0, warmup=0, min_ratio=0.0) == 3.0
    assert cosine_lr(0, total=1, peak=3.0, warmup=0, min_ratio=0.1) == 3.0
