import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customized_grpo.compare.guard import Stopping, guards, missed_gain, stoppings
from customized_grpo.compare.results import Result


def run(seed: int, best: float, last: float, iteration: float = 20, setting: str = "", **values: float) -> Result:
    found = {"joint_success": last, "best/joint_success": best, "best_iteration": iteration, **values}
    return Result(setting, "customized", seed, found, {})


def validated(*gains: float) -> Result:
    return Result("", "sars", 0, {}, {"held_out_gain": {10 * place: gain for place, gain in enumerate(gains)}})


def test_best_and_last_are_paired_by_seed() -> None:
    runs = [run(0, 0.6, 0.5, 30), run(1, 0.7, 0.4, 10), Result("", "customized", 2, {"joint_success": 0.1}, {})]
    (row,) = guards([*runs, Result("", "base", 0, {"joint_success": 0.3}, {})], ["joint_success", "texture"])
    assert (row.setting, row.preset, row.iterations) == ("", "customized", (30, 10))
    assert row.best["joint_success"][0] == pytest.approx(0.65) and row.last["joint_success"][0] == pytest.approx(0.45)
    mean, low, high = row.differences["joint_success"]
    assert mean == pytest.approx(0.2) and low == pytest.approx(0.2 - 12.706205 * 0.1, abs=1e-5)
    assert high - mean == pytest.approx(mean - low) and "texture" not in row.best


def test_a_base_that_was_never_beaten_is_the_best() -> None:
    held_out = {"held_out_gain": -0.3, "texture": 1.2}
    beaten = run(0, 0.6, 0.5, **held_out, **{"best/held_out_gain": 0.2, "best/texture": 1.1})
    (row,) = guards([beaten, run(1, 0.3, 0.1, 0, **held_out)], ["joint_success", "texture", "held_out_gain"])
    assert row.iterations == (20, 0)
    assert row.best["held_out_gain"][0] == pytest.approx(0.1) and row.best["texture"][0] == pytest.approx(1.05)


def test_settings_have_rows_of_their_own_and_one_seed_has_no_interval() -> None:
    rows = guards([run(0, 0.6, 0.5, setting="a"), run(0, 0.6, 0.6, setting="b")], ["joint_success"])
    assert [row.setting for row in rows] == ["a", "b"]
    assert math.isnan(rows[0].differences["joint_success"][1])


@pytest.mark.parametrize(
    ("gains", "patience", "missed"),
    [
        ((0, 1, 0.5, 2), 1, 1.0),  # stops at 0.5, and 2 was to come
        ((0, 1, 0.5, 2), 2, None),
        ((0, 1, 0.5, 0.5), 1, 0.0),
        ((0, 1, 2, 3), 1, None),
        ((0, 1, 2, 1), 1, None),  # a stop at the end is none
        ((0, -1, -2, 3), 2, 3.0),  # the start counts as the best so far
    ],
)
def test_what_stopping_misses(gains: tuple[float, ...], patience: int, missed: float | None) -> None:
    assert missed_gain(validated(*gains).curve["held_out_gain"], patience) == missed


def test_the_better_direction_is_the_metrics() -> None:
    curve = {0: 0.3, 10: 0.2, 20: 0.25, 30: 0.1}
    assert missed_gain(curve, 1, "copied") == pytest.approx(0.1)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12), st.integers(1, 5))
def test_more_patience_never_misses_more(gains: list[float], patience: int) -> None:
    curve = validated(*gains).curve["held_out_gain"]
    early, late = missed_gain(curve, patience), missed_gain(curve, patience + 1)
    assert late is None or (early is not None and 0 <= late <= early)


def test_stoppings_are_over_all_runs_that_stop() -> None:
    found: list[Any] = stoppings([validated(0, 1, 0.5, 2), validated(0, 1, 0.5, 0.5), validated(0, 1, 2, 3)])
    assert found == [Stopping(1, 2, 1, 0.5)]
    assert stoppings([validated(0.0), run(0, 0.1, 0.2)]) == []
