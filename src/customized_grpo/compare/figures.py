"""The figures of a comparison, for its page, the README and print: the same bytes for the same numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from customized_grpo.compare.results import PERIODS, SIGNALS, Result, presets_in, select, settings_in, summarise
from customized_grpo.config.presets import BASE, BASELINE, METHOD
from customized_grpo.evaluation.statistics import Interval, t_interval
from customized_grpo.io.files import write_whole
from customized_grpo.report import style
from customized_grpo.report.style import IDENTITY, INK, MUTED, PROMPT
from customized_grpo.tracking.metric_info import metric_info

CURVES = (BASELINE, "naive-1:1.5", METHOD)
PAPER_SIGNALS = (0.502, 0.268, 0.230)
"""Conflict, both positive, both negative: the distribution of reward signals that the paper reports."""
SIGNAL_NAMES = ("conflict", "both positive", "both negative")
SIGNAL_COLOURS = ((style.CONFLICT, style.PAPER), (INK, style.PAPER), (style.BAD, INK))
"""Fill and text."""
SHARES = ("joint_success", "copied")
PANELS = ("identity_kept", "prompt_satisfied", "reward/identity", "reward/prompt")
COLOURS = {"identity": IDENTITY, "prompt": PROMPT}
"""By hue of a metric; others are drawn in ink."""


def write_figures(results: Sequence[Result], folder: Path, order: Sequence[str] | None = None) -> list[Path]:
    """Write every figure that `results` allow into `folder`, as NAME.svg and NAME.png; return the SVGs' paths.

    Names: curves, plane, signals, joint, and settings if there are several. `order`: the order of the presets.
    """
    paths = []
    with mpl.rc_context(style.rc()):
        for name, draw in FIGURES.items():
            if figure := draw(results, presets_in(results, order)):
                paths.append(folder / f"{name}.svg")
                write_whole(paths[-1], style.svg_text(figure))
                style.save_png(figure, folder / f"{name}.png", dpi=192)
    return paths


def draw_svgs(results: Sequence[Result], order: Sequence[str] | None = None) -> dict[str, str]:
    """Draw the same figures as SVG documents, by name."""
    with mpl.rc_context(style.rc()):
        drawn = {name: draw(results, presets_in(results, order)) for name, draw in FIGURES.items()}
        return {name: style.svg_text(figure) for name, figure in drawn.items() if figure}


def curves(results: Sequence[Result], presets: Sequence[str]) -> Figure | None:
    """Draw validations against iteration: means over seeds, their 95 % intervals shaded; a column per setting."""
    trained = [name for name in presets if any(r.curve for r in results if r.preset == name)]
    shown = [name for name in CURVES if name in trained] or trained[:3]
    panels = [metric for metric in PANELS if any(metric in r.curve for r in results if r.preset in shown)]
    if not panels:
        return None
    settings = settings_in(results)
    several = len(settings) > 1
    jobs = [(setting, metric_info(metric)) for metric in panels for setting in settings]
    columns = len(settings) if several else 2
    rows = math.ceil(len(jobs) / columns)
    figure = style.new_figure(2.5 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row" if several else False)
    for axes, (setting, info) in zip(grid.flat, jobs, strict=False):
        hue = COLOURS.get(info.hue, INK)
        ends = []
        for preset in shown:
            steps, course = _course(select(results, setting, preset).values(), info.name)
            if steps:
                mean, low, high = zip(*course, strict=True)
                line = style.curve(preset, hue)
                axes.fill_between(steps, low, high, color=line["color"], alpha=0.14, linewidth=0)
                axes.plot(steps, mean, **line)
                ends.append((mean[-1], preset, line["color"]))
        style.title(axes, info.heading, setting, hue)
        style.grid(axes, share=info.is_share)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axes.margins(x=0)
        if setting == settings[-1]:
            style.end_labels(axes, ends)
    for axes in grid.flat[len(jobs) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("iteration", loc="right")
    return figure


def plane(results: Sequence[Result], presets: Sequence[str]) -> Figure | None:
    """Draw prompt satisfied over identity kept, a point per preset with its 95 % intervals; a panel per setting."""
    rows = summarise(results, order=presets)
    spots = {
        setting: {
            row.preset: (row.means["identity_kept"], row.means["prompt_satisfied"])
            for row in rows
            if row.setting == setting and {"identity_kept", "prompt_satisfied"} <= row.means.keys()
        }
        for setting in settings_in(results)
    }
    if not any(spots.values()):
        return None
    figure = style.new_figure(5.8 if len(spots) == 1 else 4.4)
    grid = figure.subplots(1, len(spots), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (setting, found) in zip(grid, spots.items(), strict=True):
        for preset, ((x, left, right), (y, low, high)) in found.items():
            colour = style.emphasis(preset)
            axes.plot([left, right], [y, y], color=colour, alpha=0.35, linewidth=1.1)
            axes.plot([x, x], [low, high], color=colour, alpha=0.35, linewidth=1.1)
            face = style.PAPER if preset == BASE else colour
            axes.plot(x, y, "o", markersize=6.5, color=colour, markerfacecolor=face, markeredgewidth=1.4, zorder=4)
        style.grid(axes)
        style.grid(axes, across=True)
        axes.margins(0.08)
        style.title(axes, "Prompt satisfied" if setting == next(iter(spots)) else "", setting, PROMPT)
        axes.set_xlabel("Identity kept", loc="right", color=IDENTITY, fontweight="bold", fontsize=10.5)
    figure.draw_without_rendering()
    for axes, found in zip(grid, spots.values(), strict=True):
        style.place_labels(axes, found)
    return figure


def signals(results: Sequence[Result], presets: Sequence[str]) -> Figure | None:
    """Draw the shares of rollouts by the signs of their two advantages, early and late, under the paper's method."""
    needed = {f"{period}/{name}" for period in PERIODS[:2] for name in SIGNALS}
    known = [r for r in results if needed <= r.values.keys()]
    if not known:
        return None
    settings = settings_in(known)
    shown = [name for name in presets if any(r.preset == name for r in known)]
    figure = style.new_figure(0.46 * len(shown) + 1.3)
    grid = figure.subplots(1, len(settings), squeeze=False, sharey=True, sharex=True)[0]
    for axes, setting in zip(grid, settings, strict=True):
        _stack(axes, 0.0, PAPER_SIGNALS)
        for place, preset in enumerate(shown, start=1):
            seeds = list(select(known, setting, preset).values())
            for level, period in ((place - 0.2, "early"), (place + 0.2, "late")):
                if seeds:
                    _stack(axes, level, _signal_shares(seeds, period))
        axes.set_xlim(0, 1)
        axes.xaxis.set_visible(False)
        axes.spines[:].set_visible(False)
        style.title(axes, "Share of rollouts in %" if setting == settings[0] else "", setting)
    for place in range(1, len(shown) + 1):
        for level, period in ((place - 0.2, "early"), (place + 0.2, "late")):
            place_in = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
            grid[0].annotate(
                period, (0, level), (-6, 0), ha="right", va="center_baseline", color=MUTED, fontsize=8, **place_in
            )
    grid[0].set_ylim(len(shown) + 0.5, -0.3)
    grid[0].set_yticks(range(len(shown) + 1), ["the paper", *shown])
    grid[0].tick_params(axis="y", pad=32, labelcolor=INK)
    handles = [Patch(color=fill, label=name) for name, (fill, _) in zip(SIGNAL_NAMES, SIGNAL_COLOURS, strict=True)]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, handlelength=0.9, handleheight=0.9)
    return figure


