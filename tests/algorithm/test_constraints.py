"""Schedules and constraints: closed forms, and what they promise whatever the objectives say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from customized_grpo.algorithm import (
    combine_advantages,
    constant_weights,
    hold_constraints,
    schedule_weights,
    time_curve,
    time_weights,
    violations,
)

number = st.floats(-5, 5, width=32)
amount = st.one_of(st.just(0.0), st.floats(0.01, 10))


def group(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)


# schedules


def test_two_rewards_have_the_papers_weights_to_the_bit() -> None:
    curve = time_curve(25)
    assert torch.equal(schedule_weights(curve, ("early", "late"), (1, 1)), time_weights(25))
    assert torch.equal(schedule_weights(curve, ("late", "early"), (7, 3)), time_weights(25).flip(1))
    constant = schedule_weights(curve, ("constant", "constant"), (0.6, 0.4))
    assert torch.equal(constant, constant_weights(25, (0.6, 0.4)))


def test_constants_take_their_share_and_the_others_divide_the_rest() -> None:
    curve = torch.tensor([0.7, 0.5, 0.3])
    found = schedule_weights(curve, ("early", "constant", "late", "early"), (1, 0.2, 5, 3))
    expected = [[0.8 * c / 4, 0.2, 0.8 * (1 - c), 0.8 * c * 3 / 4] for c in (0.7, 0.5, 0.3)]
    torch.testing.assert_close(found, torch.tensor(expected))


@given(
    st.lists(st.tuples(st.sampled_from(("early", "late", "constant")), st.floats(0.01, 0.2)), min_size=1, max_size=4),
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_rows_sum_to_one(rewards: list[tuple[str, float]], curve: list[float]) -> None:
    schedules, weights = zip(*rewards, strict=True)
    if ("early" in schedules) != ("late" in schedules):
        with pytest.raises(ValueError, match="divide one share"):
            schedule_weights(torch.tensor(curve), schedules, weights)
        return
    found = schedule_weights(torch.tensor(curve), schedules, weights)
    assert found.shape == (len(curve), len(rewards)) and (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(len(curve)))


@pytest.mark.parametrize(
    ("schedules", "weights", "message"),
    [
        ((), (), "each reward needs a schedule and a positive weight"),
        (("constant",), (0.0,), "a positive weight"),
        (("constant", "constant"), (1.0,), "each reward needs"),
        (("sometimes",), (1.0,), "unknown schedule 'sometimes'; choose one of constant, early, late"),
        (("early",), (1.0,), "give some reward the other one"),
        (("early", "late", "constant"), (1, 1, 1), "sum to 1, expected less than 1"),
    ],
)
def test_schedules_that_do_not_fit(schedules: tuple[str, ...], weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_weights(time_curve(4), schedules, weights)


# constraints


def test_violations_are_how_far_scores_are_outside() -> None:
    scores = torch.tensor([[[0.1, 5.0], [0.3, 2.0], [0.5, 0.5]]])
    found = violations(scores, (0.2, 1.0), (None, 3.0))
    torch.testing.assert_close(found, torch.tensor([[[0.1, 2.0], [0.0, 0.0], [0.0, 0.5]]]))


def test_a_group_that_holds_all_learns_as_if_there_were_none() -> None:
    advantages = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    broken = torch.zeros(3, 6, 2)
    assert torch.equal(hold_constraints(advantages, broken), advantages)
    broken[1, 2, 0] = 0.5
    found = hold_constraints(advantages, broken)
    assert torch.equal(found[[0, 2]], advantages[[0, 2]]) and not torch.equal(found[1], advantages[1])


def test_a_group_that_wholly_breaks_one_learns_that_alone() -> None:
    broken = group([0.1, 0.2, 0.3, 0.4])
    z = (0.25 - broken) / broken.std()
    for advantages in (group([9, -3, 5, 1]), torch.zeros(1, 4, 1, dtype=torch.float64)):
        torch.testing.assert_close(hold_constraints(advantages, broken), z, atol=1e-6, rtol=0)


def test_a_group_in_between_in_closed_form() -> None:
    advantages, broken = group([2.0, -2.0, 1.0, -1.0]), group([0.0, 0.0, 0.0, 1.0])
    z = (0.25 - broken) / 0.5
    expected = 0.75 * advantages / math.sqrt(10 / 3) + z
    torch.testing.assert_close(hold_constraints(advantages, broken), expected, atol=1e-6, rtol=0)
    small = 0.1 * advantages  # with a deviation below 1 they stay as they are
    torch.testing.assert_close(hold_constraints(small, broken), 0.75 * small + z, atol=1e-6, rtol=0)


@given(st.lists(st.tuples(number, amount), min_size=2, max_size=8))
@settings(max_examples=200, deadline=None)
def test_holding_pays_whatever_the_objectives_say(samples: list[tuple[float, float]]) -> None:
    """The covariance with minus the violation is at least m times its deviation."""
    advantages, broken = group([a for a, _ in samples]), group([v for _, v in samples])
    found = hold_constraints(advantages, broken)
    m, spread = float((broken > 0).double().mean()), float(broken.std())
    centred = -(broken - broken.mean())
    covariance = float((found * centred).sum()) / (len(samples) - 1)
    assert covariance >= m * spread - 1e-5 if m > 0 and spread > 1e-3 else True


def test_a_proportional_push_in_closed_form() -> None:
    advantages, broken = group([0.2, -0.2, 0.1, -0.1]), group([0.0, 0.0, 0.0, 1.0])
    z = (0.25 - broken) / 0.5
    found = hold_constraints(advantages, broken, strict=False)
    torch.testing.assert_close(found, 0.75 * advantages + 0.25 * z, atol=1e-6, rtol=0)
    for broken in (group([0.0, 0.0, 0.0, 0.0]), group([0.1, 0.2, 0.3, 0.4])):  # at the ends it is the strict one
        assert torch.equal(hold_constraints(advantages, broken, strict=False), hold_constraints(advantages, broken))


@given(st.lists(st.tuples(number, amount), min_size=2, max_size=8))
@settings(max_examples=200, deadline=None)
def test_a_proportional_push_pays_where_most_break_it(samples: list[tuple[float, float]]) -> None:
    """The covariance with minus the violation is at least 2 m - 1 times its deviation."""
    advantages, broken = group([a for a, _ in samples]), group([v for _, v in samples])
    found = hold_constraints(advantages, broken, strict=False)
    m, spread = float((broken > 0).double().mean()), float(broken.std())
    covariance = float((found * -(broken - broken.mean())).sum()) / (len(samples) - 1)
    assert covariance >= (2 * m - 1) * spread - 1e-5 if m > 0 and spread > 1e-3 else True


@given(st.lists(st.tuples(number, amount), min_size=2, max_size=8), st.floats(0.1, 100))
@settings(max_examples=50, deadline=None)
def test_the_unit_of_a_constraint_does_not_matter(samples: list[tuple[float, float]], unit: float) -> None:
    advantages, broken = group([a for a, _ in samples]), group([v for _, v in samples])
    found, scaled = hold_constraints(advantages, broken), hold_constraints(advantages, unit * broken)
    torch.testing.assert_close(found, scaled, atol=1e-4, rtol=1e-4)


def test_several_constraints_count_alike() -> None:
    """Each by its z-score, whatever its unit; who breaks both is pushed most."""
    broken = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1000.0], [1.0, 1000.0]]], dtype=torch.float64)
    found = hold_constraints(torch.zeros(1, 4, 1, dtype=torch.float64), broken)[0, :, 0]
    assert found[0] > found[1] > found[3] and float(found[1] - found[2]) == pytest.approx(0, abs=1e-6)
    assert float(found.std()) == pytest.approx(1)


def test_samples_that_are_not_valid_count_in_no_group() -> None:
    advantages, broken = group([1.0, -1.0, 0.0, 3.0]), group([0.5, 0.0, 0.0, 9.0])
    valid = torch.tensor([[True, True, True, False]])
    found = hold_constraints(advantages, broken, valid)
    torch.testing.assert_close(found[:, :3], hold_constraints(advantages[:, :3], broken[:, :3]))
    assert found[0, 3, 0] == 0
    only = hold_constraints(advantages, group([0.0, 0.0, 0.0, 9.0]), valid)
    assert torch.equal(only, advantages), "what is not valid breaks nothing"


def test_constraints_come_after_weighing_and_before_clipping() -> None:
    rewards = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(3))
    broken = torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(4)) - 0.5
    broken = broken.clamp(min=0)
    weights = time_weights(4)
    free = combine_advantages(rewards, weights=weights, clamp=100.0)
    expected = hold_constraints(free, broken).clamp(-0.9, 0.9)
    torch.testing.assert_close(combine_advantages(rewards, weights=weights, violations=broken, clamp=0.9), expected)
    soft = hold_constraints(free, broken, strict=False).clamp(-0.9, 0.9)
    found = combine_advantages(rewards, weights=weights, violations=broken, strict=False, clamp=0.9)
    torch.testing.assert_close(found, soft)
