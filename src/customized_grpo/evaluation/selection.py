"""The best validation of a run, when to stop, and where a run was over-optimized: all read off evaluations.jsonl.

Nothing here remembers: a run that is resumed anywhere finds the same best and stops at the same iteration.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from customized_grpo.io.jsonl import is_number
from customized_grpo.tracking.metric_info import metric_info

Row = Mapping[str, Any]
"""A row of evaluations.jsonl: `iteration`, means by metric, flags. The row of iteration 0 is the base."""
OVER_OPTIMIZED = "over_optimized"
"""Flag of a row: training rewards rose, and the held-out gain has fallen significantly since its best."""


def better(name: str, a: float, b: float) -> bool:
    """Return whether the value `a` of the metric `name` is better than `b`; equal values are not."""
    return a > b if metric_info(name).higher_is_better else a < b


def best_row(rows: Sequence[Row], name: str) -> Row | None:
    """Return the row with the best value of the metric `name`, of equal ones the earliest; None if no row has a value.

    The base counts too: a run that is never better than its base has its best at iteration 0. Flags (true, false) and
    numbers that are not finite are no values.
    """
    best = None
    for row in _with_value(rows, name):
        if best is None or better(name, row[name], best[name]):
            best = row
    return best


def validations_since_best(rows: Sequence[Row], name: str) -> int:
    """Return how many validations followed the best one; 0 if no row has a value of the metric `name`.

    A row without a value counts as no validation: it shows neither better nor worse.
    """
    rows = _with_value(rows, name)
    best = best_row(rows, name)
    return 0 if best is None else sum(row["iteration"] > best["iteration"] for row in rows)


def should_stop(rows: Sequence[Row], name: str, patience: int | None) -> bool:
    """Return whether `patience` validations in a row were not better than the best one; None or 0: never."""
    return patience is not None and 0 < patience <= validations_since_best(rows, name)


def over_optimized(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return the first and the last iteration of each stretch of consecutive rows that are flagged as over-optimized.

    A single flagged row is a stretch of one iteration.
    """
    stretches = []
    for flagged, members in groupby(rows, key=lambda row: bool(row.get(OVER_OPTIMIZED))):
        iterations = [row["iteration"] for row in members]
        if flagged:
            stretches.append((iterations[0], iterations[-1]))
    return stretches


def _with_value(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if is_number(row.get(name))]
