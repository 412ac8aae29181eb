"""`toybox`: its options."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]


@pytest.mark.parametrize("count", ["0", "-1", "some"])
def test_the_number_of_exported_prompts_is_at_least_one(refused: Refused, count: str) -> None:
    assert re.search(rf"count.*[ ']{count}", refused("toybox", "export", "nowhere", "--count", count))


def test_an_unknown_split_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert "validation" in refused("toybox", "export", tmp_path / "made", "--split", "dev")


def test_an_export_does_not_overwrite(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("mine")
    assert "is not empty" in refused("toybox", "export", tmp_path)
