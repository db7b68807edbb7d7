import pytest

from diffrl.rewards import RECIPE_WEIGHTS, REWARDS, format_reward, pass_rate, total_reward

GOOD = "```python\nx = 1\n```\n"
BAD = "```python\nx = \n```\n"


def test_recipe():
    assert dict(RECIPE_WEIGHTS) == {"pass_rate": 2.0, "format": 0.5}
    assert set(RECIPE_WEIGHTS) <= set(REWARDS)


@pytest.mark.parametrize(
    ("text", "statuses", "reward", "components"),
    [
        (GOOD, ("passed", "passed"), 2.5, {"pass_rate": 1.0, "format": 1.0}),
        (GOOD, ("passed", "failed", "timeout", "passed"), 1.5, {"pass_rate": 0.5, "format": 1.0}),
        (GOOD, ("failed",), 0.5, {"pass_rate": 0.0, "format": 1.0}),
        (BAD, ("passed",), 0.25, {"pass_rate": 0.0, "format": 0.5}),
        (f"{GOOD}and so on", ("passed",), 0.0, {"pass_rate": 0.0, "format": 0.0}),
        ("", (), 0.0, {"pass_rate": 0.0, "format": 0.0}),
    ],
)
def test_published_reward(text, statuses, reward, components):
    assert total_reward(text, statuses, RECIPE_WEIGHTS) == (reward, components)


@pytest.mark.parametrize(
    "status", ["failed", "error", "timeout", "out_of_memory", "killed", "not_run", "PASSED", "passed "]
)
def test_only_passed_pays(status):
    assert pass_rate(GOOD, (status, "passed")) == 0.5


def test_format_does_not_look_at_the_tests():
    assert format_reward(GOOD, ("killed",)) == format_reward(GOOD, ("passed",)) == 1.0


def test_a_reward_without_weight_is_recorded_but_not_paid():
    assert total_reward(GOOD, ("passed",), {"format": 3.0}) == (3.0, {"pass_rate": 1.0, "format": 1.0})


def test_a_new_reward_is_a_function_and_a_line(monkeypatch):
    monkeypatch.setitem(REWARDS, "brevity", lambda text, statuses: 1.0 / len(text))
    reward, components = total_reward("ab", ("failed",), {"brevity": 4.0})
    assert (reward, components["brevity"]) == (2.0, 0.5)


def test_unknown_reward_is_named_with_a_way_out():
    with pytest.raises(ValueError, match=r"^reward weights: 'passrate' is not a reward: did you mean 'pass_rate'\?$"):
        total_reward(GOOD, ("passed",), {"passrate": 1.0})
    with pytest.raises(ValueError, match=r"choose from pass_rate, format$"):
        total_reward(GOOD, ("passed",), {"zzz": 1.0})
