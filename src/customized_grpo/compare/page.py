"""`comparison.html`: one self-contained page about a grid of runs, no scripts in it and nothing from elsewhere."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from customized_grpo.compare.figures import draw_svgs
from customized_grpo.compare.guard import Guard, guards, stoppings
from customized_grpo.compare.results import Result, Row, presets_in, select, settings_in, summarise
from customized_grpo.compare.runs import Cell, read_records
from customized_grpo.compare.table import run_of
from customized_grpo.config.presets import BASE, BASELINE, METHOD
from customized_grpo.evaluation.against_base import HELD_OUT_GAIN
from customized_grpo.evaluation.statistics import Interval
from customized_grpo.report.formats import duration, metric_change, metric_value
from customized_grpo.report.inline import inline_svg
from customized_grpo.report.page import SECRET, render_page
from customized_grpo.report.records import data_uri
from customized_grpo.tracking.metric_info import HEADLINE, MetricInfo, headline_first, metric_info, overview

FIGURES = {
    "settings": (
        "Where it helps",
        f"The same presets under every setting, and where both ran the paired gain of {METHOD} over {BASELINE}.",
    ),
    "joint": (
        "Joint success",
        "Large dots are means over seeds, bars their 95\u202f% intervals, small dots the seeds themselves; the dashed "
        "line is the policy before any training.",
    ),
    "plane": (
        "The prompt\u2013identity plane",
        "Every preset at the end of training, with the 95\u202f% intervals of both means. Up and to the right is "
        "better; hollow is the policy before any training.",
    ),
    "curves": (
        "The course of training",
        "Validations during training: means over seeds, their 95\u202f% intervals shaded. Above what the judge says, "
        "below the rewards that were trained on.",
    ),
    "signals": (
        "Do the rewards pull apart?",
        "Rollouts by the signs of their two advantages, in the first and the last fifth of training, under the paper's "
        "distribution. In conflict, one reward asks for more of a picture and the other for less.",
    ),
}
"""By name, in the order of the page: heading and caption."""
GALLERY_ROWS = 12
GUARDED = (HEADLINE, "copied", "texture", HELD_OUT_GAIN)
"""What is shown of the best adapters beside the last ones."""


def write_page(
    results: Sequence[Result],
    cells: Sequence[Cell],
    folder: Path,
    *,
    title: str,
    settings_text: str,
    failures: Mapping[str, str],
) -> Path:
    """Write `comparison.html` into the grid's folder and return its path.

    `cells`: all runs that were asked for; pictures come from the finished ones, and presets are in their order.
    `failures`: reason by name of run. Raises UserError where an evaluation with pictures to show cannot be read.
    """
    content = page_content(results, cells) | {
        "title": title,
        "failures": failures,
        "config": SECRET.sub(r"\1(not shown)", settings_text),
    }
    return render_page(Path(__file__).parent, content, folder / "comparison.html")


def page_content(results: Sequence[Result], cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the variables of the template, by name."""
    order = list(dict.fromkeys(cell.preset for cell in cells))
    rows = summarise(results, order=order)
    columns = headline_first(overview(name for row in rows for name in row.means))
    drawn = draw_svgs(results, order)
    return {
        "done": len({run_of(cell) for cell in cells} & {run_of(result) for result in results}),
        "asked": len(cells),
        "facts": facts(results),
        "headlines": headlines(results, rows),
        "compared": {BASELINE, METHOD} <= set(order),
        "reference": BASELINE,
        "ours": METHOD,
        "columns": columns,
        "groups": grouped(rows, [table_row(row, columns) for row in rows]),
        "differences": grouped(
            [row for row in rows if row.differences],
            [difference_row(row, columns) for row in rows if row.differences],
        ),
        "guards": [guard_row(guard) for guard in guards(results, GUARDED)],
        "guarded": [metric_info(name) for name in GUARDED],
        "stoppings": stoppings(results),
        "pairs": int(max((r.values.get("pairs", 0) for r in results), default=0)),
        "figures": [
            (name, heading, caption, inline_svg(name, drawn[name], heading))
            for name, (heading, caption) in FIGURES.items()
            if name in drawn
        ],
        "galleries": [shown for setting in settings_in(results) if (shown := gallery(cells, setting, order))],
    }


