"""A plot area of the training report, drawn by matplotlib and shown as inline SVG in the page's colors."""

import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from customized_grpo.evaluation.statistics import Array
from customized_grpo.report.inline import inline_svg
from customized_grpo.report.style import (
    ALARM,
    AXIS,
    BAD,
    DPI,
    IDENTITY,
    INK,
    MUTED,
    OTHER1,
    OTHER2,
    OTHER3,
    OTHER4,
    PAPER,
    PROMPT,
    RULE,
    rc,
    svg_text,
)

HUES = {
    "prompt": PROMPT, "identity": IDENTITY, "joint": INK, "plain": INK, "conflict": INK, "muted": MUTED, "alarm": ALARM,
    "other1": OTHER1, "other2": OTHER2, "other3": OTHER3, "other4": OTHER4, "bad": BAD,
}  # fmt: skip
"""Colors by the page's class names."""
STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "pale": {"linewidth": 0.8, "alpha": 0.38},
    "dots": {"linewidth": 1.1},
    "dash": {"linewidth": 1.2, "dashes": (4, 3)},
}
"""Lines by the name of a series' style."""
SMALL, TINY = 8.6, 7.9
"""Font sizes in points."""


class Frame:
    """A plot area with linear scales. Sizes are pixels of the page, places are in units of the data."""

    def __init__(
        self, x_range: tuple[float, float], y_range: tuple[float, float], *, width: int = 440, height: int = 250,
        left: int = 48, right: int = 14, top: int = 12, bottom: int = 36,
    ) -> None:  # fmt: skip
        self.x_range, self._bottom = x_range, bottom
        with matplotlib.rc_context(rc()):
            self._figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
            FigureCanvasAgg(self._figure)
            area = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
            self._axes = self._figure.add_axes(area)
        self._axes.set(xlim=x_range, ylim=y_range, xticks=[], yticks=[])
        self._axes.spines["bottom"].set_visible(False)
        self._axes.patch.set_visible(False)
        self._figure.patch.set_visible(False)
        self._tips: list[str] = []

    def y_axis(self, ticks: Sequence[float], percent: bool = False, scale: float = 1.0) -> None:
        """Draw grid lines with their values, in units of `scale`."""
        for tick in ticks:
            self._axes.axhline(tick, color=RULE, linewidth=0.75, zorder=0.5, clip_on=False)
        labels = [tick_text(tick / scale, percent) for tick in ticks]
        self._axes.set_yticks(list(ticks), labels, fontsize=SMALL, color=MUTED)
        self._axes.tick_params(axis="y", length=0)

    def x_axis(self, ticks: Sequence[float], label: str, percent: bool = False, hue: str = "muted") -> None:
        """Draw the horizontal axis with the values of its ticks and its name at the right."""
        self._axes.spines["bottom"].set_visible(True)
        self._axes.spines["bottom"].set_color(AXIS)
        self._axes.set_xticks(list(ticks), [tick_text(tick, percent) for tick in ticks], fontsize=SMALL, color=MUTED)
        self._axes.tick_params(axis="x", length=3, color=AXIS)
        weight = "normal" if hue == "muted" else "bold"
        self._axes.annotate(
            label, (1, 0), (0, (4 - self._bottom) * 72 / DPI), xycoords="axes fraction", textcoords="offset points",
            ha="right", va="baseline", fontsize=SMALL, color=HUES[hue], fontweight=weight, annotation_clip=False,
        )  # fmt: skip

    def vertical_grid(self, ticks: Sequence[float]) -> None:
        """Draw a vertical grid line at each of the `ticks`."""
        for tick in ticks:
            self._axes.axvline(tick, color=RULE, linewidth=0.75, zorder=0.5, clip_on=False)

    def under_ticks(self, ticks: Sequence[float], labels: Sequence[str]) -> None:
        """Write a second, smaller line of labels under the ticks of the horizontal axis."""
        for tick, label in zip(ticks, labels, strict=True):
            self._axes.annotate(
                label, (tick, 0), (0, -30 * 72 / DPI), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="baseline", fontsize=TINY, color=MUTED,
                annotation_clip=False,
            )  # fmt: skip

    def curve(self, x: Array, y: Array, hue: str, style: str = "line", *, halo: bool = False) -> None:
        """Draw a line through the finite points; a point without finite neighbors becomes a dot."""
        look = STYLES[style] | {"color": HUES[hue], "solid_capstyle": "round", "clip_on": False, "zorder": 2}
        if halo:
            self._axes.plot(x, y, **(look | {"color": PAPER, "linewidth": 3.4, "alpha": 0.85, "dashes": (1, 0)}))
        self._axes.plot(x, y, **look)
        for place in lone_points(y):
            self.dot(float(x[place]), float(y[place]), hue, radius=2)

    def dot(self, x: float, y: float, hue: str, *, radius: float = 3, hollow: bool = False, tip: str = "") -> None:
        """Draw a dot with the text `tip` under the mouse."""
        face = PAPER if hollow else HUES[hue]
        (drawn,) = self._axes.plot(
            [x], [y], marker="o", markersize=2 * radius * 72 / DPI, markerfacecolor=face, markeredgecolor=HUES[hue],
            markeredgewidth=1.3 if hollow else 0.6, clip_on=False, zorder=3, linestyle="none",
        )  # fmt: skip
        if tip:
            drawn.set_gid(f"tip{len(self._tips)}")
            self._tips.append(tip)

    def area(self, x: Array, low: Array, high: Array, hue: str, alpha: float) -> None:
        """Fill the region between two curves, if both are finite."""
        self._axes.fill_between(
            x, low, high, where=np.isfinite(low) & np.isfinite(high), color=HUES[hue], alpha=alpha, linewidth=0,
            clip_on=False, zorder=1,
        )  # fmt: skip

    def bar(self, x: tuple[float, float], y: tuple[float, float], hue: str, *, width: float = 1.6) -> None:
        """Draw a straight line from (x[0], y[0]) to (x[1], y[1])."""
        self._axes.plot(x, y, color=HUES[hue], linewidth=width, clip_on=False, zorder=2, solid_capstyle="butt")

    def arrow(self, start: tuple[float, float], end: tuple[float, float], hue: str) -> None:
        """Draw an arrow between two dots."""
        look = {"arrowstyle": "->", "color": HUES[hue], "linewidth": 1.6, "shrinkA": 5, "shrinkB": 6}
        self._axes.annotate("", end, start, arrowprops=look, annotation_clip=False)

    def rule(self, value: float, label: str, hue: str) -> None:
        """Draw a dashed horizontal line with its name at the right."""
        self._axes.axhline(value, color=HUES[hue], linewidth=1.2, dashes=(4, 3), zorder=1.5, clip_on=False)
        if label:
            self.text(label, 1.0, value, hue, (0, 3), "right", coords=("axes fraction", "data"))

    def text(
        self, content: str, x: float, y: float, hue: str, offset: tuple[float, float] = (0, 0), anchor: str = "left", *,
        coords: Any = "data", bold: bool = False,
    ) -> None:  # fmt: skip
        """Write `content` beside a place, `offset` points away."""
        self._axes.annotate(
            content, (x, y), offset, xycoords=coords, textcoords="offset points", ha=anchor, va="baseline",
            fontsize=SMALL, color=HUES[hue], fontweight="bold" if bold else "normal", annotation_clip=False,
        )  # fmt: skip

    def svg(self, label: str) -> Markup:
        """Return the drawing as an element of the page; `label` is read by screen readers."""
        with matplotlib.rc_context(rc()):
            drawing = inline_svg(re.sub(r"\W+", "-", label)[:60].strip("-").lower(), svg_text(self._figure), label)
        for number, tip in enumerate(self._tips):
            group = re.search(rf'<g id="[\w-]*tip{number}">', drawing)
            if group is not None:
                title = Markup("<title>{}</title>").format(tip)
                drawing = Markup(drawing[: group.end()]) + title + Markup(drawing[group.end() :])
        return drawing


def lone_points(y: Array) -> list[int]:
    """Return the places of finite values without a finite neighbor, which a line does not show."""
    finite = np.concatenate(([False], np.isfinite(y), [False]))
    return [int(place) for place in np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round values (steps 1, 2, 2.5, 5 times a power of ten) that enclose [low, high]."""
    if not high > low:
        low, high = low - max(abs(low) * 0.05, 1e-9), high + max(abs(high) * 0.05, 1e-9)
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= rough * 0.999), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def tick_text(value: float, percent: bool = False) -> str:
    """Return a number as a tick label, with a real minus sign."""
    return f"{100 * value:.6g}\u202f%" if percent else f"{value:.6g}".replace("-", "\u2212")
