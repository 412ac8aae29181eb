"""How matplotlib's figures look: in the report's colours, blue for prompt, orange for identity, ink for both."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from customized_grpo.config.presets import BASE, BASELINE, METHOD
from customized_grpo.evaluation.statistics import Interval
from customized_grpo.io.files import replacing

PAPER, INK, MUTED, RULE, AXIS = "#fcfbf8", "#1d1e22", "#63656d", "#e3e0d8", "#a9a79f"
OTHER1, OTHER2, OTHER3, OTHER4 = "#2f7d55", "#8f6a14", "#a13f84", "#4f5aa8"
PROMPT, IDENTITY, CONFLICT, BAD, ALARM = "#1a6cb0", "#bb4d12", "#8a62b0", "#c9c7c0", "#a3123a"
FONTS = ("Liberation Sans", "Arial", "Helvetica", "DejaVu Sans")
WIDTH, DPI = 9.375, 96
"""Inches and pixels per inch: 900 px across."""
ANGLES, DISTANCES = 16, (7, 12, 18, 26, 36, 48, 62)


def rc() -> Any:
    """Return the settings of matplotlib, by name, for drawing and saving figures."""
    installed = set(fontManager.get_font_names())
    return {
        "font.family": [name for name in FONTS if name in installed],
        "font.size": 9.5,
        "text.color": INK,
        "text.parse_math": False,
        "axes.labelcolor": MUTED,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlepad": 9,
        "axes.facecolor": PAPER,
        "axes.edgecolor": AXIS,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "figure.facecolor": PAPER,
        "grid.color": RULE,
        "grid.linewidth": 0.9,
        "xtick.color": AXIS,
        "xtick.labelcolor": MUTED,
        "ytick.color": AXIS,
        "ytick.labelcolor": MUTED,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "customized-grpo",
    }


def new_figure(height: float) -> Figure:
    """Return an empty figure of the common width, `height` inches high."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def svg_text(figure: Figure) -> str:
    """Return the figure as an SVG document, with fonts named for machines that lack this one's."""
    content = BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    fonts = ", ".join(f"'{name}'" for name in FONTS) + ", sans-serif"
    text = content.getvalue().decode("utf-8")
    return re.sub(r"(font: [^'\";]*|font-family: )'[^\";]*", rf"\g<1>{fonts}", text)


def save_png(figure: Figure, path: Path, dpi: float) -> None:
    """Write `figure` as a PNG file, whole or not at all. Raises `StorageError` where the disk does not take it."""
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=dpi, metadata={"Software": None})


def percent(value: float, _: object = None) -> str:
    return f"{100 * value:.6g}\u202f%".replace("-", "\u2212")


def points(value: float, _: object = None) -> str:
    return f"{100 * value:+.6g}".replace("-", "\u2212") if abs(value) > 1e-9 else "0"


def title(axes: Axes, text: str, setting: str = "", hue: str = INK) -> None:
    """Write `text` and, if there are several settings, the setting of the panel."""
    axes.set_title(" \u00b7 ".join(filter(None, (text, setting))), loc="left", color=hue)


def grid(axes: Axes, *, share: bool = True, across: bool = False) -> None:
    """Draw rules at round values, horizontal or `across`; in percent for a share."""
    axis = axes.xaxis if across else axes.yaxis
    axis.grid(visible=True)
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if share:
        axis.set_major_formatter(FuncFormatter(percent))


def curve(preset: str, hue: str) -> dict[str, Any]:
    """Return the line style of a preset: the method in `hue`, the baseline solid, others dashed."""
    dark, pale = (MUTED, AXIS) if hue == INK else (INK, MUTED)
    if preset == METHOD:
        return {"color": hue, "linewidth": 2.3, "zorder": 4}
    if preset == BASELINE:
        return {"color": dark, "linewidth": 1.6, "zorder": 3}
    return {"color": pale, "linewidth": 1.6, "zorder": 2, "dashes": (4, 2.2)}


def emphasis(name: str, strong: str = METHOD) -> str:
    return INK if name.startswith(strong) else MUTED


def weight(name: str, strong: str = METHOD) -> str:
    return "bold" if name == strong else "normal"


def end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name curves at their right ends, given (value, name, colour); names are moved apart where they would touch."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    wanted = [(float(axes.transData.transform((0.0, value))[1]), name, colour) for value, name, colour in ends]
    for level, (_, name, colour) in zip(_apart([w[0] for w in sorted(wanted)], 13.5), sorted(wanted), strict=True):
        height = axes.transAxes.inverted().transform((0.0, level))[1]
        options: dict[str, Any] = {"va": "center", "color": colour, "fontsize": 9, "fontweight": weight(name)}
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(name, (1, height), (4, 0), annotation_clip=False, **place, **options)