def facts(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Return the facts of the comparison, as label and value."""
    trained = [r for r in results if r.preset != BASE]
    counts = [len(select(trained, s, p)) for s in settings_in(trained) for p in presets_in(trained)]
    found = [("Presets", str(len(presets_in(trained))))]
    if len(settings_in(trained)) > 1:
        found.append(("Settings", ", ".join(settings_in(trained))))
    found.append(("Finished runs", str(len(trained))))
    found.append(("Seeds of a preset", _span(count for count in counts if count)))
    found.append(("Test pairs", _span(int(r.values["pairs"]) for r in results if "pairs" in r.values)))
    found.append(("Iterations", _span(int(r.values["iterations"]) for r in trained if "iterations" in r.values)))
    seconds = sum(r.values.get("seconds", 0.0) for r in trained)
    return [*found, *([("Training in all", duration(seconds))] if seconds else [])]


def headlines(results: Sequence[Result], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return for each setting the paired difference in joint success between `customized` and the baseline, if both
    ran."""
    found = []
    for row in rows:
        if row.preset != METHOD or "joint_success" not in row.differences:
            continue
        both = [select(results, row.setting, preset) for preset in (BASELINE, METHOD)]
        before, after = (np.mean([side[seed].values["joint_success"] for seed in row.shared]) for side in both)
        difference = row.differences["joint_success"]
        found.append(
            {
                "setting": row.setting,
                "before": float(before),
                "after": float(after),
                "difference": difference,
                "seeds": len(row.shared),
                "verb": verb(difference),
            }
        )
    return found


def verb(difference: Interval) -> str:
    """Return the verb for a difference with this 95 % interval."""
    _, low, high = difference
    if low > 0:
        return "rose"
    return "fell" if high < 0 else "did not differ measurably"


def grouped(rows: Sequence[Row], shown: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the rows of a table by setting."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row, cells in zip(rows, shown, strict=True):
        groups.setdefault(row.setting, []).append(cells)
    return list(groups.items())


def table_row(row: Row, columns: Sequence[MetricInfo]) -> dict[str, Any]:
    """Return means and intervals as text; an unknown one is a dash."""
    cells = []
    for info in columns:
        mean, low, high = row.means.get(info.name, (math.nan,) * 3)
        bounds = f"{metric_value(info, low)} to {metric_value(info, high)}" if math.isfinite(low) else ""
        cells.append({"hue": info.hue, "mean": metric_value(info, mean), "bounds": bounds, "apart": None})
    return {"preset": row.preset, "seeds": len(row.seeds), "cells": cells}


def difference_row(row: Row, columns: Sequence[MetricInfo]) -> dict[str, Any]:
    """Return differences to the baseline as text, marked `apart` if the interval excludes 0."""
    cells = []
    for info in columns:
        mean, low, high = row.differences.get(info.name, (math.nan,) * 3)
        bounds = f"{metric_change(info, low)} to {metric_change(info, high)}" if math.isfinite(low) else ""
        cells.append(
            {"hue": info.hue, "mean": metric_change(info, mean), "bounds": bounds, "apart": low > 0 or high < 0}
        )
    return {"preset": row.preset, "seeds": len(row.shared), "cells": cells}


def guard_row(guard: Guard) -> dict[str, Any]:
    """Return best and last adapters of a preset as text; a metric that a run lacks is a dash."""
    cells = []
    for info in map(metric_info, GUARDED):
        mean, low, high = guard.differences.get(info.name, (math.nan,) * 3)
        change = f"{metric_change(info, mean)}"
        if math.isfinite(low):
            change += f" ({metric_change(info, low)} to {metric_change(info, high)})"
        best, last = (metric_value(info, side.get(info.name, (math.nan,))[0]) for side in (guard.best, guard.last))
        cells.append({"hue": info.hue, "best": best, "last": last, "change": change, "apart": low > 0 or high < 0})
    return {
        "setting": guard.setting, "preset": guard.preset, "seeds": len(guard.iterations),
        "iterations": ", ".join(map(str, guard.iterations)), "cells": cells,
    }  # fmt: skip


def gallery(cells: Sequence[Cell], setting: str, order: Sequence[str]) -> dict[str, Any] | None:
    """Return the first pairs under every preset, for the lowest seed that all presets have, or else most of them."""
    finished = {(cell.seed, cell.preset): cell for cell in cells if cell.setting == setting and cell.finished}
    presets = [name for name in order if any(preset == name for _, preset in finished)]
    if not presets:
        return None
    seeds = sorted({seed for seed, _ in finished})
    seed = max(seeds, key=lambda seed: (sum((seed, name) in finished for name in presets), -seed))
    runs = {name: finished[seed, name] for name in presets if (seed, name) in finished}
    any_run = next(iter(runs.values()))
    shown = [("reference", any_run, "reference"), (BASE, any_run, BASE)]
    shown += [(name, runs[name], "tuned") for name in presets if name in runs]
    records = {name: read_records(run.folder, side) for name, run, side in shown if side != "reference"}
    lines = []
    for key, pair in list(records[BASE].items())[:GALLERY_ROWS]:
        shots = []
        for name, run, side in shown:
            images = run.folder / "evaluation" / "images"
            verdict = records.get(name, {}).get(key, {})
            shots.append({"name": name, "uri": data_uri(images / f"{key}_{side}.png", images), **_verdict(verdict)})
        if any(shot["uri"] for shot in shots):
            lines.append({"prompt": pair.get("prompt", ""), "shots": shots})
    missing = [name for name in presets if name not in runs]
    columns = [name for name, _, _ in shown]
    return {"setting": setting, "seed": seed, "columns": columns, "lines": lines, "missing": missing} if lines else None


def _verdict(record: Mapping[str, Any]) -> dict[str, Any]:
    judged = (("prompt", record.get("prompt_satisfied")), ("identity", record.get("identity_kept")))
    ticks = [(hue, bool(passed)) for hue, passed in judged if passed is not None]
    return {"ticks": ticks, "joint": bool(record.get("joint_success")), "copied": bool(record.get("copied"))}


def _span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    if not found:
        return "\u2013"
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
