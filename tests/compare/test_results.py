import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_grpo.compare.results import Result, presets_in, summarise
from customized_grpo.compare.runs import Cell

MakeGrid = Callable[..., list[Cell]]
T_975 = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445}
"""From a printed table of Student's t, by degrees of freedom."""


def result(preset: str, seed: int, joint: float | None, setting: str = "") -> Result:
    return Result(setting, preset, seed, {} if joint is None else {"joint_success": joint}, {})


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5))
def test_means_and_intervals_are_over_seeds(values: list[float]) -> None:
    (row,) = summarise([result("sars", seed, value) for seed, value in enumerate(values)])
    n, mean = len(values), sum(values) / len(values)
    half = T_975[n - 1] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    assert row.means["joint_success"] == pytest.approx((mean, mean - half, mean + half), abs=1e-5)
    assert row.seeds == tuple(range(n)) and row.differences == {}


def test_differences_pair_the_seeds_that_both_have() -> None:
    results = [result("naive-1:1", seed, value) for seed, value in ((0, 0.2), (1, 0.6), (2, 0.3))]
    results += [result("customized", seed, value) for seed, value in ((1, 0.7), (2, 0.5), (3, 0.9))]
    row = next(row for row in summarise(results) if row.preset == "customized")
    mean, half = 0.15, T_975[1] * 0.05
    assert row.shared == (1, 2)
    assert row.differences["joint_success"] == pytest.approx((mean, mean - half, mean + half), abs=1e-6)
    assert row.means["joint_success"][0] == pytest.approx(0.7)


@pytest.mark.parametrize("others", [[(0, 0.5)], [(0, 0.5), (7, 0.5)], [(0, 0.5), (1, None)]])
def test_one_shared_seed_gives_no_difference(others: list[tuple[int, float | None]]) -> None:
    results = [result("naive-1:1", seed, 0.4) for seed in range(3)]
    results += [result("customized", seed, value) for seed, value in others]
    assert summarise(results)[-1].differences == {}


def test_one_seed_gives_no_interval_and_zeros_and_ones_no_wilson_interval() -> None:
    alone, shares = summarise([result("min", 0, 0.5), *(result("max", seed, float(seed)) for seed in (0, 1))])
    assert alone.means["joint_success"][0] == 0.5 and all(map(math.isnan, alone.means["joint_success"][1:]))
    assert shares.means["joint_success"][1] == pytest.approx(0.5 - T_975[1] * 0.5, abs=1e-5)


def test_differences_stay_within_a_setting() -> None:
    results = [result("naive-1:1", seed, 0.4, "a") for seed in range(2)]
    results += [result("customized", seed, 0.5, "b") for seed in range(2)]
    assert [(row.setting, row.preset, row.differences) for row in summarise(results)] == [
        ("a", "naive-1:1", {}),
        ("b", "customized", {}),
    ]


def test_presets_follow_the_order_asked_for() -> None:
    results = [result(name, 0, 0.1) for name in ("zeta", "max", "base", "min")]
    assert presets_in(results) == ["base", "zeta", "max", "min"]
    assert presets_in(results, ["min", "absent", "max"]) == ["base", "min", "max", "zeta"]
    assert [row.preset for row in summarise(results, order=["min"])] == ["base", "min", "zeta", "max"]
