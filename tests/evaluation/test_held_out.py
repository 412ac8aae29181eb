"""Gains in units of the base's spread, against plain numpy; texture and its interval, against the bootstrap."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from customized_grpo.evaluation.held_out import fell, gains, held_out_gain, relative_texture
from customized_grpo.evaluation.statistics import t_interval
from customized_grpo.tracking.metric_info import MetricInfo

UP, DOWN = MetricInfo("up", "up"), MetricInfo("down", "down", higher_is_better=False)
LEVELS = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=1, max_size=12)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def split(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    base, tuned = torch.tensor(pairs, dtype=torch.float64).T
    return base, tuned


def test_a_gain_is_the_mean_over_metrics_of_what_became_better_in_units_of_the_bases_spread() -> None:
    draw = np.random.default_rng(0)
    base, tuned = draw.normal(size=(2, 6)) * [[3.0], [0.01]], draw.normal(size=(2, 6)) * [[3.0], [0.01]]
    tuned[1, 2] = np.nan
    base[:, 4] = np.nan
    up = (tuned[0] - base[0]) / np.nanstd(base[0], ddof=1)
    down = (base[1] - tuned[1]) / np.nanstd(base[1], ddof=1)
    expected = [(up[n] + down[n]) / 2 for n in range(6)]
    expected[2] = up[2]  # the other metric has no value there
    columns = [{"up": torch.tensor(side[0]), "down": torch.tensor(side[1])} for side in (base, tuned)]
    found = gains(*columns, [UP, DOWN])
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, nan_ok=True, abs=1e-12) and math.isnan(found[4])


def test_only_the_metrics_that_are_asked_for_count() -> None:
    base, tuned = {"up": values(0, 1), "down": values(0, 9)}, {"up": values(1, 2), "down": values(7, 7)}
    assert gains(base, tuned, [UP]).tolist() == pytest.approx([math.sqrt(2)] * 2)


@given(LEVELS)
def test_a_gain_turns_with_the_direction(pairs: list[tuple[int, int]]) -> None:
    base, tuned = split(pairs)
    up = gains({"up": base}, {"up": tuned}, [UP])
    down = gains({"down": base}, {"down": tuned}, [DOWN])
    assert torch.equal(up, -down)


@given(LEVELS, st.floats(0.1, 10), st.floats(-10, 10))
def test_a_gain_knows_no_unit_and_no_zero(pairs: list[tuple[int, int]], scale: float, offset: float) -> None:
    base, tuned = split(pairs)
    plain = gains({"up": base}, {"up": tuned}, [UP])
    for info, factor in ((UP, scale), (DOWN, -scale)):
        changed = gains({info.name: factor * base + offset}, {info.name: factor * tuned + offset}, [info])
        assert torch.allclose(changed, plain, rtol=1e-9, atol=1e-9)


def test_a_base_without_spread_is_measured_by_the_spread_of_both() -> None:
    base, tuned = values(0, 0, 0, 0), values(0, 0, 1, 1)
    unit = np.std([0] * 6 + [1] * 2, ddof=1)
    assert gains({"up": base}, {"up": tuned}, [UP]).tolist() == pytest.approx([0, 0, 1 / unit, 1 / unit])
    assert gains({"up": base}, {"up": base}, [UP]).tolist() == [0.0] * 4
    single = gains({"up": values(math.nan, 2.0)}, {"up": values(5.0, 6.0)}, [UP])
    assert math.isnan(single[0]) and float(single[1]) == pytest.approx(4 / np.std([2, 5, 6], ddof=1))


def test_rounding_is_no_spread() -> None:
    """Three times 0.1 have a mean that is not 0.1; in units of their deviation any change would be enormous."""
    base = torch.full((3,), 0.1)
    assert gains({"up": base}, {"up": base * (1 + 2e-7)}, [UP]).tolist() == [0.0] * 3
    assert float(gains({"up": base}, {"up": base + 0.1}, [UP]).max()) < 2


def test_a_gain_needs_metrics_and_equal_pairs() -> None:
    with pytest.raises(ValueError, match="at least one"):
        gains({}, {}, [])
    with pytest.raises(ValueError, match=r"up: \[2\] values of the base, \[1\]"):
        gains({"up": values(1, 2)}, {"up": values(1)}, [UP])


def test_the_held_out_gain_is_the_mean_with_students_interval_over_pairs() -> None:
    per_pair = values(1, 2, math.nan, 3, 4, 5)
    assert held_out_gain(per_pair) == pytest.approx((3, 3 - 1.963243, 3 + 1.963243), abs=1e-5)  # t(4) = 2.776445
    assert held_out_gain(torch.zeros(5)) == (0, 0, 0)


def test_texture_is_a_ratio_of_sums_which_one_smooth_image_does_not_rule() -> None:
    base, tuned = values(1e-6, 1, 1, 1), values(0.01, 1, 1, 1)
    ratio, low, high = relative_texture(base, tuned)
    assert ratio == pytest.approx(3.01 / 3.000001) and low < ratio < high < 1.03
    assert relative_texture(base, 1.3 * base) == pytest.approx((1.3, 1.3, 1.3))


def test_the_interval_of_texture_is_that_of_the_bootstrap() -> None:
    draw = np.random.default_rng(3)
    base = draw.gamma(4.0, 0.02, size=200)
    tuned = base * draw.normal(1.3, 0.2, size=200) + 0.01
    rows = draw.integers(200, size=(4000, 200))
    expected = np.percentile(tuned[rows].sum(1) / base[rows].sum(1), [2.5, 97.5])
    ratio, low, high = relative_texture(torch.tensor(base), torch.tensor(tuned))
    assert ratio == pytest.approx(tuned.sum() / base.sum())
    assert (low, high) == pytest.approx(tuple(expected), abs=0.1 * (expected[1] - expected[0]))


def test_texture_leaves_out_what_is_not_finite() -> None:
    base, tuned = values(0.1, 0.2, math.nan, 0.3), values(0.1, math.inf, 0.2, 0.6)
    assert relative_texture(base, tuned) == pytest.approx(relative_texture(values(0.1, 0.3), values(0.1, 0.6)))
    assert relative_texture(base, tuned)[0] == pytest.approx(0.7 / 0.4)
    ratio, *bounds = relative_texture(values(0.5), values(1.0))
    assert ratio == 2 and all(map(math.isnan, bounds))
    assert all(map(math.isnan, relative_texture(torch.zeros(3), torch.ones(3))))
    with pytest.raises(ValueError, match="texture"):
        relative_texture(values(1, 2), values(1))


def test_gains_fell_if_the_interval_of_the_paired_difference_is_below_0() -> None:
    best = torch.randn(40, generator=torch.Generator().manual_seed(0)).double() * 5
    noise = torch.randn(40, generator=torch.Generator().manual_seed(1)).double() * 0.1
    assert fell(best, best + noise - 0.2)  # unpaired, 0.2 is nothing beside a spread of 5
    assert not fell(best, best + noise) and not fell(best, best + noise + 0.2) and not fell(best, best)
    assert not fell(best[:1], best[:1] - 9), "one pair shows nothing"


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=20), st.floats(-2, 2))
def test_they_do_not_fall_both_ways(differences: list[float], shift: float) -> None:
    best = values(*range(len(differences)))
    now = best + values(*differences) + shift
    assert not (fell(best, now) and fell(now, best))
    assert fell(best, now) == (t_interval((now - best).numpy())[2] < 0)
