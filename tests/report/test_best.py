"""The line on a run's best validation."""

from typing import Any

import pytest

from customized_grpo.report.best import describe_best


def row(iteration: int, gain: Any, rewards: Any = None, **others: Any) -> dict[str, Any]:
    return {"iteration": iteration, "held_out_gain": gain, "reward_gain": rewards, **others}


INTERVAL = {"intervals": {"held_out_gain": [0.12, 0.3]}}
RISING = [row(0, 0.0, 0.0), row(150, 0.2104, 0.4, **INTERVAL), row(160, 0.1, 0.38), row(170, 0.05, 0.55)]


def test_the_issue_of_a_run_in_one_line() -> None:
    assert describe_best(RISING, "held_out_gain") == (
        "best at iteration 150: held-out gain +0.21 (0.12 to 0.30); training rewards went on rising after it"
    )


@pytest.mark.parametrize("later", [[], [row(160, 0.1, 0.38)], [row(160, 0.1, 0.401)], [row(160, 0.1), row(170, 0.1)]])
def test_rewards_that_did_not_rise_are_not_said_to(later: list[dict[str, Any]]) -> None:
    assert describe_best([*RISING[:2], *later], "held_out_gain") == (
        "best at iteration 150: held-out gain +0.21 (0.12 to 0.30)"
    )


def test_a_missing_last_reward_gain_is_looked_past() -> None:
    assert "went on rising" in (describe_best([*RISING, row(180, 0.0, None)], "held_out_gain") or "")
    unknown = [row(150, 0.2), row(160, 0.1, 0.5)]
    assert describe_best(unknown, "held_out_gain") == "best at iteration 150: held-out gain +0.20"


def test_a_run_that_is_never_better_than_its_base_says_so() -> None:
    base = row(0, 0.0, 0.0, intervals={"held_out_gain": [0.0, 0.0]})
    assert describe_best([base, row(10, -0.2, -0.1)], "held_out_gain") == (
        "best at iteration 0: held-out gain +0.00; no validation was better than the base"
    )
    assert describe_best([base], "held_out_gain") == "best at iteration 0: held-out gain +0.00"


def test_another_metric_has_its_label_its_unit_and_its_direction() -> None:
    log = [
        {"iteration": 0, "copied": 0.2, "dino": 0.5, "hpsv3": -1.5},
        {"iteration": 20, "copied": 0.125, "dino": 0.4, "hpsv3": 3.14159,
         "intervals": {"copied": [0.05, 0.25], "hpsv3": [-0.5, 4.0], "dino": [None, None]}},
    ]  # fmt: skip
    assert describe_best(log, "copied") == (
        "best at iteration 20: copy-paste rate 12.5\u202f% (5.0\u202f% to 25.0\u202f%)"
    )
    assert describe_best(log, "hpsv3") == "best at iteration 20: HPSv3 3.14 (\u22120.50 to 4.00)"
    assert describe_best(log, "dino") == ("best at iteration 0: DINO 0.500; no validation was better than the base")


def test_nothing_is_said_without_a_value() -> None:
    assert describe_best([], "held_out_gain") is None
    assert describe_best([row(0, None), row(10, True)], "held_out_gain") is None
