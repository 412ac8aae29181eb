"""The table of a comparison: a row for each result. Tables and figures can be drawn from it alone."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from customized_grpo.compare.results import BEST_ITERATION, BEST_PREFIX, VALUES, Result, measured
from customized_grpo.compare.runs import Cell
from customized_grpo.config.presets import BASE
from customized_grpo.errors import UserError
from customized_grpo.io.files import replacing
from customized_grpo.tracking.metric_info import in_order, is_metric

KEYS = ("setting", "preset", "seed")
DIGITS = 6


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write one row per result, floats to six digits.

    Columns: setting, preset, seed, `VALUES`, further metrics, the best adapter's iteration and metrics as
    `best/METRIC`, then validations as `curve/METRIC@ITERATION`. Unknown is empty.
    """
    further = [name for name in measured(results) if name not in VALUES]
    best = {name for result in results for name in result.values if _of_best(name)}
    further += sorted(best, key=lambda name: (name != BEST_ITERATION, name))
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
    points = {
        name: _point(path, name)
        for name in header
        if name not in (*KEYS, *VALUES) and not is_metric(name) and not _of_best(name)
    }
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


def merged(
    kept: Sequence[Result], found: Sequence[Result], settings: Sequence[str], presets: Sequence[str]
) -> list[Result]:
    """Return the results of both, those `found` in place of those `kept` of the same run, in the order of names.

    Names that are not in `settings` or `presets` follow.
    """

    def place(result: Result) -> tuple[int, int, int]:
        orders = ((settings, result.setting), (presets, result.preset))
        one, other = (order.index(name) if name in order else len(order) for order, name in orders)
        return one, -1 if result.preset == BASE else other, result.seed

    return sorted({run_of(result): result for result in (*kept, *found)}.values(), key=place)


def run_of(one: Result | Cell) -> tuple[str, str, int]:
    """Return what tells a run from the others of its grid."""
    return one.setting, one.preset, one.seed


def _of_best(name: str) -> bool:
    return name == BEST_ITERATION or (name.startswith(BEST_PREFIX) and is_metric(name.removeprefix(BEST_PREFIX)))


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
