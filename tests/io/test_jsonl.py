"""Logs of JSON lines: whole, torn, growing and damaged ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from customized_grpo.errors import UserError
from customized_grpo.io.jsonl import TAIL, last_row, read_lines, read_rows

ROWS = [{"iteration": number, "loss": number / 2} for number in (2, 1, 2)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


@pytest.mark.parametrize("torn", ["", '{"iteration": 3, "lo', "\x00"])
def test_a_torn_last_line_is_left_out(torn: str, log: Path) -> None:
    log.write_text(LINES + torn)
    assert read_rows(log) == ROWS and last_row(log) == ROWS[-1]
    assert read_lines(log) == [ROWS[1], ROWS[2]]


@pytest.mark.parametrize(("read", "nothing"), [(read_rows, []), (read_lines, []), (last_row, None)])
def test_a_log_that_is_missing_or_empty_has_no_rows(read: Callable[[Path], Any], nothing: Any, log: Path) -> None:
    assert read(log) == nothing
    log.write_text("")
    assert read(log) == nothing


@pytest.mark.parametrize("bad", ["{", "[1]", '{"loss": 1}', '{"iteration": "1"}', "\x00\x00\x00\x00"])
def test_a_line_that_is_no_row_is_named(bad: str, log: Path) -> None:
    log.write_text(f"{LINES}{bad}\n{LINES}")
    with pytest.raises(UserError, match=rf"^{log}:4: not a row of a log \(.*\); remove this line and those after it"):
        read_rows(log)
    with pytest.raises(UserError, match=rf"^{log}:4: "):
        read_lines(log)
    log.write_text(f"{LINES}{bad}\n")
    with pytest.raises(UserError, match=f"^{log}: its last line is not a row of a log"):
        last_row(log)


def test_only_the_end_of_a_long_log_is_read_for_its_last_row(log: Path) -> None:
    log.write_bytes(b"\xff" * TAIL + b"\n" + LINES.encode())
    assert last_row(log) == ROWS[-1]
