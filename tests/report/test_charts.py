import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from customized_grpo.report.charts import Series, line_chart, plane, quadrant_chart, smooth, weight_chart
from customized_grpo.report.svg import nice_ticks, runs_of_finite, tick_text


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6), st.integers(2, 8))
def test_ticks_enclose_the_range_evenly(low: float, width: float, count: int) -> None:
    ticks = nice_ticks(low, low + width, count)
    steps = np.diff(ticks)
    slack = 1e-6 * steps[0] + 1e-9 * abs(low)
    assert ticks[0] <= low + slack and ticks[-1] >= low + width - slack
    assert len(ticks) <= 2 * count + 2 and np.allclose(steps, steps[0], rtol=1e-3, atol=1e-9 * abs(low))


def test_ticks_of_a_constant() -> None:
    ticks = nice_ticks(0.3, 0.3)
    assert ticks[0] < 0.3 < ticks[-1]


def test_tick_text() -> None:
    assert tick_text(-0.25) == "\u22120.25" and tick_text(0.5, percent=True) == "50\u202f%"


def test_smoothing_keeps_constants_gaps_and_short_curves() -> None:
    values = np.full(40, 0.7)
    values[10] = math.nan
    smoothed = smooth(values)
    assert math.isnan(smoothed[10]) and np.isfinite(np.delete(smoothed, 10)).all()
    np.testing.assert_allclose(np.delete(smoothed, 10), 0.7)
    np.testing.assert_array_equal(smooth(np.arange(5.0)), np.arange(5.0))


def test_smoothing_lowers_noise_and_keeps_a_slope() -> None:
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise).std() < 0.5 * noise.std()
    np.testing.assert_allclose(smooth(np.arange(400.0))[60:-60], np.arange(60.0, 340.0), atol=1e-6)


def test_gaps_split_a_curve() -> None:
    y = np.array([math.nan, 1.0, 2.0, math.nan, 4.0])
    parts = [list(ys) for _, ys in runs_of_finite(np.arange(5.0), y)]
    assert parts == [[1.0, 2.0], [4.0]]


def test_line_chart_draws_one_line_per_run_and_a_dot_for_a_lone_point() -> None:
    y = np.array([1.0, 2.0, math.nan, 4.0])
    chart = line_chart("T", "u", [Series("a", np.arange(1.0, 5.0), y, "prompt")])
    assert chart is not None
    svg = parse(chart.svg)
    assert len(svg.findall("polyline")) == 1 and len(svg.findall("circle")) == 1
    assert svg.get("aria-label") == "T. a: 1 to 4"


def test_line_chart_without_a_finite_value_is_none() -> None:
    assert line_chart("T", "u", [Series("a", np.arange(3.0), np.full(3, math.nan), "prompt")]) is None


def test_small_numbers_get_their_power_of_ten_in_the_unit() -> None:
    chart = line_chart("T", "loss", [Series("a", np.arange(3.0), np.array([1e-5, 2e-5, 4e-5]), "prompt")])
    assert chart is not None and chart.unit == "loss, in units of 10\u207b\u2075"
    assert "e-05" not in chart.svg


def test_labels_are_escaped() -> None:
    chart = line_chart("<b>&", "u", [Series("<i>", np.arange(2.0), np.arange(2.0), "prompt", "dots")])
    assert chart is not None
    assert "<b>" not in chart.svg and "<i>" not in chart.svg
    parse(chart.svg)


def test_plane_puts_better_up_and_right() -> None:
    nothing = (np.empty(0), np.empty(0), np.empty(0))
    tests = {"base": ((0.4, 0.35, 0.45), (0.5, 0.45, 0.55)), "tuned": ((0.5, 0.45, 0.55), (0.7, 0.65, 0.75))}
    chart = plane(nothing, tests, ("identity kept", "prompt satisfied"), percent=True)
    assert chart is not None
    base, tuned = parse(chart.svg).findall("circle")
    assert float(tuned.get("cx", "")) > float(base.get("cx", "")) and float(tuned.get("cy", "")) < float(
        base.get("cy", "")
    )
    assert plane(nothing, {}, ("a", "b"), percent=True) is None


def test_quadrants_fill_the_whole_height() -> None:
    shares = {"both_good": 0.1, "only_prompt": 0.2, "only_identity": 0.3, "both_bad": 0.4}
    x = np.arange(1.0, 21.0)
    chart = quadrant_chart(x, {k: np.full(20, v) for k, v in shares.items()}, np.full(20, 0.5))
    assert chart is not None
    heights = []
    for area in parse(chart.svg).findall("polygon"):
        ys = [float(corner.split(",")[1]) for corner in area.get("points", "").split()]
        heights.append(max(ys) - min(ys))
    assert np.array(heights) / sum(heights) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=2e-3)


def test_untrained_steps_are_hollow() -> None:
    weights = np.array([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]])
    chart = weight_chart(np.linspace(1, 0, 4), weights, [0, 1])
    classes = [dot.get("class") for dot in parse(chart.svg).findall("circle")]
    assert classes == [
        "dot prompt",
        "dot prompt",
        "dot prompt hollow",
        "dot identity",
        "dot identity",
        "dot identity hollow",
    ]
