"""The charts of a report. One hue a reward throughout: prompt, identity, and ink for both together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from customized_grpo.evaluation.statistics import Array, Interval
from customized_grpo.report.formats import power_of_ten
from customized_grpo.report.frame import Frame, nice_ticks, tick_text
from customized_grpo.tracking.metric_info import MetricInfo


@dataclass(frozen=True)
class Key:
    """A legend entry: `mark` is the drawn sign (line, pale, dash, dot, area), `hue` its colour class."""

    label: str
    hue: str
    mark: str = "line"


@dataclass(frozen=True)
class Chart:
    """A figure: heading, what the vertical axis shows, the drawing, its legend."""

    title: str
    unit: str
    svg: Markup
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Series:
    """A curve over iterations. `style`: line, pale (behind a smoothed line), or dots (line and dots)."""

    label: str
    x: Array
    y: Array
    hue: str
    style: str = "line"


@dataclass(frozen=True)
class Rule:
    """A horizontal reference line."""

    value: float
    label: str
    hue: str = "muted"


def smooth(values: Array, share: float = 1 / 40) -> Array:
    """Smooth by a Gaussian as wide as `share` of the curve, but at least one value; NaNs carry no weight.

    A NaN stays a NaN: a gap in the data is a gap in the curve. Fewer than eight values stay as they are.
    """
    if len(values) < 8:
        return values
    width = max(1.0, share * len(values))
    reach = min(math.ceil(3 * width), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    finite = np.isfinite(values)
    middle = slice(reach, reach + len(values))
    total = np.convolve(np.where(finite, values, 0.0), kernel)[middle]
    weight = np.convolve(finite.astype(np.float64), kernel)[middle]
    return np.where(finite, total / np.where(finite, weight, 1.0), np.nan)


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    percent: bool = False,
    include: Sequence[float] = (),
    band: tuple[Array, Array, Array] | None = None,
    rules: Sequence[Rule] = (),
    marked: Sequence[tuple[float, float]] = (),
    small: bool = False,
    height: int = 250,
) -> Chart | None:
    """Draw curves over iterations; return None if there is no finite value to draw.

    `include`: values that the vertical range must contain; `band`: x, low, high of a shaded range;
    `marked`: iterations that are shaded as over-optimized.
    """
    values = np.concatenate([s.y for s in series] + (list(band[1:]) if band else []))
    if not np.isfinite(values).any():
        return None
    values = np.concatenate([values[np.isfinite(values)], [*include, *(rule.value for rule in rules)]])
    y_ticks = nice_ticks(float(values.min()), float(values.max()), 4 if small else 5)
    power = 0 if percent else _power(y_ticks)
    x_range = _x_range(np.concatenate([s.x for s in series]))
    frame = Frame(x_range, (y_ticks[0], y_ticks[-1]), width=320 if small else 440, height=height)
    frame.y_axis(y_ticks, percent, 10.0**power)
    frame.x_axis(_inner_ticks(x_range, 5 if small else 6), "iteration")
    if band:
        frame.area(*band, series[0].hue, 0.16)
    for start, end in marked:
        frame.area(np.array([start, end]), np.full(2, y_ticks[0]), np.full(2, y_ticks[-1]), "alarm", 0.1)
    for rule in rules:
        frame.rule(rule.value, rule.label, rule.hue)
    for one in series:
        frame.curve(one.x, one.y, one.hue, one.style)
        if one.style == "dots":
            for a, b in zip(one.x, one.y, strict=True):
                if math.isfinite(b):
                    tip = f"{one.label}, iteration {a:g}: {tick_text(round(float(b), 4), percent)}"
                    frame.dot(float(a), float(b), one.hue, tip=tip)
    keys = tuple(Key(s.label, s.hue, s.style) for s in series if s.label)
    keys += (Key("over-optimized", "alarm", "area"),) if marked else ()
    unit += f", in units of {power_of_ten(power)}" if power else ""
    return Chart(title, unit, frame.svg(f"{title}. {_describe(series, percent)}"), keys)


def plane(
    path: tuple[Array, Array, Array],
    tests: Mapping[str, tuple[Interval, Interval]],
    names: tuple[str, str],
    percent: bool,
) -> Chart | None:
    """Draw the prompt-identity plane.

    `path`: iteration, identity and prompt values of the validations; `tests`: identity and prompt intervals
    of "base", "best" and "tuned"; `names`: what the horizontal (identity) and vertical (prompt) axes show.
    """
    iterations, across, up = (column[np.isfinite(path[1]) & np.isfinite(path[2])] for column in path)
    xs = np.concatenate([across, *(np.array(pair[0]) for pair in tests.values())])
    ys = np.concatenate([up, *(np.array(pair[1]) for pair in tests.values())])
    xs, ys = xs[np.isfinite(xs)], ys[np.isfinite(ys)]
    if len(xs) == 0 or len(ys) == 0:
        return None
    x_ticks, y_ticks = (nice_ticks(*_padded(values, percent), 6) for values in (xs, ys))
    frame = Frame((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), height=400, top=26, right=20, bottom=42)
    frame.vertical_grid(x_ticks)
    frame.y_axis(y_ticks, percent)
    frame.x_axis(x_ticks, f"{names[0]} \u2192", percent, "identity")
    frame.text(f"\u2191 {names[1]}", 0, 1, "prompt", (-33, 7), coords="axes fraction", bold=True)
    frame.curve(across, up, "muted", "dots")
    for number, (i, a, b) in enumerate(zip(iterations, across, up, strict=True)):
        told = f"identity {tick_text(round(a, 3), percent)}, prompt {tick_text(round(b, 3), percent)}"
        tip = f"validation, iteration {i:g}: {told}"
        frame.dot(float(a), float(b), "muted", radius=2.8, hollow=number == 0, tip=tip)
    _test_points(frame, tests)
    keys = [Key("validation, base to tuned", "muted", "dots")] if len(across) else []
    keys += [Key("test with 95\u202f% interval", "joint", "dots")] if tests else []
    told = "; ".join(
        f"{name}: identity {tick_text(round(x[0], 3), percent)}, prompt {tick_text(round(y[0], 3), percent)}"
        for name, (x, y) in tests.items()
    )
    return Chart(
        "The prompt\u2013identity plane",
        "up and to the right is better",
        frame.svg(f"Prompt-identity plane. {told}"),
        tuple(keys),
    )


def _test_points(frame: Frame, tests: Mapping[str, tuple[Interval, Interval]]) -> None:
    kept = next((name for name in ("best", "tuned") if name in tests), None)
    if "base" in tests and kept:
        (before, before_up), (after, after_up) = tests["base"], tests[kept]
        frame.arrow((before[0], before_up[0]), (after[0], after_up[0]), "joint")
    for name, ((x, x_low, x_high), (y, y_low, y_high)) in tests.items():
        if all(map(math.isfinite, (x_low, x_high, y_low, y_high))):
            frame.bar((x_low, x_high), (y, y), "joint", width=1.0)
            frame.bar((x, x), (y_low, y_high), "joint", width=1.0)
        frame.dot(x, y, "joint", radius=5.5, hollow=name == "base")
        offset, anchor = ((7, 7), "left") if name == kept else ((-7, -13), "right")
        frame.text(name, x, y, "joint", offset, anchor, bold=True)


def quadrant_chart(
    x: Array, shares: Sequence[Array], pair: tuple[MetricInfo, MetricInfo], conflict: Array | None = None
) -> Chart | None:
    """Draw the shares of the four quadrants of a pair of rewards stacked over iterations, smoothed.

    `shares`: both good, only the first of the pair, only the second, both bad. `conflict`: their rate, as a line.
    """
    keep = np.logical_and.reduce([np.isfinite(column) for column in shares])
    if not keep.any():
        return None
    x_kept = x[keep]
    columns = [smooth(column[keep]) for column in shares]
    if len(x_kept) == 1:
        x_kept = np.array([x_kept[0] - 0.5, x_kept[0] + 0.5])
        columns = [np.repeat(column, 2) for column in columns]
    frame = Frame((float(x_kept[0]), float(x_kept[-1])), (0.0, 1.0), height=300)
    keys = [
        Key("both good", "joint", "area"),
        *(Key(f"only {info.label.removesuffix(' reward')}", info.hue, "area") for info in pair),
        Key("both bad", "bad", "area"),
    ]
    # Best at the bottom: the height of the lowest band is then read straight off the axis.
    floor = np.zeros_like(x_kept)
    for key, column in zip(keys, columns, strict=True):
        frame.area(x_kept, floor, floor + column, key.hue, 1.0 if key.hue == "bad" else 0.8)
        floor = floor + column
    frame.y_axis([0, 0.25, 0.5, 0.75, 1], percent=True)
    frame.x_axis(_inner_ticks(frame.x_range, 6), "iteration")
    ends = ", ".join(f"{k.label} {c[0]:.0%} to {c[-1]:.0%}" for k, c in zip(keys, columns, strict=True))
    if conflict is not None:
        frame.curve(x[keep], smooth(conflict[keep]), "conflict", "dash", halo=True)
        keys.append(Key("conflict rate", "conflict", "dash"))
    return Chart(
        "Quadrants of the rollouts",
        "share of rollouts, by sign of their two group advantages",
        frame.svg(f"Quadrant shares from first to last iteration: {ends}"),
        tuple(keys),
    )


def weight_chart(sigmas: Array, weights: Array, trained: Sequence[int], rewards: Sequence[MetricInfo]) -> Chart:
    """Draw the weights [T, R] of the `rewards` by denoising step; filled dots are trained steps."""
    steps = np.arange(len(weights), dtype=np.float64)
    frame = Frame((-0.5, len(weights) - 0.5), (0.0, 1.0), height=300, bottom=52)
    frame.y_axis([0, 0.25, 0.5, 0.75, 1])
    ticks = [t for t in nice_ticks(0, max(len(weights) - 1, 1), 6) if t == int(t) and t <= len(weights) - 1]
    frame.x_axis(ticks, "denoising step and its \u03c3, noisiest first")
    frame.under_ticks(ticks, [f"\u03c3 {sigmas[int(tick)]:.2f}" for tick in ticks])
    names = [info.label.removesuffix(" reward") for info in rewards]
    for name, info, column in zip(names, rewards, weights.T, strict=True):
        frame.curve(steps, column, info.hue)
        for step, weight in enumerate(column):
            tip = f"step {step}, \u03c3 {sigmas[step]:.3f}: {name} {weight:.4f}"
            frame.dot(step, float(weight), info.hue, radius=3.4, hollow=step not in trained, tip=tip)
    keys = (
        *(Key(name, info.hue, "dots") for name, info in zip(names, rewards, strict=True)),
        Key("never trained", "muted", "ring"),
    )
    ends = ", ".join(
        f"{name} {column[0]:.2f} to {column[-1]:.2f}" for name, column in zip(names, weights.T, strict=True)
    )
    told = f"Weights over {len(weights)} steps: {ends}"
    return Chart("Time weights at the steps used", "weight of each reward in the advantage", frame.svg(told), keys)


def strip(
    base: Interval | None, tuned: Interval | None, chance: float | None, ceiling: float | None, hue: str
) -> Markup:
    """Draw a row's intervals from 0 to 100 %: ticks at chance and ceiling, base hollow, tuned filled below it."""
    frame = Frame((0.0, 1.0), (0.0, 1.0), width=180, height=34, left=7, right=7, top=0, bottom=0)
    frame.bar((0, 1), (0.5, 0.5), "muted", width=0.6)
    for value in (chance, ceiling):
        if value is not None and math.isfinite(value):
            frame.bar((value, value), (0.24, 0.76), "muted", width=1.2)
    for interval, height, hollow in ((base, 0.7, True), (tuned, 0.3, False)):
        if interval and math.isfinite(interval[0]):
            mean, low, high = interval
            if math.isfinite(low):
                frame.bar((low, high), (height, height), hue)
            frame.dot(mean, height, hue, radius=4, hollow=hollow)
    return frame.svg("interval plot of the numbers in this row")


def _x_range(x: Array) -> tuple[float, float]:
    low, high = float(x.min()), float(x.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _power(ticks: Sequence[float]) -> int:
    """Return the power of ten to take out of tick labels that would be long, else 0."""
    largest = max(abs(tick) for tick in ticks)
    return 0 if 0.01 <= largest < 1e5 else math.floor(math.log10(largest) + 1e-9)


def _inner_ticks(span: tuple[float, float], count: int) -> list[float]:
    ticks = [t for t in nice_ticks(*span, count) if span[0] <= t <= span[1] and t == int(t)]
    return ticks or [round(sum(span) / 2)]


def _padded(values: Array, share: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = 0.06 * (high - low) or 0.02
    return (max(low - pad, 0.0), min(high + pad, 1.0)) if share else (low - pad, high + pad)


def _describe(series: Sequence[Series], percent: bool) -> str:
    told = []
    for one in series:
        finite = one.y[np.isfinite(one.y)]
        if len(finite) and one.label:
            first, last = (tick_text(round(float(v), 3), percent) for v in (finite[0], finite[-1]))
            told.append(f"{one.label}: {first} to {last}")
    return "; ".join(told)
