"""`report.html`: one self-contained page about a run folder, no scripts in it and nothing from elsewhere."""

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from customized_grpo.evaluation.against_base import HELD_OUT_GAIN
from customized_grpo.evaluation.statistics import Array, Interval, paired_difference
from customized_grpo.io.files import write_whole
from customized_grpo.report import figures
from customized_grpo.report.best import describe_best
from customized_grpo.report.charts import strip
from customized_grpo.report.formats import (
    duration,
    metric_change,
    metric_value,
    percent,
    points,
    reward,
    scientific,
)
from customized_grpo.report.records import Columns, Evaluation, Run, data_uri, read_run
from customized_grpo.tracking.metric_info import HEADLINE, REWARD_PREFIX, MetricInfo

FACTS = (
    ("Policy", "policy.kind"),
    ("Trained", "policy.toybox.adapter"),
    ("Data", "data.path"),
    ("Rewards", "rewards"),
    ("Shaping", "advantages.shape"),
    ("SARS \u03b3", "advantages.sars.gamma"),
    ("SARS \u03b3 of penalties", "advantages.sars.gamma_penalty"),
    ("Weights", "advantages.weights"),
    ("Samples per group", "rollout.group_size"),
    ("Groups per iteration", "rollout.prompts_per_iteration"),
    ("Denoising steps", "rollout.num_steps"),
    ("SDE", "rollout.sde"),
    ("SDE noise \u03b7", "rollout.eta"),
    ("Clip range", "objective.clip_range"),
    ("Learning rate", "optimizer.learning_rate"),
    ("Seed", "seed"),
)
"""What the head of the page says was run: label, and dotted name of the configuration's field."""
SECRET = re.compile(r"(?im)^(\s*-?\s*[\w.]*(?:api_?key|secret|password|token)\s*:\s*)(?!null\b|\s*$).+$")
GALLERY_SIZE = 24


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Whatever the run has not written yet (final evaluation, validation, judge metrics, weights.json) is named
    on the page with the command that adds it. Raises UserError where metrics.jsonl is missing or a file is
    broken.
    """
    return render_page(Path(__file__).parent, page_content(read_run(run_dir)), run_dir / "report.html")


def render_page(templates: Path, content: Mapping[str, Any], path: Path) -> Path:
    """Write the `template.html.j2` of the folder `templates`, filled with `content`, to `path`, whole or not at all;
    returns `path`. Templates may include this package's base.css."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([templates, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, points=points, reward=reward, duration=duration, scientific=scientific)
    environment.filters.update(metric_value=metric_value, metric_change=metric_change)
    write_whole(path, environment.get_template("template.html.j2").render(content))
    return path


def page_content(run: Run) -> dict[str, Any]:
    """Return the variables of the template, by name."""
    table = result_rows(run)
    evaluation = run.final.get(run.kept or "base")
    return {
        "name": run.folder.resolve().name,
        "command": f"customized-grpo evaluate --run {shlex.quote(str(run.folder))}",
        "facts": facts(run),
        "split": evaluation.split if evaluation else "test",
        "pairs": len(evaluation.records) if evaluation else 0,
        "lead": describe_best(run.validations, str(run.settings.get("evaluation.select", HELD_OUT_GAIN))),
        "has_base": "base" in run.final,
        "has_tuned": run.kept is not None,
        "sides": {name: side_label(run, name) for name in run.sides},
        "kept": run.kept,
        "same_noise": len({side.seed for side in run.final.values()}) == 1 and len(run.final) > 1,
        "judged": any(row["info"].is_share for row in table),
        "rows": table,
        "headline": next((r for r in table if r["info"].name == HEADLINE and r["difference"]), None),
        "secondary": [r for r in table if r["info"].name != HEADLINE and r["difference"]],
        "last_validation": last_validation(run),
        "remarks": remarks(run),
        "reward_charts": figures.reward_charts(run),
        "gain_chart": figures.gain_chart(run),
        "judge_chart": figures.judge_chart(run),
        "plane": figures.plane_chart(run),
        "quadrants": figures.quadrants(run),
        "weights": figures.weights(run),
        "health": figures.health_charts(run),
        "first_ratio": figures.first_ratio_error(run.metrics),
        "timing": timing(run.metrics),
        "gallery": gallery(run),
        "validation_gallery": validation_gallery(run.folder),
        "config": SECRET.sub(r"\1(not shown)", run.config_text),
    }


