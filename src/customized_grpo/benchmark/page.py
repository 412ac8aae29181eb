"""`benchmark.html`: one self-contained page about a benchmark, no scripts in it and nothing from elsewhere."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup

from customized_grpo.benchmark.items import Item
from customized_grpo.benchmark.published import METHOD, PROMPTS, PUBLISHED, REAL_IMAGES, SUBJECTS
from customized_grpo.data import load_image
from customized_grpo.data.images import to_pil
from customized_grpo.evaluation.statistics import Interval
from customized_grpo.report import style
from customized_grpo.report.formats import metric_value
from customized_grpo.report.inline import inline_svg
from customized_grpo.report.page import render_page
from customized_grpo.report.records import as_data_uri
from customized_grpo.tracking.metric_info import MetricInfo, headline_first, in_order, metric_info

PLANES = (("dino", "hpsv3"), ("dinov2", "hpsv3"), ("dino", "clip_t"), ("identity_kept", "prompt_satisfied"))
"""(identity, prompt): the first pair that was measured is drawn."""
PUBLISHED_PLANE = PLANES[0]
THIS = "this"
SHOTS, THUMBNAIL = 5, 160


def write_page(results: Mapping[str, Any], items: Sequence[Item], paths: Sequence[Path], folder: Path) -> Path:
    """Write `benchmark.html` into `folder` and return its path. `results` as in benchmark.json, `paths` the pictures of
    the `items`."""
    return render_page(Path(__file__).parent, page_content(results, items, paths), folder / "benchmark.html")


def page_content(results: Mapping[str, Any], items: Sequence[Item], paths: Sequence[Path]) -> dict[str, Any]:
    """Return the variables of the template, by name."""
    summary: dict[str, Interval] = {
        name: (_known(each["mean"]), _known(each["low"]), _known(each["high"]))
        for name, each in results["summary"].items()
    }
    settings, whole = results["settings"], len(items) == PROMPTS and results["subjects"] == SUBJECTS
    axes = next((pair for pair in PLANES if set(pair) <= summary.keys()), None)
    # Of other data, or to other pictures, they say nothing.
    comparable = results["benchmark"] == "dreambench" and results["measured"].get("identity_to") == "reference"
    published = PUBLISHED if comparable and axes == PUBLISHED_PLANE else {}
    metrics = headline_first(in_order(summary))
    return {
        "title": _title(settings),
        "facts": _facts(settings, results["subjects"], len(items)),
        "partial": results["benchmark"] == "dreambench" and not whole,
        "metrics": metrics,
        "copies": "copy" in summary,
        "overall": [_cell(info, summary[info.name]) for info in metrics],
        "published": [_published(name, metrics) for name in published],
        "whole_prompts": not results["measured"].get("hpsv3_as_published", False),
        "subjects": _subject_rows(results["records"], metrics),
        "plane": None if axes is None else _plane(summary, axes, published),
        "axes": axes,
        "gallery": _gallery(results["records"], items, paths, metrics),
        "settings": json.dumps({**settings, **results["measured"]}, indent=1),
    }


def _title(settings: Mapping[str, Any]) -> str:
    if "images" in settings:
        return f"Pictures of {Path(settings['images']).name}"
    name = settings["policy.kind"]
    return f"{name}, tuned: {Path(settings['adapter']).name}" if settings["adapter"] else f"{name}, untuned"


def _facts(settings: Mapping[str, Any], subjects: int, pictures: int) -> list[tuple[str, str]]:
    facts = [("Data", Path(settings["data"]).name), ("Subjects", str(subjects)), ("Pictures", str(pictures))]
    if "images" in settings:
        return facts
    facts += [("Denoising steps", str(settings["num_steps"])), ("Seed", str(settings["seed"]))]
    if settings["policy.pipeline.guidance_scale"] is not None:
        size = f"{settings['policy.pipeline.width']} \u00d7 {settings['policy.pipeline.height']}"
        facts += [("Guidance", f"{settings['policy.pipeline.guidance_scale']:g}"), ("Size", size)]
    return facts


def _cell(info: MetricInfo, interval: Interval) -> dict[str, str]:
    mean, low, high = interval
    bounds = f"{metric_value(info, low)} to {metric_value(info, high)}" if math.isfinite(low) else ""
    return {"mean": metric_value(info, mean), "bounds": bounds}


def _published(name: str, metrics: Sequence[MetricInfo]) -> dict[str, Any]:
    known = dict(zip(PUBLISHED_PLANE, PUBLISHED[name], strict=True))
    cells = [metric_value(info, known.get(info.name, math.nan)) for info in metrics]
    return {"name": name, "cells": cells, "ours": name == METHOD}


def _subject_rows(records: Sequence[Mapping[str, Any]], metrics: Sequence[MetricInfo]) -> list[dict[str, Any]]:
    subjects = dict.fromkeys(record["subject"] for record in records)
    rows = []
    for subject in subjects:
        mine = [record["metrics"] for record in records if record["subject"] == subject]
        cells = [metric_value(info, _mean([each[info.name] for each in mine])) for info in metrics]
        rows.append({"subject": subject, "pictures": len(mine), "cells": cells})
    return rows


def _gallery(
    records: Sequence[Mapping[str, Any]],
    items: Sequence[Item],
    paths: Sequence[Path],
    metrics: Sequence[MetricInfo],
) -> list[dict[str, Any]]:
    """Return each subject's reference and the first pictures drawn of it."""
    rows: dict[str, dict[str, Any]] = {}
    for record, item, path in zip(records, items, paths, strict=True):
        row = rows.setdefault(item.subject, {"subject": item.subject, "shots": []})
        if not row["shots"]:
            reference = item.references[0]
            row["reference"] = _thumbnail(reference)
        if len(row["shots"]) < SHOTS:
            values = record["metrics"]
            told = ", ".join(f"{info.heading} {metric_value(info, _known(values[info.name]))}" for info in metrics)
            uri = _thumbnail(path)
            row["shots"].append({"uri": uri, "prompt": item.prompt, "title": told})
    return list(rows.values())


