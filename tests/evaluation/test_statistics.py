import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from customized_grpo.evaluation.statistics import (
    bootstrap_interval,
    mean_interval,
    paired_difference,
    t_interval,
    t_quantile,
)

NUMBERS = st.floats(-1e3, 1e3)


# Newcombe (1998), Statistics in Medicine 17, table I, method 3.
@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_get_wilsons_interval(successes: int, count: int, low: float, high: float) -> None:
    values = [True] * successes + [False] * (count - successes)
    assert mean_interval(values) == pytest.approx((successes / count, low, high), abs=5e-5)


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (30, 2.0423), (383, 1.9662)])
def test_t_quantile_is_the_tabulated_one(freedom: int, value: float) -> None:
    assert t_quantile(freedom) == pytest.approx(value, abs=5e-5)


def test_t_quantile_of_many_degrees_of_freedom_is_normal() -> None:
    assert t_quantile(10**8) == pytest.approx(1.959964, abs=2e-6)


def test_other_values_get_students_interval() -> None:
    # mean 3, standard error sqrt(2.5 / 5), t(4) = 2.776445
    mean, low, high = mean_interval([1, 2, 3, 4, 5])
    assert (mean, low, high) == pytest.approx((3, 3 - 1.963243, 3 + 1.963243), abs=1e-5)


def test_paired_difference_of_students_sleep_data() -> None:
    # Student (1908); the interval is the one of R's help page of t.test.
    before = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    after = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert paired_difference(before, after) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-6)


def test_nan_and_too_few_values() -> None:
    assert mean_interval([math.nan, 1.0, 0.0]) == mean_interval([1.0, 0.0])
    assert all(map(math.isnan, mean_interval([])))
    mean, low, high = mean_interval([0.3])
    assert mean == 0.3 and math.isnan(low) and math.isnan(high)
    assert paired_difference([0.0, math.nan, 1.0], [1.0, 5.0, 1.0])[0] == 0.5


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        paired_difference([1.0, 2.0], [1.0])


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_share_interval_holds_its_mean_and_stays_in_range(values: list[bool]) -> None:
    mean, low, high = mean_interval(values)
    assert 0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1 and low < high


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=30), NUMBERS)
def test_difference_ignores_a_common_shift_and_turns_with_its_sides(
    pairs: list[tuple[float, float]], shift: float
) -> None:
    before, after = np.array(pairs).T
    mean, low, high = paired_difference(before, after)
    assert paired_difference(before + shift, after + shift) == pytest.approx((mean, low, high), abs=1e-6)
    assert paired_difference(after, before) == pytest.approx((-mean, -high, -low), abs=1e-9)


def test_bootstrap_draws_whole_clusters() -> None:
    draw = np.random.default_rng(1)
    clusters = [f"subject {number // 25}" for number in range(750)]
    values = np.repeat(draw.normal(size=30), 25)  # the pictures of a subject are equal: 30 values, not 750
    mean, low, high = bootstrap_interval(values, clusters)
    expected = t_interval(values[::25])
    assert mean == pytest.approx(expected[0]) and (low, high) == pytest.approx(expected[1:], abs=0.05)
    single = bootstrap_interval(values, [str(number) for number in range(750)])
    assert (single[2] - single[1]) * 4 < high - low
    assert bootstrap_interval(values, clusters) == (mean, low, high)


def test_bootstrap_weighs_pictures_and_leaves_out_nan() -> None:
    mean, low, high = bootstrap_interval([0.0, 0.0, 3.0, math.nan], ["a", "a", "b", "b"])
    assert (mean, low, high) == (1.0, 0.0, 3.0)
    assert all(map(math.isnan, bootstrap_interval([math.nan], ["a"])))
    assert bootstrap_interval([1.0, 2.0], ["a", "a"])[0] == 1.5
    assert all(map(math.isnan, bootstrap_interval([1.0, 2.0], ["a", "a"])[1:]))
    with pytest.raises(ValueError, match="2 values, but 1 clusters"):
        bootstrap_interval([1.0, 2.0], ["a"])