def joint(results: Sequence[Result], presets: Sequence[str]) -> Figure | None:
    """Draw joint success per preset, best first: mean, 95 % interval, every seed, and the base as a line."""
    rows = [row for row in summarise(results, order=presets) if "joint_success" in row.means]
    shown = {row.preset for row in rows} - {BASE}
    if not shown:
        return None
    best = {name: np.mean([row.means["joint_success"][0] for row in rows if row.preset == name]) for name in shown}
    ranked = sorted(shown, key=lambda name: (-best[name], name))
    settings = settings_in(results)
    figure = style.new_figure(0.37 * len(ranked) + (1.0 if len(settings) == 1 else 1.25))
    grid = figure.subplots(1, len(settings), squeeze=False, sharey=True, sharex=True)[0]
    for axes, setting in zip(grid, settings, strict=True):
        for row in (row for row in rows if row.setting == setting):
            mean, low, high = row.means["joint_success"]
            if row.preset == BASE:
                axes.axvline(mean, color=MUTED, linewidth=1.2, dashes=(4, 3), zorder=1)
                place_in = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                axes.annotate(BASE, (mean, 1), (0, 3), ha="center", color=MUTED, fontsize=9, **place_in)
                continue
            place, colour = ranked.index(row.preset), style.emphasis(row.preset)
            seeds = [r.values.get("joint_success", math.nan) for r in select(results, setting, row.preset).values()]
            axes.plot([low, high], [place, place], color=colour, linewidth=1.8, solid_capstyle="round", zorder=2)
            axes.plot(seeds, [place + 0.27] * len(seeds), "o", markersize=3, color=colour, alpha=0.5, markeredgewidth=0)
            axes.plot(mean, place, "o", markersize=7, color=colour, zorder=3)
        style.grid(axes, across=True)
        axes.set_title(setting or "Joint success", loc="left", pad=18)
    if len(settings) > 1:
        grid[-1].set_xlabel("joint success", loc="right")
    grid[0].set_ylim(len(ranked) - 0.4, -0.6)
    grid[0].set_yticks(range(len(ranked)), ranked)
    for label in grid[0].get_yticklabels():
        label.set(color=style.emphasis(label.get_text()), fontweight=style.weight(label.get_text()))
    return figure