def _thumbnail(path: Path) -> str:
    """Return the picture as the generator and the rewards see it: upright and in sRGB."""
    picture = to_pil(load_image(path))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return as_data_uri(picture)


def _plane(summary: Mapping[str, Interval], axes: tuple[str, str], others: Mapping[str, tuple[float, float]]) -> Markup:
    """Draw prompt over identity: the measured values with their intervals, and the published `others`."""
    spots = {THIS: (summary[axes[0]], summary[axes[1]])}
    spots |= {name: ((x, math.nan, math.nan), (y, math.nan, math.nan)) for name, (x, y) in others.items()}
    with mpl.rc_context(style.rc()):
        figure = style.new_figure(5.6)
        panel = figure.subplots()
        for name, ((x, left, right), (y, low, high)) in spots.items():
            colour = style.emphasis(name, THIS)
            panel.plot([left, right], [y, y], color=colour, alpha=0.35, linewidth=1.1)
            panel.plot([x, x], [low, high], color=colour, alpha=0.35, linewidth=1.1)
            size = 8.0 if name == THIS else 5.5
            face = colour if name in (THIS, METHOD) else style.PAPER
            panel.plot(x, y, "o", markersize=size, color=colour, markerfacecolor=face, markeredgewidth=1.4, zorder=4)
        if others:
            panel.axvline(REAL_IMAGES, color=style.AXIS, linewidth=1, dashes=(4, 3), zorder=1)
            panel.annotate(
                "real pictures of a subject", (REAL_IMAGES, 0.01), (4, 3), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=8.5, color=style.MUTED,
            )  # fmt: skip
        style.grid(panel, share=metric_info(axes[1]).is_share)
        style.grid(panel, share=metric_info(axes[0]).is_share, across=True)
        panel.margins(0.09)
        style.title(panel, metric_info(axes[1]).heading, hue=style.PROMPT)
        panel.set_xlabel(
            metric_info(axes[0]).heading, loc="right", color=style.IDENTITY, fontweight="bold", fontsize=10.5
        )
        figure.draw_without_rendering()
        style.place_labels(panel, spots, THIS)
        return inline_svg("plane", style.svg_text(figure), "Prompt over identity")


def _mean(values: Sequence[float | None]) -> float:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _known(value: float | None) -> float:
    return math.nan if value is None else float(value)