def facts(run: Run) -> list[tuple[str, str]]:
    """Return the facts of a run as label and value, from its configuration and its metrics."""
    shown = [(label, _shown(run, name)) for label, name in FACTS]
    shown = [(label, text) for label, text in shown if text]
    done, asked = int(run.metrics["iteration"].max()), run.settings.get("iterations")
    shown.append(("Iterations", f"{done} of {asked}" if asked and asked != done else str(done)))
    seconds = np.nansum(run.metrics["seconds/total"])
    if seconds > 0:
        shown.append(("Training time", duration(float(seconds))))
    if run.metrics.has("samples_per_second"):
        shown.append(("Throughput", f"{np.nanmedian(run.metrics['samples_per_second']):.3g} samples/s"))
    return shown


def _shown(run: Run, field: str) -> str:
    """Return the value of a setting as text, "" without one; of the rewards their kinds and what is special."""
    if field != "rewards":
        value = run.settings.get(field)
        return "" if value is None or isinstance(value, list) else str(value)
    told = []
    for name in run.metrics.reward_names():
        settings = {key: run.settings.get(f"rewards.{name}.{key}") for key in ("kind", "role", "schedule", "weight")}
        special = settings["role"] if settings["role"] == "constraint" else settings["schedule"]
        if settings["kind"]:
            told.append(f"{name}: {settings['kind']}, {special if settings['weight'] != 0 else 'only logged'}")
    return "; ".join(told)


def result_rows(run: Run) -> list[dict[str, Any]]:
    """Return rows of the before/after table: the metrics at least one evaluation has, joint success first."""
    base, tuned = run.final.get("base"), run.final.get(run.kept or "")
    rows = []
    for info in run.metrics_in(dict.fromkeys(name for side in run.sides.values() for name in side.intervals)):
        metric = info.name
        sides = [side.intervals.get(metric) if side else None for side in (base, tuned)]
        known = [side for side in (tuned, base) if side]
        chance, ceiling = (
            next((getattr(side, name)[metric] for side in known if metric in getattr(side, name)), None)
            for name in ("chance", "ceiling")
        )
        rows.append(
            {
                "info": info,
                "label": info.heading,
                "hue": info.hue,
                "share": info.is_share,
                "base": sides[0],
                "tuned": sides[1],
                "sides": [(name, side.intervals.get(metric)) for name, side in run.sides.items()],
                "chance": chance,
                "ceiling": ceiling,
                "strip": strip(sides[0], sides[1], chance, ceiling, info.hue) if info.is_share else Markup(""),
                **_difference(base, tuned, info),
            }
        )
    return rows


def side_label(run: Run, name: str) -> str:
    """Return the heading of a final evaluation in the table of results."""
    iteration = run.sides[name].iteration
    if name == "base" or iteration is None or len(run.sides) < 3:
        return {"base": "Base", "best": "Best", "tuned": "Tuned"}[name]
    return f"{'Best' if name == 'best' else 'Last'}, iteration {iteration}"


def _difference(base: Evaluation | None, tuned: Evaluation | None, info: MetricInfo) -> dict[str, Any]:
    if not (base and tuned):
        return {"difference": None, "pairs": 0, "gained": 0, "lost": 0, "verb": ""}
    before, after = paired_values(base, tuned, info.name)
    difference = paired_difference(before, after)
    rise, fall = int((after > before).sum()), int((after < before).sum())
    return {
        "difference": difference if math.isfinite(difference[0]) else None,
        "pairs": len(before),
        "gained": rise if info.higher_is_better else fall,
        "lost": fall if info.higher_is_better else rise,
        "verb": _verb(difference),
    }


