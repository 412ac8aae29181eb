"""`diagnose`: a run or a configuration, and not both."""

from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diagnose"], "name a trained run with --run DIR, or what to start from with --config FILE"),
        (["diagnose", "--run", "nowhere"], "nowhere is not the folder of a run"),
        (["diagnose", "--run", "nowhere", "--rollout.eta", "0.3"], "leave out rollout.eta, or give --config"),
        (["diagnose", "--run", "nowhere", "--output", "x"], "--output: diagnose writes to --out DIR; leave it out"),
    ],
)
def test_bad_input_of_diagnoses(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_diagnose_takes_a_file_for_train_with_its_output(refused: Refused, settings_file: Callable[..., Path]) -> None:
    assert "output:" in settings_file().read_text()
    assert "--prompts: at least 2" in refused("diagnose", "--config", settings_file(), "--prompts", 1)
