"""The model card of an exported adapter: what it is, how good on what it never saw, how to draw with it, and how it was
trained. No path of a machine is in it."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from customized_grpo.config.run import flatten
from customized_grpo.evaluation.statistics import Interval
from customized_grpo.io.files import write_whole, writing
from customized_grpo.io.hub import HUB_ID
from customized_grpo.report.formats import metric_value
from customized_grpo.report.records import Run, read_run
from customized_grpo.tracking.metric_info import MetricInfo

CARD = "README.md"
PICTURES = "images"
"""Folder of the card's pictures beside it."""
SHOWN = 4
"""Samples in the card's gallery."""
TEMPLATE = "card.md.j2"


@dataclass(frozen=True)
class Exported:
    """Which weights of a run are in an exported folder: after `iteration`, `averaged` or not, and whether those of the
    best validation."""

    iteration: int
    averaged: bool
    best: bool
    checkpoint: bool
    """From a checkpoint, whose images and test figures nobody has."""


def write_card(run_folder: Path, out: Path, what: Exported, config: Mapping[str, Any], base_model: str | None) -> Path:
    """Write the card of the adapter in `out`, which was exported from the run in `run_folder`; returns its path.

    `config`: the run's. `base_model`: hub id or path of the model that the adapter belongs to, None for ToyBox. Raises
    `UserError` where a file of the run is broken.
    """
    merged = config["policy"]["pipeline"]["base_adapter"]
    run = read_run(run_folder) if (run_folder / "metrics.jsonl").is_file() else None  # not beside an exported adapter
    side = None if run is None else _side(run, what)
    content = {
        "name": run_folder.resolve().name,
        "base_model": base_model if base_model and HUB_ID.fullmatch(base_model) else None,
        "merged": merged if merged is None or not Path(merged).exists() else Path(merged).name,
        "what": what,
        "settings": flatten(dict(config)),
        "figures": [] if run is None else _final_figures(run, side) if side else _validation_figures(run, what),
        "num_samples": len(run.final[side].records) if run and side else None,
        "pictures": _copy_pictures(run, side, out) if run and side else [],
        "rewards": _rewards(config["rewards"]),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    with writing(out):
        write_whole(out / CARD, environment.get_template(TEMPLATE).render(content))
    return out / CARD


def _side(run: Run, what: Exported) -> str | None:
    """Return the final evaluation of the exported weights; None where they were not evaluated at the end."""
    if what.checkpoint:
        return None
    if what.best:
        best = "best" if "best" in run.final else "tuned"
        return best if best in run.final and run.final[best].iteration == what.iteration else None
    return "tuned" if "tuned" in run.final and what.averaged == _evaluates_average(run) else None


def _evaluates_average(run: Run) -> bool:
    return run.settings.get("ema.decay") is not None and run.settings.get("ema.evaluate") is not False


def _final_figures(run: Run, side: str) -> list[tuple[str, str, str]]:
    """Return the label of each figure, its value for the base, and for the exported adapter with its interval."""
    base, own = run.final["base"], run.final[side]
    return [
        (info.heading, _value(info, base.intervals.get(info.name)), _value(info, own.intervals[info.name]))
        for info in run.metrics_in(own.intervals)
    ]


def _validation_figures(run: Run, what: Exported) -> list[tuple[str, str, str]]:
    """Return the same from the validations, without intervals; nothing where none was made of these weights."""
    rows = {row["iteration"]: row for row in run.validations}
    of_these = what.best or what.averaged == _evaluates_average(run)
    if not {0, what.iteration} <= rows.keys() or not of_these:
        return []
    return [
        (info.heading, metric_value(info, rows[0][info.name]), metric_value(info, rows[what.iteration][info.name]))
        for info in run.metrics_in(_measured(rows[0]))
    ]


def _measured(row: Mapping[str, Any]) -> Iterable[str]:
    return (name for name, value in row.items() if isinstance(value, float))


def _value(info: MetricInfo, interval: Interval | None) -> str:
    if interval is None:
        return "\u2013"
    mean, low, high = (metric_value(info, number) for number in interval)
    return mean if low == high else f"{mean} ({low} to {high})"


def _copy_pictures(run: Run, side: str, out: Path) -> list[tuple[str, str, str, str]]:
    """Copy the pictures of the first samples beside the card; return each prompt and its three pictures."""
    source, found = run.folder / "evaluation" / "images", []
    for number, (sample, record) in enumerate(list(run.final[side].records.items())[:SHOWN]):
        names = [f"{sample}_{name}.png" for name in ("reference", "base", side)]
        if not all((source / name).is_file() for name in names):
            continue
        with writing(out):
            (out / PICTURES).mkdir(exist_ok=True)
            reference, base, tuned = (f"{PICTURES}/{number}_{name}.png" for name in ("reference", "base", "tuned"))
            for name, copy in zip(names, (reference, base, tuned), strict=True):
                shutil.copyfile(source / name, out / copy)
        found.append((str(record.get("prompt", "")).replace("|", r"\|"), reference, base, tuned))
    return found


def _rewards(rewards: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the name of each reward, its kind, and how it takes part."""
    found = []
    for name, reward in rewards.items():
        bounds = [
            f"{key.replace('_', ' ')} {reward[key]:g}" for key in ("at_least", "at_most") if reward[key] is not None
        ]
        part = f"{reward['schedule']} weight" if reward["role"] == "objective" else f"constraint, {', '.join(bounds)}"
        found.append((name, reward["kind"], part))
    return found
