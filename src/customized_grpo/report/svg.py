"""Inline SVG by hand: elements, scales, axes. Colours are CSS classes, so light and dark mode both work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape

from customized_grpo.evaluation.statistics import Array


def element(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """Return one SVG element, attribute values escaped; `class_` is class, other underscores become dashes.

    Children must be elements or escaped text.
    """
    parts = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _attribute(value))
        for name, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(tag, parts, Markup("").join(children))


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
    return f"{100 * value:.6g}\u202f%" if percent else f"{value:.6g}".replace("-", "\u2212")


def power_of_ten(power: int) -> str:
    return "10" + str(power).translate(
        str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
    )


def runs_of_finite(x: Array, y: Array) -> list[tuple[Array, Array]]:
    """Split a curve at its non-finite values, so that a gap is drawn as a gap."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.isfinite(y).astype(int), [0]))))
    return [(x[a:b], y[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@dataclass
class Frame:
    """A plot area with linear scales from data to pixels, collecting the elements drawn on it."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = 440
    height: int = 250
    left: int = 48
    right: int = 14
    top: int = 12
    bottom: int = 36
    elements: list[Markup] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def add(self, tag: str, *children: str, **attributes: str | float | None) -> None:
        self.elements.append(element(tag, *children, **attributes))

    def text(self, content: str, x: float, y: float, class_: str = "", anchor: str = "start") -> None:
        self.add("text", escape(content), x=x, y=y, class_=class_ or None, text_anchor=anchor)

    def y_axis(self, ticks: Sequence[float], percent: bool = False, scale: float = 1.0) -> None:
        """Draw grid lines with their values, in units of `scale`."""
        for tick in ticks:
            self.add("path", d=f"M{self.left} {self.y(tick):.1f}H{self.width - self.right}", class_="grid")
            self.text(tick_text(tick / scale, percent), self.left - 7, self.y(tick) + 3.5, "tick", "end")

    def x_axis(self, ticks: Sequence[float], label: str, percent: bool = False, label_class: str = "tick") -> None:
        floor = self.height - self.bottom
        self.add("path", d=f"M{self.left} {floor}H{self.width - self.right}", class_="axis")
        for tick in ticks:
            self.add("path", d=f"M{self.x(tick):.1f} {floor}v4", class_="axis")
            self.text(tick_text(tick, percent), self.x(tick), floor + 16, "tick", "middle")
        self.text(label, self.width - self.right, self.height - 4, label_class, "end")

    def curve(self, x: Array, y: Array, class_: str) -> None:
        """Draw a line through the finite points; a point without finite neighbors becomes a dot."""
        for xs, ys in runs_of_finite(x, y):
            if len(xs) == 1:
                self.dot(float(xs[0]), float(ys[0]), class_, radius=2)
            else:
                points = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in zip(xs, ys, strict=True))
                self.add("polyline", points=points, class_=f"line {class_}")

    def dot(self, x: float, y: float, class_: str, radius: float = 3, tip: str = "") -> None:
        title = (element("title", escape(tip)),) if tip else ()
        self.add("circle", *title, cx=self.x(x), cy=self.y(y), r=radius, class_=f"dot {class_}")

    def area(self, x: Array, low: Array, high: Array, class_: str) -> None:
        """Fill the region between two curves, if both are finite."""
        keep = np.isfinite(low) & np.isfinite(high)
        xs, forth, back = x[keep], high[keep], low[keep][::-1]
        corners = zip(np.concatenate([xs, xs[::-1]]), np.concatenate([forth, back]), strict=True)
        points = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in corners)
        self.add("polygon", points=points, class_=f"area {class_}")

    def svg(self, label: str) -> Markup:
        """Return the picture; `label` is what a screen reader says of it."""
        return element(
            "svg",
            *self.elements,
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_label=label,
            class_="chart",
        )


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
