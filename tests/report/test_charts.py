import math
import re
from xml.etree import ElementTree

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from customized_grpo.report.charts import Rule, Series, line_chart, plane, quadrant_chart, smooth, weight_chart
from customized_grpo.report.frame import lone_points, nice_ticks, tick_text
from customized_grpo.tracking.metric_info import metric_info


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


def test_a_point_without_finite_neighbors_is_lone() -> None:
    assert lone_points(np.array([math.nan, 1.0, 2.0, math.nan, 4.0])) == [4]
    assert lone_points(np.array([3.0])) == [0] and lone_points(np.array([math.nan])) == []


def colors(svg: str, shape: str) -> list[str]:
    """The colors with which shapes of a kind are drawn: lines ("stroke") or filled areas ("fill")."""
    return re.findall(rf'<(?:path|use) [^>]*style="(?:[^"]*; )?{shape}: (var\(--\w+\))', svg)


def test_a_line_chart_says_what_it_shows() -> None:
    y = np.array([1.0, 2.0, math.nan, 4.0])
    chart = line_chart("T", "u", [Series("a", np.arange(1.0, 5.0), y, "prompt")])
    assert chart is not None and parse(chart.svg).get("aria-label") == "T. a: 1 to 4"
    assert {"var(--prompt)", "var(--rule)"} <= set(colors(chart.svg, "stroke"))


def test_all_colors_are_the_pages_variables() -> None:
    x = np.arange(1.0, 21.0)
    series = [Series("a", x, x, "prompt"), Series("b", x, x * 2, "identity", "dots")]
    chart = line_chart("T", "u", series, band=(x, x - 1, x + 1), rules=[Rule(3.0, "alarm", "alarm")])
    assert chart is not None and not re.search("#[0-9a-f]{6}", chart.svg)
    assert "var(--identity)" in chart.svg and "var(--alarm)" in chart.svg


def test_drawings_are_a_function_of_their_data() -> None:
    def drawn() -> str:
        chart = line_chart("T", "u", [Series("a", np.arange(9.0), np.arange(9.0), "prompt", "dots")])
        assert chart is not None
        return chart.svg

    assert drawn() == drawn()


def test_a_dot_tells_its_value_under_the_mouse() -> None:
    chart = line_chart("T", "u", [Series("a<", np.arange(3.0), np.array([0.5, 0.25, 0.125]), "prompt", "dots")])
    assert chart is not None
    tips = [title.text for title in parse(chart.svg).iter("title")]
    assert tips == ["a<, iteration 0: 0.5", "a<, iteration 1: 0.25", "a<, iteration 2: 0.125"]


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
    assert (parse(chart.svg).get("aria-label") or "").endswith(
        "base: identity 40\u202f%, prompt 50\u202f%; tuned: identity 50\u202f%, prompt 70\u202f%"
    )
    assert all(f">{name}</text>" in chart.svg for name in ("base", "tuned", "identity kept \u2192"))
    assert plane(nothing, {}, ("a", "b"), percent=True) is None


PROMPT, IDENTITY = metric_info("reward/prompt"), metric_info("reward/identity")


def test_quadrants_fill_the_whole_height() -> None:
    x = np.arange(1.0, 21.0)
    shares = [np.full(20, share) for share in (0.1, 0.2, 0.3, 0.4)]
    chart = quadrant_chart(x, shares, (PROMPT, IDENTITY), np.full(20, 0.5))
    assert chart is not None
    filled = [color for color in colors(chart.svg, "fill") if color not in ("var(--paper)", "var(--axis)")]
    assert filled == ["var(--ink)", "var(--prompt)", "var(--identity)", "var(--bad)"]
    assert (parse(chart.svg).get("aria-label") or "").endswith("both bad 40% to 40%")
    assert [key.label for key in chart.keys] == [
        "both good",
        "only prompt",
        "only identity",
        "both bad",
        "conflict rate",
    ]
    assert quadrant_chart(x, [*shares[:3], np.full(20, np.nan)], (PROMPT, IDENTITY)) is None


def test_untrained_steps_are_hollow() -> None:
    weights = np.array([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]])
    chart = weight_chart(np.linspace(1, 0, 4), weights, [0, 1], (PROMPT, IDENTITY))
    dots = re.findall(r"<title>step (\d).*?: (\w+) .*?</title>.*?fill: (var\(--\w+\))", chart.svg, re.DOTALL)
    assert dots == [
        ("0", "prompt", "var(--prompt)"), ("1", "prompt", "var(--prompt)"), ("2", "prompt", "var(--paper)"),
        ("0", "identity", "var(--identity)"), ("1", "identity", "var(--identity)"), ("2", "identity", "var(--paper)"),
    ]  # fmt: skip
