from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffrl.analysis import (
    estimate,
    global_ar_ness,
    independent_bootstrap,
    local_ar_ness,
    paired_bootstrap,
    pass_at_k,
    reveal_order,
)


@pytest.mark.parametrize(("correct", "samples"), [(0, 5), (1, 5), (3, 5), (5, 5), (2, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(correct, samples):
    for k in range(1, samples + 1):
        draws = [any(i < correct for i in draw) for draw in combinations(range(samples), k)]
        assert pass_at_k(correct, samples, k) == pytest.approx(sum(draws) / len(draws), abs=1e-15)


def test_pass_at_k_of_many_samples_stays_exact():
    assert pass_at_k(1, 10_000, 100) == pytest.approx(0.01, abs=1e-15)
    assert pass_at_k(10_000, 10_000, 1) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((6, 5, 1), "num_correct is 6"), ((-1, 5, 1), "num_correct is -1"), ((1, 5, 0), "k is 0"), ((1, 5, 6), "k is 6")],
)
def test_pass_at_k_refuses_what_it_cannot_estimate(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


def test_bootstrap_of_a_constant_gain_has_no_width():
    assert paired_bootstrap([0.0, 0.25, 0.5], [0.5, 0.75, 1.0], seed=0) == (0.5, 0.5, 0.5)


def test_bootstrap_interval_is_that_of_the_mean_gain():
    rng = np.random.default_rng(1)
    before = rng.random(400)
    gain_N = rng.normal(0.1, 0.2, size=400)
    gain, low, high = paired_bootstrap(before, before + gain_N, seed=2)
    error = gain_N.std() / np.sqrt(400)
    assert gain == pytest.approx(gain_N.mean())
    assert low == pytest.approx(gain_N.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(gain_N.mean() + 1.96 * error, abs=0.1 * error)
    narrow = paired_bootstrap(before, before + gain_N, seed=2, confidence=0.5)
    assert narrow[2] - narrow[1] == pytest.approx(2 * 0.6745 * error, rel=0.1)


def test_bootstrap_depends_on_its_seed_alone():
    before, after = [0.0, 0.0, 1.0, 0.5], [1.0, 0.0, 1.0, 0.0]
    first = paired_bootstrap(before, after, seed=3, num_resamples=1500)
    np.random.default_rng(0).random()
    assert paired_bootstrap(before, after, seed=3, num_resamples=1500) == first
    assert first[0] == 0.125 and first[1] < 0 < first[2]


@pytest.mark.parametrize(("before", "after"), [([0.1], [0.1, 0.2]), ([], []), ([[0.1]], [[0.1]])])
def test_bootstrap_refuses_scores_that_are_not_pairs(before, after):
    with pytest.raises(ValueError, match="one score per problem"):
        paired_bootstrap(before, after, seed=0)


def test_reveal_order_breaks_ties_by_confidence_or_left_to_right():
    assert reveal_order([2, 0, 1, 2]) == [1, 2, 0, 3]
    assert reveal_order([2, 0, 1, 2], confidence=[0.1, 0.9, 0.9, 0.8]) == [1, 2, 3, 0]
    assert reveal_order(np.array([], dtype=np.int32)) == []


def by_definition(order, k):
    steps = range(k, len(order))
    local = [all(order[t - i] == order[t] - i for i in range(1, k + 1)) for t in steps]
    left = [sorted(order[t:])[:k] for t in range(len(order))]
    return (sum(local) / len(local) if local else None), sum(
        p in some for p, some in zip(order, left, strict=True)
    ) / len(order)


@given(st.integers(1, 12).flatmap(lambda size: st.permutations(range(size))), st.integers(1, 13))
def test_ar_ness_follows_its_definition(order, k):
    assert (local_ar_ness(order, k), global_ar_ness(order, k)) == by_definition(order, k)


def test_ar_ness_of_falling_neighbours_is_not_local():
    assert local_ar_ness([3, 2, 1, 0], 1) == 0.0  # consecutive as a set, but not rising
    assert local_ar_ness([0], 1) is None
    assert global_ar_ness([], 1) is None


def test_ar_ness_refuses_nonsense():
    with pytest.raises(ValueError, match="k is 0"):
        local_ar_ness([0, 1], 0)
    with pytest.raises(ValueError, match="twice"):
        global_ar_ness([0, 0], 1)


def test_a_step_of_several_tokens_counts_as_so_many_steps_the_most_confident_first():
    """Two tokens a step: 1 and 0, then 2 and 3. Without confidence they would be from left to right."""
    steps, confidence = [0, 0, 1, 1], [0.4, 0.9, 0.8, 0.3]
    order = reveal_order(steps, confidence)
    assert order == [1, 0, 2, 3]
    assert local_ar_ness(order, 1) == 1 / 3 and global_ar_ness(order, 1) == 3 / 4
    assert local_ar_ness(reveal_order(steps), 1) == 1.0
    assert reveal_order(steps, [0.5, 0.5, 0.5, 0.5]) == [0, 1, 2, 3], "equally confident: the left one first"
    assert reveal_order([0, 1, 2, 3], confidence) == [0, 1, 2, 3], "with one token a step confidence does not matter"


def test_independent_bootstrap_does_not_pair():
    """The same spread in both: paired it cancels, here it does not."""
    rng = np.random.default_rng(0)
    before = rng.random(200)
    paired = paired_bootstrap(before, before + 0.1, seed=0)
    gain, low, high = independent_bootstrap(before, before + 0.1, seed=0)
    error = before.std() * np.sqrt(2 / 200)
    assert gain == pytest.approx(0.1) and paired[1] == pytest.approx(paired[2])
    assert low == pytest.approx(0.1 - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(0.1 + 1.96 * error, abs=0.15 * error)
    assert independent_bootstrap([0.0], [1.0, 1.0], seed=0) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="at least one score in both"):
        independent_bootstrap([], [1.0], seed=0)


def test_estimate_leaves_out_what_has_no_value():
    found = estimate([0.2, float("nan"), 0.4])
    assert found is not None and found.mean == pytest.approx(0.3) and found.count == 2
    assert 0.2 <= found.low < 0.3 < found.high <= 0.4
    assert estimate([float("nan")]) is None and estimate([]) is None
