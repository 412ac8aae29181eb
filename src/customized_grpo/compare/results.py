"""The numbers of a grid of runs: read from the run folders, or from the comparison.csv that was made of them."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from customized_grpo.config.presets import BASE, BASELINE
from customized_grpo.errors import UserError
from customized_grpo.evaluation.statistics import Interval, t_interval
from customized_grpo.io.files import replacing
from customized_grpo.io.jsonl import read_lines
from customized_grpo.report.records import Columns, to_columns
from customized_grpo.tracking.metric_info import in_order, is_metric, overview

METRICS = (
    "prompt_satisfied", "identity_kept", "joint_success", "copied", "reward/prompt", "reward/identity", "conflict_rate",
    "seconds",
)  # fmt: skip
"""Metrics with a column in every comparison.csv; another metric of `metric_info` has one where a run measured it."""
SIGNALS = ("both_good", "only_prompt", "only_identity", "both_bad")
PERIODS = ("early", "late", "overall")
"""The first and the last fifth of the iterations, and all of them."""
PERIOD_SHARE = 0.2
VALUES = (
    "pairs",
    *METRICS,
    *(f"{period}/{name}" for period in PERIODS for name in (*SIGNALS, "conflict_rate")),
    "iterations",
)
KEYS = ("setting", "preset", "seed")
DIGITS = 6


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


@dataclass(frozen=True)
class Result:
    """What one run came to. A value that the run does not have is absent.

    `values`: by name in `VALUES`; metrics are means over the pairs of the final evaluation. `curve`: validation
    metrics by name and iteration.
    """

    setting: str
    preset: str
    seed: int
    values: Mapping[str, float]
    curve: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Row:
    """A preset in one setting, over its `seeds`. Intervals are (mean, low, high), bounds NaN for a single seed.

    `differences`: to the reference preset over the `shared` seeds, seed by seed; a metric that fewer than two seeds
    of both have is absent.
    """

    setting: str
    preset: str
    seeds: tuple[int, ...]
    means: Mapping[str, Interval]
    shared: tuple[int, ...]
    differences: Mapping[str, Interval]


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
        for side in ("tuned", BASE):
            records = read_records(cell.folder, side)
            ids = tuple(records)
            _check_pairs(cell, ids, *first.setdefault(cell.setting, (cell, ids)))
            means = {"pairs": float(len(ids)), **_evaluated(list(records.values()))}
            if side == BASE:
                base = Result(cell.setting, BASE, cell.seed, means, {})
                found.setdefault((place, -1, cell.seed), base)
            else:
                values = means | _training_values(cell)
                result = Result(cell.setting, cell.preset, cell.seed, values, _curve(cell))
                found[place, presets.index(cell.preset), cell.seed] = result
    return [found[key] for key in sorted(found)]


def read_records(folder: Path, side: str) -> dict[str, dict[str, Any]]:
    """Read the records of a run's final evaluation by id, in order; `side` is "base" or "tuned". UserError if
    unreadable."""
    path = folder / "evaluation" / f"{side}.json"
    remedy = f"write it again with `customized-grpo evaluate --run {folder}`"
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        found = {str(record["id"]): dict(record) for record in records}
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {remedy}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected an object with 'records', each with an 'id' ({error}); {remedy}") from error
    if not found:
        raise UserError(f"{path}: no pair in 'records'; {remedy}")
    return found


def presets_in(results: Sequence[Result], order: Sequence[str] | None = None) -> list[str]:
    """Return the presets that have results: base, then as in `order`, then the others as they come."""
    known = dict.fromkeys(result.preset for result in results)
    return [name for name in dict.fromkeys((BASE, *(order or ()), *known)) if name in known]


def settings_in(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.setting for result in results))


def measured(results: Iterable[Result]) -> list[str]:
    """Return the metrics that any of the results has a value of, in the order in which they are shown."""
    return [info.name for info in overview(name for result in results for name in result.values if is_metric(name))]


def select(results: Sequence[Result], setting: str, preset: str) -> dict[int, Result]:
    """Return the results of a preset in a setting, by seed."""
    return {r.seed: r for r in sorted(results, key=lambda r: r.seed) if (r.setting, r.preset) == (setting, preset)}


def summarise(results: Sequence[Result], reference: str = BASELINE, order: Sequence[str] | None = None) -> list[Row]:
    """Return a row per setting and preset that has results; presets as in `presets_in`.

    A seed is one observation: means and 95 % Student's t intervals are over seeds, those of the differences over
    the seeds that preset and reference share.
    """
    rows, metrics = [], measured(results)
    for setting in settings_in(results):
        against = select(results, setting, reference)
        for preset in presets_in(results, order):
            own = select(results, setting, preset)
            if not own:
                continue
            means = {name: t_interval(values) for name in metrics if (values := _of(own.values(), name))}
            shared = tuple(seed for seed in own if seed in against and preset != reference)
            differences = {}
            for name in metrics:
                both = [(own[seed].values.get(name), against[seed].values.get(name)) for seed in shared]
                gaps = [a - b for a, b in both if a is not None and b is not None]
                if len(gaps) >= 2:
                    differences[name] = t_interval(gaps)
            rows.append(Row(setting, preset, tuple(own), means, shared, differences))
    return rows


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write one row per result, floats to six digits: tables and figures can be drawn from this file alone.

    Columns: setting, preset, seed, `VALUES`, further metrics, then validations as `curve/METRIC@ITERATION`. Unknown is
    empty.
    """
    further = [name for name in measured(results) if name not in VALUES]
    points = {(name, step) for result in results for name, curve in result.curve.items() for step in curve}
    order = [info.name for info in in_order(name for name, _ in sorted(points))]
    curves = sorted(points, key=lambda point: (order.index(point[0]), point[1]))
    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEYS, *VALUES, *further, *(f"curve/{name}@{step}" for name, step in curves)])
        for result in results:
            numbers = [result.values.get(name) for name in (*VALUES, *further)]
            numbers += [result.curve.get(name, {}).get(step) for name, step in curves]
            writer.writerow([result.setting, result.preset, result.seed, *map(_number, numbers)])


