"""The figure of a diagnosis, drawn from what its JSON file holds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from customized_grpo.errors import UserError
from customized_grpo.io.files import write_whole
from customized_grpo.report.frame import HUES
from customized_grpo.report.style import INK, MUTED, grid, new_figure, rc, save_png, svg_text
from customized_grpo.tracking.metric_info import REWARD_PREFIX, score_infos

HEIGHT = 3.5
"""Inches."""
LINES: dict[str, dict[str, Any]] = {
    "calibrated": {"linewidth": 2.0, "marker": "o", "markersize": 3.6},
    "TDW": {"linewidth": 1.3, "dashes": (4, 2.2)},
    "constant": {"linewidth": 1.3, "dashes": (1, 1.6)},
}


def write_figure(record: Mapping[str, Any], stem: Path) -> tuple[Path, Path]:
    """Draw `record`, the content of diagnosis.json, into `stem`.svg and `stem`.png (900 px across, in twice the
    pixels); on one machine, equal records give equal bytes."""
    settings: Any = rc()
    with mpl.rc_context(settings):
        figure = new_figure(HEIGHT)
        conflict, share, weight = figure.subplots(1, 3)
        _draw_conflict(conflict, record["gradients"])
        colors = _colors(record)
        _draw_shares(share, record["sensitivity"], colors)
        _draw_weights(weight, record["weights"], colors)
        svg, png = stem.with_suffix(".svg"), stem.with_suffix(".png")
        write_whole(svg, svg_text(figure))
        save_png(figure, png, dpi=2 * figure.dpi)
    return svg, png


def redraw(path: Path, folder: Path) -> Path:
    """Draw the figure of the diagnosis.json at `path` into `folder`. Raises `UserError` where it is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        write_figure(record, folder / "diagnosis")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a diagnosis.json that diagnose wrote ({error}); write it again") from error
    return folder


def _draw_conflict(axes: Axes, gradients: Mapping[str, Any]) -> None:
    rows = gradients["cosine"]
    _frame(axes, "Cosine of the rewards' gradients", len(rows))
    axes.axhline(0, color=MUTED, linewidth=1.0)
    _curve(axes, rows, INK)
    whole, advantages = gradients["whole"]["cosine"], gradients["advantage_cosine"]["mean"]
    lines = [Line2D([], [], color=INK, linewidth=2.0, marker="o", markersize=3.6, label="gradients")]
    if whole["low"] is not None:
        place = len(rows) * 1.08
        axes.plot([place] * 2, [whole["low"], whole["high"]], color=INK, alpha=0.3, linewidth=4, solid_capstyle="butt")
        axes.plot(place, whole["mean"], color=INK, marker="D", markersize=5)
        axes.set_xticks([*axes.get_xticks(), place], [*map(str, map(int, axes.get_xticks())), "all"])
        axes.set_xlim(right=place + len(rows) * 0.06)
    if advantages is not None:
        style: dict[str, Any] = {"color": MUTED, "linewidth": 1.3, "dashes": (1, 1.6)}
        lines.append(axes.axhline(advantages, label="advantages", **style))
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, -1.0), min(top, 1.0))
    grid(axes, share=False)
    _legend(axes, lines)


def _colors(record: Mapping[str, Any]) -> dict[str, str]:
    """Return a color for each reward that was measured."""
    infos = score_infos({f"{REWARD_PREFIX}{name}": kind for name, kind in record["rewards"].items()})
    return {name.removeprefix(REWARD_PREFIX): HUES[info.hue] for name, info in infos.items()}


def _draw_shares(axes: Axes, sensitivity: Mapping[str, Any], colors: Mapping[str, str]) -> None:
    _frame(axes, "Share of the reward's variance", max(len(sensitivity[name]["share"]) for name in colors))
    for name, hue in colors.items():
        _curve(axes, sensitivity[name]["share"], hue)
    axes.set_ylim(bottom=0)
    grid(axes)
    options: dict[str, Any] = {"linewidth": 2.0, "marker": "o", "markersize": 3.6}
    _legend(axes, [Line2D([], [], color=hue, label=name, **options) for name, hue in colors.items()])


def _draw_weights(axes: Axes, weights: Mapping[str, Any], colors: Mapping[str, str]) -> None:
    trainable = len(weights["calibrated"]) - 1
    _frame(axes, "Weight of the reward", trainable)
    lines = {kind: style for kind, style in LINES.items() if kind.lower() in weights}
    for order, (kind, style) in enumerate(reversed(lines.items())):
        for index, hue in enumerate(colors.values()):
            values = [row[index] for row in weights[kind.lower()][:trainable]]
            axes.plot(values, color=hue, zorder=2 + order, **style)
    axes.set_ylim(bottom=0)
    grid(axes, share=False)
    _legend(axes, [Line2D([], [], color=MUTED, label=kind, **style) for kind, style in lines.items()])


def _frame(axes: Axes, title: str, steps: int) -> None:
    axes.set_title(title, loc="left", pad=10)
    axes.set_xlabel("denoising step, noisiest first")
    axes.set_xlim(-0.4, steps - 0.6)
    axes.set_xticks(range(0, steps, 1 + (steps - 1) // 12))


def _curve(axes: Axes, rows: Sequence[Mapping[str, float | None]], hue: str) -> None:
    """Draw means with the band of their intervals; an unknown value leaves a gap."""
    mean, low, high = np.array([[row[key] for key in ("mean", "low", "high")] for row in rows], dtype=np.float64).T
    axes.fill_between(range(len(rows)), low, high, color=hue, alpha=0.15, linewidth=0)
    axes.plot(mean, color=hue, linewidth=2.0, marker="o", markersize=3.6)


def _legend(axes: Axes, lines: Sequence[Line2D]) -> None:
    axes.legend(
        handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, labelcolor=MUTED, handlelength=1.9,
        columnspacing=1.2, handletextpad=0.5, borderaxespad=0, fontsize=9,
    )  # fmt: skip
