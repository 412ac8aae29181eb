"""Which figures of an iteration or a validation are worth a warning."""

import re
from typing import Any

import pytest

from customized_grpo.training.warnings import STEADY, ClippingWatch, held_out_warnings, iteration_warnings

SOUND = {
    "iteration": 7, "first_ratio/min": 1.0, "first_ratio/max": 1.0, "invalid_share": 0.0, "silent_groups": 0.5,
}  # fmt: skip


def test_a_sound_iteration_has_none() -> None:
    assert list(iteration_warnings(SOUND, ["a reason", None])) == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("first_ratio/min", 0.9999, "first-pass ratio is 1.0e-04 away from 1"),
     ("invalid_share", 0.125, r"12.5% of the rewards could not be computed (a reason); they count in no group"),
     ("silent_groups", 1.0, "no group taught anything")],
)  # fmt: skip
def test_a_fault_is_named_with_its_iteration(field: str, value: float, said: str) -> None:
    (warning,) = iteration_warnings(SOUND | {field: value}, ["a reason", None])
    assert warning.startswith("iteration 7: ") and said in warning


def test_a_bound_that_many_break_before_training_is_told_once() -> None:
    first = SOUND | {
        "iteration": 1, "violated/rough": 0.23, "reward/rough/mean": 0.971, "reward/rough/std": 0.092,
        "violated/loose": 0.1, "reward/loose/mean": 0.5, "reward/loose/std": 0.1,
    }  # fmt: skip
    (warning,) = iteration_warnings(first, [None, None])
    assert "23% of the images break the bound of rewards.rough" in warning and "mean 0.971, 0.092 apart" in warning
    assert list(iteration_warnings(first | {"iteration": 2}, [None, None])) == []


BASE = {"iteration": 0, "diversity": 0.4, "texture": 1.0, "copied": 0.1}


def told(row: dict[str, Any], copies: str | None = None) -> dict[str, str]:
    rows = [BASE, {"iteration": 10} | row]
    return dict(held_out_warnings(rows[1], rows, copies))


def test_nothing_is_wrong() -> None:
    assert told({"texture": 1.1, "diversity": 0.3, "over_optimized": False}) == {}
    assert told({}) == {} and told({"texture": None, "diversity": None}) == {}


@pytest.mark.parametrize(
    ("texture", "words"), [(1.26, "1.26 times .* rougher"), (0.79, "0.79 times .* smoother: blur")]
)
def test_texture_beyond_its_range(texture: float, words: str) -> None:
    found = told({"texture": texture})
    assert list(found) == ["texture"]
    assert re.search(words, found["texture"]) and "validation after iteration 10" in found["texture"]


def test_diversity_below_half_of_the_bases() -> None:
    assert "0.190 and 0.400" in told({"diversity": 0.19})["diversity"]
    assert (
        dict(held_out_warnings({"iteration": 10, "diversity": 0.1}, [{"iteration": 10, "diversity": 0.1}], None)) == {}
    )


def test_copies_above_the_bases() -> None:
    assert "the copy-paste rate is above the base's (0.300)" in told({"copied": 0.3}, "copied")["copies"]


def test_over_optimization() -> None:
    assert "rewards rose and the held-out gain fell since its best" in told({"over_optimized": True})["over-optimized"]


def seen(shares: list[float | None], minibatches: int = 2, silent: float = 0.0) -> list[list[str]]:
    watch = ClippingWatch(minibatches)
    rows = [{"iteration": n, "clip_fraction": share, "silent_groups": silent} for n, share in enumerate(shares, 1)]
    return [list(dict(watch.see(row))) for row in rows]


def test_all_clipped_is_told_at_once() -> None:
    assert seen([0.3, 1.0]) == [[], ["all clipped"]]
    assert seen([1.0], silent=1.0) == [[]], "nothing was learned at all"


def test_none_clipped_is_told_when_it_lasts() -> None:
    assert seen([0.0] * STEADY) == [[]] * (STEADY - 1) + [["none clipped"]]
    assert seen([0.0] * (STEADY - 1) + [0.1] + [0.0] * (STEADY - 1)) == [[]] * (2 * STEADY - 1)
    assert seen([0.0] * STEADY, minibatches=1) == [[]] * STEADY, "a single update has a ratio of 1"
    assert seen([None] * STEADY) == [[]] * STEADY