def read_csv(path: Path) -> list[Result]:
    """Return the results that `write_csv` wrote. Raises UserError naming file, line and column of what is not one."""
    remedy = "expected the comparison.csv that `customized-grpo compare` writes"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header, lines = list(reader.fieldnames or ()), list(reader)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {remedy}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as CSV ({error}); {remedy}") from error
    if missing := [name for name in KEYS if name not in header]:
        raise UserError(f"{path}: no column {', '.join(missing)}; {remedy}")
    points = {name: _point(path, name) for name in header if name not in (*KEYS, *VALUES) and not is_metric(name)}
    results = []
    for number, line in enumerate(lines, start=2):
        values: dict[str, float] = {}
        curve: dict[str, dict[int, float]] = {}
        for column, text in line.items():
            if column in KEYS or text == "":
                continue
            value = _parsed(path, number, column, text, remedy)
            if column in points:
                metric, step = points[column]
                curve.setdefault(metric, {})[step] = value
            else:
                values[column] = value
        seed = _parsed(path, number, "seed", line["seed"], remedy)
        if seed != int(seed):
            raise UserError(f"{path}:{number}: seed is {line['seed']!r}, expected a whole number; {remedy}")
        results.append(Result(line["setting"], line["preset"], int(seed), values, curve))
    return results


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


def _evaluated(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each metric over the records of an evaluation."""
    columns = to_columns(records)
    return _means(columns, [info.name for info in overview(filter(is_metric, columns.values))])


def _means(columns: Columns, names: Sequence[str]) -> dict[str, float]:
    return {name: float(np.nanmean(columns[name])) for name in names if columns.has(name)}


def _of(results: Iterable[Result], name: str) -> list[float]:
    return [result.values[name] for result in results if name in result.values]


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


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    text = f"{value:.{DIGITS}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _point(path: Path, column: str) -> tuple[str, int]:
    metric, _, step = column.removeprefix("curve/").partition("@")
    if not column.startswith("curve/") or not is_metric(metric) or not step.isdecimal():
        raise UserError(f"{path}: unknown column {column!r}; expected a value's name or curve/METRIC@ITERATION")
    return metric, int(step)


def _parsed(path: Path, number: int, column: str, text: str | None, remedy: str) -> float:
    try:
        value = float(text or "")
    except (ValueError, TypeError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}:{number}: {column} is {text!r}, expected a number; {remedy}")
    return value