def paired_values(base: Evaluation, tuned: Evaluation, metric: str) -> tuple[Array, Array]:
    """Return values [N] of a metric before and after, over the pairs for which both evaluations have one."""

    def value(side: Evaluation, key: str) -> float:
        found = side.records[key].get(metric)
        return float(found) if found is not None else math.nan

    both = [(value(base, key), value(tuned, key)) for key in base.records if key in tuned.records]
    pairs = np.array(both, dtype=np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    return pairs[:, 0], pairs[:, 1]


def _verb(difference: Interval) -> str:
    _, low, high = difference
    if low > 0:
        return "rose"
    return "fell" if high < 0 else "did not change measurably"


def last_validation(run: Run) -> dict[str, Any] | None:
    """Return the last validation's values by metric name, or None without a validation."""
    evaluations = run.evaluations
    if evaluations.length == 0:
        return None
    last = {info: float(evaluations[info.name][-1]) for info in run.metrics_in(evaluations.values)}
    return {
        "iteration": int(evaluations["iteration"][-1]),
        "values": [{"info": info, "value": value} for info, value in last.items() if math.isfinite(value)],
    }


def remarks(run: Run) -> list[tuple[str, str]]:
    """Return warnings and notes for the reader, as (WARNING or Note, text); often none."""
    metrics, found = run.metrics, []
    error = figures.first_ratio_error(metrics)
    if error and error["count"]:
        text = (
            f"The first-pass ratio is not 1: |\u03c1 \u2212 1| reaches {scientific(error['worst'])} at "
            f"iteration {error['iteration']} and is above 10\u207b\u2075 in {error['count']} of "
            f"{metrics.length} iterations. The update does not see the probabilities the rollout drew from: "
            "clipping and gradients are off."
        )
        found.append(("WARNING", text))
    names = ("loss", "grad_norm", *(f"reward/{name}/mean" for name in metrics.reward_names()))
    broken = {name: int((~np.isfinite(metrics[name])).sum()) for name in names}
    if any(broken.values()):
        told = ", ".join(f"{name} in {count}" for name, count in broken.items() if count)
        found.append(
            (
                "WARNING",
                f"Not a finite number, of {metrics.length} iterations: {told}. Curves have gaps there.",
            )
        )
    invalid = metrics["invalid_share"]
    if metrics.has("invalid_share") and np.nanmax(invalid) > 0:
        text = (
            f"Some rewards could not be computed and were left out: "
            f"{percent(float(np.nanmean(invalid)))} of all samples, at worst "
            f"{percent(float(np.nanmax(invalid)))} in one iteration."
        )
        found.append(("Note", text))
    silent = metrics["silent_groups"]
    if metrics.has("silent_groups") and (count := int((silent == 1).sum())):
        text = (
            f"In {count} of {metrics.length} iterations no group taught anything: within each all rewards were equal, "
            "or missing."
        )
        found.append(("WARNING", text))
    found += _held_out_remarks(run)
    base, tuned = run.final.get("base"), run.final.get("tuned")
    done = int(metrics["iteration"].max())
    if tuned and tuned.iteration is not None and tuned.iteration != done:
        text = (
            f"Before and after are of iteration {tuned.iteration}; training has gone on to {done} since. Once it has "
            "ended, customized-grpo evaluate compares again."
        )
        found.append(("WARNING", text))
    if base and tuned and base.records.keys() != tuned.records.keys():
        both = len(base.records.keys() & tuned.records.keys())
        text = (
            f"Base ({len(base.records)} pairs) and tuned ({len(tuned.records)} pairs) were evaluated on "
            f"different pairs; differences use the {both} they share."
        )
        found.append(("Note", text))
    return found


def _held_out_remarks(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what validations and clipping show that rewards do not, as (WARNING, text)."""
    for first, last in run.over_optimized:
        text = (
            f"Over-optimized from iteration {first} to {last}: training rewards rose, and the held-out gain was "
            "significantly below its best. The curves mark it; keep the best adapter."
        )
        yield "WARNING", text
    checks = run.evaluations
    texture = checks["texture"]
    if checks.has("texture") and not 0.8 <= (final := float(texture[np.isfinite(texture)][-1])) <= 1.25:
        what = "dots, noise or ringing" if final > 1 else "blur"
        yield (
            "WARNING",
            f"The last validation's images had {final:.2f} times the base's texture: {what}.",
        )
    spread = checks["diversity"]
    if checks.has("diversity") and spread[-1] < spread[0] / 2:
        text = (
            f"Images of one prompt differ less than half as much as the base's: {spread[-1]:.3f}, and {spread[0]:.3f}."
        )
        yield "WARNING", text
    for name in ("copied", "copy"):
        if checks.has(name) and checks[name][-1] > checks[name][0]:
            values = [metric_value(run.info(name), float(checks[name][place])) for place in (-1, 0)]
            text = f"The {run.info(name).label} of the last validation, {values[0]}, is above the base's, {values[1]}."
            yield "Note", text
            break
    clipped = run.metrics["clip_fraction"]
    if run.metrics.has("clip_fraction") and (count := int((clipped == 1).sum())):
        text = f"In {count} of {run.metrics.length} iterations every ratio was clipped: the learning rate is too high."
        yield "WARNING", text


def timing(metrics: Columns) -> list[dict[str, Any]]:
    """Return seconds by phase: total, per iteration, share of the whole; `other` is what no phase accounts for."""
    total = metrics["seconds/total"]
    phases = {name: metrics[f"seconds/{name}"] for name in ("rollout", "score", "update")}
    if not np.isfinite(total).any() or not np.nansum(total) > 0:
        return []
    phases["other"] = np.maximum(total - sum(np.nan_to_num(p) for p in phases.values()), 0.0)
    return [
        {
            "name": name,
            "total": float(np.nansum(seconds)),
            "mean": float(np.nansum(seconds)) / int(np.isfinite(total).sum()),
            "share": float(np.nansum(seconds) / np.nansum(total)),
        }
        for name, seconds in phases.items()
    ]


def gallery(run: Run) -> list[dict[str, Any]]:
    """Return the first pairs of the final evaluation that have pictures, in their order: nothing is selected."""
    folder = run.folder / "evaluation" / "images"
    sides = {name: side.records for name, side in run.sides.items()}
    ordered = sides.get(run.kept or "base") or {}
    cards: list[dict[str, Any]] = []
    for key, record in ordered.items():
        if len(cards) == GALLERY_SIZE:
            break
        shots = [(name, data_uri(folder / f"{key}_{name}.png", folder)) for name in ("reference", *sides)]
        if not any(uri for _, uri in shots):
            continue
        pictures = [{"name": name, "uri": uri, **_verdict(run, sides.get(name, {}).get(key))} for name, uri in shots]
        cards.append(
            {
                "id": key,
                "prompt": record.get("prompt", ""),
                "subject": record.get("subject") or "",
                "pictures": pictures,
            }
        )
    return cards


def _verdict(run: Run, record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a line for each reward of a picture, with the verdict of an oracle where one is of the same."""
    record = record or {}
    verdicts = {"prompt": record.get("prompt_satisfied"), "identity": record.get("identity_kept")}
    scores = [run.info(name) for name in record if name.startswith(REWARD_PREFIX)]
    lines = [
        {
            "hue": info.hue,
            "label": info.name.removeprefix(REWARD_PREFIX),
            "passed": verdicts.pop(info.hue, None),
            "score": record[info.name],
        }
        for info in scores
    ]
    lines += [{"hue": hue, "label": hue, "passed": p, "score": None} for hue, p in verdicts.items() if p is not None]
    lines = [line for line in lines if line["passed"] is not None or line["score"] is not None]
    return {"lines": lines, "joint": bool(record.get("joint_success"))}


def validation_gallery(folder: Path) -> dict[str, str] | None:
    pictures = sorted((folder / "galleries").glob("*.png"))
    if not pictures:
        return None
    return {
        "iteration": pictures[-1].stem.lstrip("0") or "0",
        "uri": data_uri(pictures[-1], folder, limit=1600),
    }