def by_setting(results: Sequence[Result], presets: Sequence[str]) -> Figure | None:
    """Draw joint success, copy-paste rate, and the gain of `customized` over the reference, if both ran, against the
    setting."""
    settings, rows = settings_in(results), summarise(results, order=presets)
    if len(settings) < 2:
        return None
    ours = [row for row in rows if row.preset == METHOD and "joint_success" in row.differences]
    figure = style.new_figure(3.4)
    grid = figure.subplots(1, 3 if ours else 2)
    for axes, metric in zip(grid, SHARES, strict=False):
        ends = []
        for number, preset in enumerate(presets):
            aside = 0.06 * (number - (len(presets) - 1) / 2)
            known = [r for r in rows if r.preset == preset and metric in r.means]
            own = {settings.index(row.setting) + aside: row.means[metric] for row in known}
            if own:
                line = style.curve(preset, INK)
                axes.plot(list(own), [mean for mean, _, _ in own.values()], marker="o", markersize=5, **line)
                _bars(axes, own, line["color"])
                ends.append((own[max(own)][0], preset, line["color"]))
        style.title(axes, metric_info(metric).heading)
        _settings_axis(axes, settings)
        style.end_labels(axes, ends)
    if not ours:
        return figure
    gains: dict[float, Interval] = {settings.index(row.setting): row.differences["joint_success"] for row in ours}
    grid[2].axhline(0, color=MUTED, linewidth=1)
    grid[2].plot(list(gains), [mean for mean, _, _ in gains.values()], "o", markersize=7, color=INK)
    _bars(grid[2], gains, INK, 1.8)
    style.title(grid[2], "Gain in points")
    _settings_axis(grid[2], settings)
    grid[2].yaxis.set_major_formatter(FuncFormatter(style.points))
    return figure


FIGURES: dict[str, Callable[[Sequence[Result], Sequence[str]], Figure | None]] = {
    "joint": joint,
    "plane": plane,
    "curves": curves,
    "signals": signals,
    "settings": by_setting,
}


def _settings_axis(axes: Axes, settings: Sequence[str]) -> None:
    style.grid(axes)
    axes.set_xlim(-0.35, len(settings) - 0.65)
    # A word a line: names of settings stand close together.
    axes.set_xticks(range(len(settings)), [name.replace(" ", "\n") for name in settings])


def _course(results: Iterable[Result], metric: str) -> tuple[list[int], list[Interval]]:
    """Return iterations, and mean and bounds over the seeds that were validated there."""
    found = [r.curve[metric] for r in results if metric in r.curve]
    steps = sorted({step for curve in found for step in curve})
    return steps, [t_interval([curve[step] for curve in found if step in curve]) for step in steps]


def _signal_shares(results: Sequence[Result], period: str) -> tuple[float, float, float]:
    good, prompt, identity, bad = (float(np.mean([r.values[f"{period}/{name}"] for r in results])) for name in SIGNALS)
    return prompt + identity, good, bad


def _stack(axes: Axes, place: float, shares: Sequence[float]) -> None:
    left = 0.0
    for share, (fill, colour) in zip(shares, SIGNAL_COLOURS, strict=True):
        axes.barh(place, share, 0.34, left=left, color=fill, edgecolor=style.PAPER, linewidth=1)
        text = f"{100 * share:.1f}"
        axes.text(left + share / 2, place, text, ha="center", va="center_baseline", color=colour, fontsize=8)
        left += share


def _bars(axes: Axes, points: Mapping[float, Interval], colour: str, width: float = 1.2) -> None:
    for x, (_, low, high) in points.items():
        axes.plot([x, x], [low, high], color=colour, linewidth=width, solid_capstyle="round")
