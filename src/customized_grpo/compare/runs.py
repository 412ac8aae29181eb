"""The runs of a grid, and what finished ones came to, read from their folders."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from customized_grpo.compare.results import BEST_ITERATION, BEST_PREFIX, PERIOD_SHARE, PERIODS, SIGNALS, Result
from customized_grpo.config.presets import BASE
from customized_grpo.errors import UserError
from customized_grpo.io.jsonl import is_number, read_lines
from customized_grpo.report.records import Columns, to_columns
from customized_grpo.tracking.metric_info import is_metric, overview
from customized_grpo.training.run_dir import BEST, best_iteration

TUNED = "tuned"
"""The last adapter of a run, in the names of its evaluations."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid. `setting` names the overrides crossed with the presets, "" if there is only one."""

    setting: str
    preset: str
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        return all((self.folder / name).is_file() for name in ("evaluation/tuned.json", "report.html"))


def read_results(cells: Sequence[Cell]) -> list[Result]:
    """Read the results of the finished cells, by setting, preset (both in the order of `cells`) and seed.

    The untrained policy comes first, as the preset "base", once per setting and seed: any run holds its evaluation.
    Raises UserError if a file is missing or broken, or if runs of a setting were evaluated on different samples: every
    preset must see the same ones for differences of means to be paired.
    """
    settings, presets = (list(dict.fromkeys(getattr(cell, key) for cell in cells)) for key in ("setting", "preset"))
    found: dict[tuple[int, int, int], Result] = {}
    first: dict[str, tuple[Cell, tuple[str, ...]]] = {}
    for cell in cells:
        if not cell.finished:
            continue
        place = settings.index(cell.setting)
        for side in (TUNED, BASE):
            evaluation = read_evaluation(cell.folder, side)
            ids = tuple(str(record["id"]) for record in evaluation["records"])
            _check_pairs(cell, ids, *first.setdefault(cell.setting, (cell, ids)))
            means = {"pairs": float(len(ids)), **_evaluated(evaluation)}
            if side == BASE:
                base = Result(cell.setting, BASE, cell.seed, means, {})
                found.setdefault((place, -1, cell.seed), base)
            else:
                values = means | _training_values(cell) | _best_values(cell.folder)
                result = Result(cell.setting, cell.preset, cell.seed, values, _curve(cell))
                found[place, presets.index(cell.preset), cell.seed] = result
    return [found[key] for key in sorted(found)]


def read_records(folder: Path, side: str) -> dict[str, dict[str, Any]]:
    """Return the records of a run's final evaluation by id, in order; see `read_evaluation`."""
    return {str(record["id"]): dict(record) for record in read_evaluation(folder, side)["records"]}


def read_evaluation(folder: Path, side: str) -> dict[str, Any]:
    """Read a run's final evaluation; `side` is "base", "best" or "tuned". UserError if unreadable."""
    path = folder / "evaluation" / f"{side}.json"
    remedy = f"write it again with `customized-grpo evaluate --run {folder}`"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = [record["id"] for record in content["records"]]
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {remedy}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected an object with 'records', each with an 'id' ({error}); {remedy}") from error
    if not found:
        raise UserError(f"{path}: no pair in 'records'; {remedy}")
    return content


def _best_values(folder: Path) -> dict[str, float]:
    """Return the iteration of the best validation, and what its adapter came to; nothing if the run kept none."""
    iteration = best_iteration(folder)
    if iteration is None:
        return {}
    means = _evaluated(read_evaluation(folder, BEST if iteration else BASE))  # at 0 the best was the start
    return {BEST_ITERATION: float(iteration)} | {f"{BEST_PREFIX}{name}": mean for name, mean in means.items()}


def _training_values(cell: Cell) -> dict[str, float]:
    rows = read_lines(cell.folder / "metrics.jsonl")
    if not rows:
        raise UserError(
            f"{cell.folder / 'metrics.jsonl'}: no training iteration in a finished run; delete the folder and run the "
            "comparison again"
        )
    share = max(1, round(PERIOD_SHARE * len(rows)))
    values = {"iterations": float(rows[-1]["iteration"])}
    for period, part in zip(PERIODS, (rows[:share], rows[-share:], rows), strict=True):
        columns = to_columns(part)
        shares = _means(columns, (*(f"quadrant/{name}" for name in SIGNALS), "conflict_rate"))
        values |= {f"{period}/{name.removeprefix('quadrant/')}": value for name, value in shares.items()}
        if period == "overall":
            values |= {name: shares[name] for name in ("conflict_rate",) if name in shares}
            seconds = columns["seconds/total"]
            values |= {"seconds": float(np.nansum(seconds))} if columns.has("seconds/total") else {}
    return values


def _curve(cell: Cell) -> dict[str, dict[int, float]]:
    columns = to_columns(read_lines(cell.folder / "evaluations.jsonl"))
    steps = columns["iteration"].astype(int)
    names = [info.name for info in overview(filter(is_metric, columns.values))]
    return {
        name: {
            int(step): float(value) for step, value in zip(steps, columns[name], strict=True) if math.isfinite(value)
        }
        for name in names
        if columns.has(name)
    }


def _evaluated(evaluation: dict[str, Any]) -> dict[str, float]:
    """Return the mean of each metric over the records of an evaluation, and the figures of the whole that it states."""
    columns = to_columns(evaluation["records"])
    means = _means(columns, [info.name for info in overview(filter(is_metric, columns.values))])
    stated = {name: row.get("mean") for name, row in evaluation.get("summary", {}).items() if is_metric(name)}
    whole = [info.name for info in overview(stated) if info.name not in columns.values]
    return means | {name: float(stated[name]) for name in whole if is_number(stated[name])}


def _means(columns: Columns, names: Sequence[str]) -> dict[str, float]:
    return {name: float(np.nanmean(columns[name])) for name in names if columns.has(name)}


def _check_pairs(cell: Cell, ids: tuple[str, ...], first: Cell, expected: tuple[str, ...]) -> None:
    if ids == expected:
        return
    other = next((id for id in (*ids, *expected) if (id in ids) != (id in expected)), "the order")
    raise UserError(
        f"{cell.folder}: evaluated on other pairs than {first.folder} ({len(ids)} and {len(expected)}; they differ in "
        f"{other}), so the two cannot be compared. Evaluate both on the same data (`customized-grpo evaluate --run "
        f"{cell.folder} --data FOLDER --num_samples {len(expected)}`), or delete the folder and run the comparison "
        "again"
    )
