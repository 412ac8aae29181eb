"""The figures of a report: which columns of a run go into which chart."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from customized_grpo.evaluation.against_base import HELD_OUT_GAIN, INTERVALS, REWARD_GAIN
from customized_grpo.evaluation.statistics import Array
from customized_grpo.report.charts import (
    Chart,
    Rule,
    Series,
    line_chart,
    plane,
    quadrant_chart,
    smooth,
    weight_chart,
)
from customized_grpo.report.records import Columns, Run
from customized_grpo.tracking.metric_info import metric_info

FIRST_RATIO_ALARM = 1e-5
JUDGED = ("prompt_satisfied", "identity_kept", "joint_success")
"""What the chart of the judge shows."""


def reward_charts(run: Run) -> list[Chart]:
    """Draw one chart per reward: the mean of each iteration, raw and smoothed, and the validations."""
    charts = []
    for name in run.metrics.reward_names():
        x, y = run.metrics["iteration"], run.metrics[f"reward/{name}/mean"]
        info = run.info(f"reward/{name}")
        series = _raw_and_smooth(x, y, info.hue)
        if run.evaluations.has(f"reward/{name}"):
            checks = run.evaluations
            series.append(Series("validation", checks["iteration"], checks[f"reward/{name}"], "joint", "dots"))
        charts.append(
            line_chart(
                info.heading,
                "mean over the rollouts of an iteration",
                series,
                rules=_bounds(run, name),
                marked=run.over_optimized,
            )
        )
    return [chart for chart in charts if chart]


def gain_chart(run: Run) -> Chart | None:
    """Draw what validations gained on held-out metrics, with the interval, and on the rewards."""
    checks = run.evaluations
    if not checks.has(HELD_OUT_GAIN):
        return None
    x = checks["iteration"]
    bounds = [(row.get(INTERVALS) or {}).get(HELD_OUT_GAIN) or (None, None) for row in run.validations]
    low, high = np.array(bounds, dtype=np.float64).T
    series = [Series("held out", x, checks[HELD_OUT_GAIN], "joint", "dots")]
    if checks.has(REWARD_GAIN):
        series.append(Series("rewards", x, checks[REWARD_GAIN], "muted", "dots"))
    return line_chart(
        "Gain over the base", "in standard deviations of the base, on validation pairs", series, band=(x, low, high),
        rules=[Rule(0.0, "")], marked=run.over_optimized,
    )  # fmt: skip


def _bounds(run: Run, name: str) -> list[Rule]:
    """Return the bounds of a reward that is a constraint."""
    bounds = {side: run.settings.get(f"rewards.{name}.{side}") for side in ("at_least", "at_most")}
    return [Rule(float(bound), side.replace("_", " ")) for side, bound in bounds.items() if bound is not None]


def judge_chart(run: Run) -> Chart | None:
    """Draw the shares of validation samples that pass the oracle, over training."""
    checks = run.evaluations
    infos = [metric_info(name) for name in JUDGED if checks.has(name)]
    series = [Series(info.label, checks["iteration"], checks[info.name], info.hue, "dots") for info in infos]
    if not series:
        return None
    return line_chart(
        "Judge on the validation pairs", "share of pairs", series, percent=True, include=(0.0,), height=400,
        marked=run.over_optimized,
    )  # fmt: skip


def plane_chart(run: Run) -> Chart | None:
    """Draw the plane of the oracle's two verdicts, or of the two rewards without an oracle."""
    judged = run.evaluations.has("identity_kept") or any("identity_kept" in e.intervals for e in run.final.values())
    across, up = ("identity_kept", "prompt_satisfied") if judged else _prompt_and_identity(run)
    if not (across and up):
        return None
    names = (run.info(across).label, run.info(up).label)
    checks = run.evaluations
    tests = {
        name: (found.intervals[across], found.intervals[up])
        for name, found in run.sides.items()
        if across in found.intervals and up in found.intervals
    }
    return plane((checks["iteration"], checks[across], checks[up]), tests, names, percent=judged)


def _prompt_and_identity(run: Run) -> tuple[str, str]:
    """Return the figures of the first rewards that measure the identity and the prompt, "" where none does."""
    infos = [run.info(f"reward/{name}") for name in run.metrics.reward_names()]
    across, up = (next((info.name for info in infos if info.hue == hue), "") for hue in ("identity", "prompt"))
    return across, up


def quadrants(run: Run) -> list[Chart]:
    """Draw the quadrants of each pair of objectives."""
    metrics, names = run.metrics, run.objectives
    charts = []
    for first, second in combinations(names, 2):
        prefix = "quadrant/" if len(names) == 2 else f"quadrant/{first}-{second}/"
        shares = [metrics[prefix + name] for name in ("both_good", f"only_{first}", f"only_{second}", "both_bad")]
        pair = (run.info(f"reward/{first}"), run.info(f"reward/{second}"))
        charts.append(quadrant_chart(metrics["iteration"], shares, pair, metrics["conflict_rate"]))
    return [chart for chart in charts if chart]


