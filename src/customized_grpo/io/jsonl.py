"""Logs of JSON lines."""

import json
import math
import os
from pathlib import Path
from typing import Any

from customized_grpo.errors import UserError

Metrics = dict[str, Any]
TAIL = 1 << 16
"""Bytes at the end of a log in which its last row is looked for."""


def read_rows(path: Path) -> list[Metrics]:
    """Return the rows of a log in the order of the file, without a torn last line.

    A missing file has no rows. Raises `UserError`, naming file and line, where a line that ends in a newline is no row.
    """
    rows: list[Metrics] = []
    for number, line in enumerate(_whole_lines(path.read_bytes()) if path.is_file() else [], 1):
        try:
            rows.append(_row(line))
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: not a row of a log ({error}); remove this line and those after it"
            ) from error
    return rows


def last_row(path: Path) -> Metrics | None:
    """Return the last row of a log that may still be growing, None if it has none yet; only its end is read.

    Raises `UserError`, naming the file, if its last complete line is not a row.
    """
    if not path.is_file():
        return None
    with path.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
        lines = _whole_lines(log.read())
    try:
        return _row(lines[-1]) if lines else None
    except ValueError as error:
        raise UserError(f"{path}: its last line is not a row of a log ({error}); remove it") from error


def read_lines(path: Path) -> list[Metrics]:
    """Return the rows of a log, one per iteration in order; of a repeated iteration the last one counts.

    An unfinished last line (a run that is being written, or was killed) is left out; any other broken line
    is a UserError. A missing file has no lines.
    """
    if not path.is_file():
        return []
    rows: dict[float, Metrics] = {}
    texts = path.read_bytes().decode("utf-8", errors="replace").removesuffix("\n").split("\n")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            row = _row(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                break
            raise UserError(f"{path}:{number}: broken JSON ({error.msg}); expected one JSON object a line") from error
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        rows[row["iteration"]] = row
    return [rows[key] for key in sorted(rows)]


def _whole_lines(content: bytes) -> list[bytes]:
    """Return the lines that end in a newline: what follows the last newline is torn."""
    return content.split(b"\n")[:-1]


def _row(line: str | bytes) -> Metrics:
    """Parse a line of a log. Raises `ValueError` (perhaps `JSONDecodeError`) if it is not a row."""
    row = json.loads(line)
    if not isinstance(row, dict) or not is_number(row.get("iteration")):
        raise ValueError("expected a JSON object with a numeric field 'iteration'")
    return row


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
