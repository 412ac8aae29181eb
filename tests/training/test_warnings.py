"""Which figures of an iteration are worth a warning."""

import pytest

from customized_grpo.training.warnings import iteration_warnings

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