def weights(run: Run) -> Chart | None:
    """Draw the weights of the objectives at each step."""
    found = run.weights
    if not found:
        return None
    infos = [run.info(f"reward/{name}") for name in found.names]
    return weight_chart(found.sigmas, found.weights, found.trained_steps, infos)


def first_ratio_error(metrics: Columns) -> dict[str, Any] | None:
    """Return the largest |ratio - 1| on the first pass, its iteration, and how many iterations exceed the alarm; or
    None."""
    error = np.fmax(np.abs(metrics["first_ratio/min"] - 1), np.abs(metrics["first_ratio/max"] - 1))
    if np.isnan(error).all():
        return None
    worst = int(np.nanargmax(error))
    return {
        "worst": float(error[worst]),
        "iteration": int(metrics["iteration"][worst]),
        "count": int((error > FIRST_RATIO_ALARM).sum()),
    }


def health_charts(run: Run) -> list[Chart]:
    """Draw small charts of the signs that show first when training goes wrong."""
    metrics = run.metrics
    x = metrics["iteration"]
    spread = [
        Series(name, x, smooth(metrics[f"reward/{name}/std"]), run.info(f"reward/{name}").hue)
        for name in metrics.reward_names()
    ]
    charts = [
        _ratio_chart("Ratio \u03c1 in the update", "\u03c1 \u2212 1, range shaded", metrics, "ratio"),
        _ratio_chart("Ratio \u03c1 on the first pass", "\u03c1 \u2212 1", metrics, "first_ratio", FIRST_RATIO_ALARM),
        line_chart(
            "Clipped",
            "share of ratios outside the clip range",
            _plain(metrics, "clip_fraction"),
            percent=True,
            include=(0.0,),
            small=True,
            height=190,
        ),
        line_chart(
            "Gradient norm",
            "before clipping",
            _plain(metrics, "grad_norm"),
            include=(0.0,),
            small=True,
            height=190,
        ),
        line_chart(
            "Spread within a group",
            "standard deviation of each reward",
            spread,
            include=(0.0,),
            small=True,
            height=190,
        ),
        line_chart("Loss", "clipped surrogate and KL term", _plain(metrics, "loss"), small=True, height=190),
    ]
    broken = [
        Series(
            name.removeprefix("violated/"), x, smooth(metrics[name]), run.info(name.replace("violated", "reward")).hue
        )
        for name in metrics.values
        if name.startswith("violated/")
    ]
    if broken:
        charts.append(
            line_chart(
                "Constraints broken", "share of samples outside of the bounds", broken, percent=True, include=(0.0,),
                small=True, height=190,
            )
        )  # fmt: skip
    checks = run.evaluations
    for name, title, unit, rules in (
        ("texture", "Texture", "of validation images, in units of the base's", (0.8, 1.25)),
        ("diversity", "Diversity", "mean distance of images of one prompt", ()),
    ):
        if checks.has(name):
            series = [Series("", checks["iteration"], checks[name], "plain", "dots")]
            drawn = [Rule(rule, "", "alarm") for rule in rules]
            include = (0.0,) if name == "diversity" else (1.0,)
            charts.append(line_chart(title, unit, series, include=include, rules=drawn, small=True, height=190))
    for name, title, unit in (
        ("kl", "KL to the base", "mean over the trained steps"),
        ("invalid_share", "Invalid rewards", "share of samples left out"),
        ("silent_groups", "Silent groups", "share of groups whose advantages are all 0"),
    ):
        if metrics.has(name) and np.nanmax(np.abs(metrics[name])) > 0:
            charts.append(
                line_chart(
                    title,
                    unit,
                    _plain(metrics, name),
                    percent=name != "kl",
                    include=(0.0,),
                    small=True,
                    height=190,
                )
            )
    return [chart for chart in charts if chart]


def _raw_and_smooth(x: Array, y: Array, hue: str) -> list[Series]:
    smoothed = smooth(y)
    if smoothed is y:
        return [Series("each iteration", x, y, hue)]
    return [Series("each iteration", x, y, hue, "pale"), Series("smoothed", x, smoothed, hue)]


def _plain(metrics: Columns, name: str) -> list[Series]:
    return [replace(series, label="") for series in _raw_and_smooth(metrics["iteration"], metrics[name], "plain")]


def _ratio_chart(title: str, unit: str, metrics: Columns, name: str, alarm: float | None = None) -> Chart | None:
    """Draw the deviation of the ratio from 1, its extremes shaded; `alarm` draws the bound it must stay within."""
    x = metrics["iteration"]
    low, high, mean = (metrics[f"{name}/{which}"] - 1 for which in ("min", "max", "mean"))
    series = [Series("mean", x, mean, "plain")]
    rules = [Rule(0.0, "")]
    if alarm:
        series = [Series("smallest", x, low, "plain"), Series("", x, high, "plain")]
        rules = [Rule(alarm, "alarm", "alarm"), Rule(-alarm, "", "alarm")]
    return line_chart(title, unit, series, band=(x, low, high), rules=rules, small=True, height=190)
