"""Rows of validations against the base: closed forms, and when a run counts as over-optimized."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from customized_grpo.data import Sample
from customized_grpo.evaluation.against_base import AgainstBase, is_over_optimized
from customized_grpo.evaluation.evaluator import Evaluation
from customized_grpo.tracking.metric_info import metric_info

HELD_OUT, TRAINED = ("clip_i", "copied"), ("reward/prompt",)


def evaluation(pairs: int = 8, **metrics: Tensor) -> Evaluation:
    samples = [Sample(f"{place}", "a moon", ()) for place in range(pairs)]
    values = {name.replace("__", "/"): value for name, value in metrics.items() if name != "roughness"}
    return Evaluation(
        samples, [], torch.zeros(pairs, 3, 4, 4), values, [metric_info(name) for name in values],
        roughness=metrics.get("roughness", torch.full((pairs,), 0.2)),
    )  # fmt: skip


def base() -> Evaluation:
    spread = torch.tensor([0.0, 1.0] * 4)
    return evaluation(clip_i=spread, copied=spread.flip(0), reward__prompt=2 * spread)


def test_a_row_of_the_base_gains_nothing() -> None:
    row = AgainstBase(base(), HELD_OUT, TRAINED).row(0, base(), [])
    assert (row["iteration"], row["pairs"], row["texture"]) == (0, 8, 1.0)
    assert row["held_out_gain"] == row["reward_gain"] == 0 and row["gains"] == [0.0] * 8
    assert row["over_optimized"] is False and row["clip_i"] == 0.5


def test_a_row_is_the_mean_gain_in_the_better_direction() -> None:
    unit = float(base().metrics["clip_i"].double().std())
    shift = torch.tensor([0.1, 0.3] * 4)
    tuned = evaluation(
        clip_i=base().metrics["clip_i"] + shift, copied=base().metrics["copied"] - 2 * shift,
        reward__prompt=base().metrics["reward/prompt"] + 1, roughness=torch.full((8,), 0.25),
    )  # fmt: skip
    row = AgainstBase(base(), HELD_OUT, TRAINED).row(7, tuned, [])
    assert row["held_out_gain"] == pytest.approx(0.2 * 1.5 / unit, rel=1e-5)
    assert row["gains"] == pytest.approx([1.5 * s / unit for s in shift.tolist()], rel=1e-5)
    assert row["reward_gain"] == pytest.approx(1 / (2 * unit), rel=1e-5) and row["texture"] == pytest.approx(1.25)
    low, high = row["intervals"]["held_out_gain"]
    assert low < row["held_out_gain"] < high
    assert row["intervals"]["texture"] == pytest.approx([1.25, 1.25])


def test_without_held_out_figures_there_is_no_gain() -> None:
    row = AgainstBase(base(), (), TRAINED).row(1, base(), [])
    assert "held_out_gain" not in row and "gains" not in row and "over_optimized" not in row
    assert row["texture"] == 1.0


def test_values_that_are_missing_are_null() -> None:
    tuned = evaluation(clip_i=torch.full((8,), math.nan), reward__prompt=torch.zeros(8))
    row = AgainstBase(base(), ("clip_i",), TRAINED).row(1, tuned, [])
    assert row["gains"] == [None] * 8 and row["held_out_gain"] is None


def row_of(iteration: int, gain: float, reward: float, spread: float = 0.1) -> dict[str, Any]:
    gains = [gain + spread, gain - spread] * 8
    return {"iteration": iteration, "held_out_gain": gain, "reward_gain": reward, "gains": gains}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (row_of(30, 0.1, 0.9), True),
        (row_of(30, 0.1, 0.3), False),  # rewards fell too
        (row_of(30, 0.5, 0.9), False),  # no worse than the best
        (row_of(30, 0.49, 0.9) | {"gains": [1.0, -0.02] * 8}, False),  # lower, but not significantly
        (row_of(30, 0.1, 0.9) | {"gains": [None] * 16}, False),
        (row_of(30, 0.1, 0.9) | {"reward_gain": None}, False),
    ],
)
def test_over_optimized_is_rewards_up_and_the_gain_significantly_down(now: dict[str, Any], expected: bool) -> None:
    before = [row_of(0, 0.0, 0.0), row_of(10, 0.5, 0.4), row_of(20, 0.45, 0.6)]
    assert is_over_optimized(now, before) is expected


def test_the_first_validation_is_not_over_optimized() -> None:
    assert not is_over_optimized(row_of(0, 0.0, 0.0), [])


def test_copying_more_than_the_base_is_found_by_pairs() -> None:
    against = AgainstBase(evaluation(copied=torch.zeros(8)), (), ())
    assert against.copies_more(evaluation(copied=torch.zeros(8))) is None
    assert against.copies_more(evaluation(copied=torch.tensor([1.0] + [0.0] * 7))) is None
    assert against.copies_more(evaluation(copied=torch.tensor([1.0] * 6 + [0.0] * 2))) == "copied"
    meter = AgainstBase(evaluation(copy=torch.linspace(0, 0.1, 8)), (), ())
    assert meter.copies_more(evaluation(copy=torch.linspace(0.2, 0.3, 8))) == "copy"
    assert meter.copies_more(evaluation(copy=torch.linspace(-0.2, 0.0, 8))) is None
