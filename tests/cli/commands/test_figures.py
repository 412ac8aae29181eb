"""`figures`: a table or a record, and not both."""

from collections.abc import Callable

import pytest

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figures", "--output", "x"], "name the table of a comparison with --csv, or a diagnosis.json with"),
        (["figures", "--output", "x", "--csv", "nowhere.csv"], "nowhere.csv"),
        (["figures", "--output", "x", "--diagnosis", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_of_figures(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)
