"""How long a run will still take."""

import pytest

from customized_grpo.tracking.time_left import RECENT, TimeLeft, duration


def test_what_is_left_is_the_sum_of_its_parts() -> None:
    time = TimeLeft()
    for seconds in (90.0, 10.0, 12.0):  # the first compiles
        time.took("iteration", seconds)
    time.took("validation", 30.0)
    assert time.left({"iteration": 5, "validation": 2.5}) == 5 * 12 + 2.5 * 30
    assert time.left({"iteration": 5, "validation": 0}) == 60
    assert time.left({}) == 0


def test_nothing_is_guessed_of_a_part_that_was_not_measured() -> None:
    time = TimeLeft()
    time.took("iteration", 1.0)
    assert time.left({"iteration": 5, "validation": 1}) is None


def test_old_measurements_do_not_count() -> None:
    time = TimeLeft()
    for seconds in [1.0] * 20 + [3.0] * RECENT:
        time.took("iteration", seconds)
    assert time.left({"iteration": 1}) == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3599.7, "1 h 0 min"),
        (18600, "5 h 10 min"), (183_600, "2 d 3 h"),
    ],
)  # fmt: skip
def test_two_units_are_told(seconds: float, text: str) -> None:
    assert duration(seconds) == text