def place_labels(axes: Axes, spots: Mapping[str, tuple[Interval, Interval]], strong: str = METHOD) -> None:
    """Write each name near its point (across, up), off names, points, intervals and border if possible.

    Call this once the layout is settled. A name that had to move away is tied to its point by a thin line; the name
    `strong` stands out.
    """
    places = {name: tuple(axes.transData.transform((x[0], y[0]))) for name, (x, y) in spots.items()}
    taken: list[tuple[Bbox, float]] = []
    for name, (x, y) in places.items():
        taken.append((Bbox.from_bounds(x - 6, y - 6, 12, 12), 8.0))
        (_, left, right), (_, low, high) = spots[name]
        if math.isfinite(left) and math.isfinite(low):
            (left, low), (right, high) = axes.transData.transform([(left, low), (right, high)])
            taken += [(Bbox.from_extents(left, y - 4, right, y + 4), 3.0)]
            taken += [(Bbox.from_extents(x - 3, low, x + 3, high), 3.0)]
    for name in sorted(spots, key=lambda name: (name not in (strong, BASELINE, BASE), name)):
        text = axes.text(
            0, 0, name, fontsize=9, color=emphasis(name, strong), fontweight=weight(name, strong), zorder=6
        )
        text.set(transform=None, va="bottom", in_layout=False)
        size = text.get_window_extent()
        candidates = _around(places[name], size.width, size.height - 3, axes.get_window_extent())
        distance, box = min(candidates, key=lambda c: 4.0 * c[0] + sum(w * _overlap(c[1], b) for b, w in taken))
        taken.append((box, 12.0))
        text.remove()
        _write_label(axes, name, places[name], box, strong, tied=distance > 20)


def _write_label(axes: Axes, name: str, spot: tuple[float, float], box: Bbox, strong: str, *, tied: bool) -> None:
    scale = 72 / DPI
    offset = ((box.x0 - spot[0]) * scale, (box.y0 - spot[1] - 1.5) * scale)
    data = tuple(axes.transData.inverted().transform(spot))
    style: dict[str, Any] = {"color": emphasis(name, strong), "fontweight": weight(name, strong)}
    style |= {"fontsize": 9, "zorder": 3}
    # Lines that pass under a name stop short of it.
    style["bbox"] = {"facecolor": PAPER, "linewidth": 0, "pad": 0.2, "alpha": 0.85}
    axes.annotate(name, data, offset, textcoords="offset points", va="bottom", in_layout=False, **style)
    if tied:
        nearest = min(max(spot[0], box.x0), box.x1), min(max(spot[1], box.y0), box.y1)
        end = axes.transData.inverted().transform(nearest)
        axes.plot([data[0], end[0]], [data[1], end[1]], color=AXIS, linewidth=0.7, zorder=1, scalex=False, scaley=False)


def _around(spot: tuple[float, float], width: float, height: float, inside: Bbox) -> Iterator[tuple[float, Bbox]]:
    """Yield boxes of a label around its point, nearest first, with their distance in pixels; within `inside`."""
    for distance in DISTANCES:
        for step in range(ANGLES):
            angle = 2 * math.pi * step / ANGLES
            across, up = math.cos(angle), math.sin(angle)
            x = spot[0] + distance * across + (across - 1) / 2 * width
            y = spot[1] + distance * up + (up - 1) / 2 * height
            box = Bbox.from_bounds(x, y, width, height)
            if x >= inside.x0 and y >= inside.y0 and box.x1 <= inside.x1 and box.y1 <= inside.y1:
                yield distance, box
    yield 1e3, Bbox.from_bounds(spot[0] + 8, spot[1] + 2, width, height)


def _overlap(one: Bbox, other: Bbox) -> float:
    """Return the shared area in square pixels."""
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    up = min(one.y1, other.y1) - max(one.y0, other.y0)
    return across * up if across > 0 and up > 0 else 0.0


def _apart(levels: Sequence[float], gap: float) -> list[float]:
    """Move ascending levels as little as needed to be `gap` apart from their neighbors; groups keep their middle."""
    groups: list[tuple[list[float], float]] = []
    for level in levels:
        members, middle = [level], level
        while groups and groups[-1][1] + gap * len(groups[-1][0]) / 2 > middle - gap * len(members) / 2:
            members = groups.pop()[0] + members
            middle = sum(members) / len(members)
        groups.append((members, middle))
    return [middle + gap * (n - (len(members) - 1) / 2) for members, middle in groups for n in range(len(members))]
