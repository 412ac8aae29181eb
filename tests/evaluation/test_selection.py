"""The best validation and the end of a run, as functions of the rows of evaluations.jsonl."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customized_grpo.evaluation.selection import (
    best_row,
    better,
    over_optimized,
    should_stop,
    validations_since_best,
)

GAIN, COPIED = "held_out_gain", "copied"
MISSING = (None, math.nan, math.inf, True, "0.9")
"""What is no value of a metric; `True` is not 1."""
VALUES = st.lists(st.one_of(st.integers(-3, 3), st.sampled_from(MISSING)), max_size=12)
NAMES = st.sampled_from([GAIN, COPIED])


def rows(values: list[Any], name: str = GAIN) -> list[dict[str, Any]]:
    """Return validations at iterations 0, 10, 20, ... with these values."""
    return [{"iteration": 10 * number, "pairs": 96, name: value} for number, value in enumerate(values)]


def worse(name: str, value: float) -> float:
    return value - 1 if better(name, 1, 0) else value + 1


def test_better_is_higher_or_lower_as_the_metric_has_it() -> None:
    assert better(GAIN, 0.2, 0.1) and not better(GAIN, 0.1, 0.2) and not better(GAIN, 0.1, 0.1)
    assert better(COPIED, 0.1, 0.2) and not better(COPIED, 0.2, 0.1) and not better(COPIED, 0.1, 0.1)


@pytest.mark.parametrize(("name", "iteration"), [(GAIN, 10), (COPIED, 30)])
def test_the_best_is_the_earliest_of_the_best_ones(name: str, iteration: int) -> None:
    found = best_row(rows([0.0, 0.3, 0.3, -0.1, -0.1], name), name)
    assert found is not None and found["iteration"] == iteration


def test_the_base_may_be_the_best() -> None:
    found = best_row(rows([0.0, -0.2, 0.0]), GAIN)
    assert found is not None and found["iteration"] == 0


@pytest.mark.parametrize("missing", MISSING)
def test_what_is_no_finite_number_is_no_value(missing: Any) -> None:
    log = rows([missing, 0.1, missing])
    found = best_row(log, GAIN)
    assert found is not None and found["iteration"] == 10 and validations_since_best(log, GAIN) == 0
    assert best_row(rows([missing]), GAIN) is None and best_row([{"iteration": 0}], GAIN) is None
    assert not should_stop(rows([missing] * 9), GAIN, 1)


def test_a_run_stops_after_so_many_validations_without_a_better_one() -> None:
    log = rows([0.0, 0.2, 0.1, None, 0.2, 0.19])
    assert [validations_since_best(log[:length], GAIN) for length in range(1, 7)] == [0, 0, 1, 1, 2, 3]
    assert [should_stop(log[:length], GAIN, 2) for length in range(1, 7)] == [False] * 4 + [True, True]
    assert not should_stop(log, GAIN, None) and not should_stop(log, GAIN, 0)
    assert not should_stop([], GAIN, 1)


@given(VALUES, NAMES, st.lists(st.integers(0, 3), max_size=5))
def test_worse_rows_leave_the_best_and_count(values: list[Any], name: str, drops: list[int]) -> None:
    log = rows(values, name)
    best = best_row(log, name)
    if best is None:
        return
    added = [worse(name, best[name]) if drop else best[name] for drop in drops]
    longer = rows([*values, *added], name)
    assert best_row(longer, name) == best
    assert validations_since_best(longer, name) == validations_since_best(log, name) + len(added)


@given(VALUES, NAMES)
def test_the_best_is_no_worse_than_any(values: list[Any], name: str) -> None:
    log = rows(values, name)
    best = best_row(log, name)
    known = [row for row in log if type(row[name]) is int]
    assert (best is None) == (not known)
    assert best is None or not any(better(name, row[name], best[name]) for row in known)


@given(VALUES, NAMES, st.integers(1, 6), st.integers(0, 6))
def test_less_patience_stops_no_later_and_only_a_better_row_goes_on(
    values: list[Any], name: str, patience: int, more: int
) -> None:
    log = rows(values, name)
    if not should_stop(log, name, patience + more):
        return
    assert should_stop(log, name, patience)
    best = best_row(log, name)
    assert best is not None
    for value, stops in ((best[name], True), (worse(name, best[name]), True), (-worse(name, -best[name]), False)):
        assert should_stop(rows([*values, value], name), name, patience) is stops


def test_consecutive_flags_are_one_region() -> None:
    flags = [None, False, True, True, False, True, None]
    log = [{"iteration": 5 * n} | ({} if flag is None else {"over_optimized": flag}) for n, flag in enumerate(flags)]
    assert over_optimized(log) == [(10, 15), (25, 25)]
    assert over_optimized(log[:3]) == [(10, 10)] and over_optimized([]) == [] == over_optimized(log[:2])


@given(st.lists(st.booleans(), max_size=20))
def test_regions_hold_the_flagged_rows_and_no_other(flags: list[bool]) -> None:
    log = [{"iteration": n, "over_optimized": flag} for n, flag in enumerate(flags)]
    regions = over_optimized(log)
    assert [any(first <= n <= last for first, last in regions) for n in range(len(flags))] == flags
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(regions))
