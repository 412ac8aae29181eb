"""Logs of JSON lines."""

import json
import math
from pathlib import Path
from typing import Any

from customized_grpo.errors import UserError

Metrics = dict[str, Any]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects of a .jsonl file, one per iteration in order; of a repeated iteration the last one counts.

    An unfinished last line (a run that is being written, or was killed) is left out; any other broken line
    is a UserError. A missing file has no lines.
    """
    if not path.is_file():
        return []
    rows: dict[float, dict[str, Any]] = {}
    texts = path.read_bytes().decode("utf-8", errors="replace").removesuffix("\n").split("\n")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                break
            raise UserError(f"{path}:{number}: broken JSON ({error.msg}); expected one JSON object a line") from error
        if not isinstance(row, dict) or not is_number(row.get("iteration")):
            raise UserError(f"{path}:{number}: expected a JSON object with a numeric field 'iteration'")
        rows[row["iteration"]] = row
    return [rows[key] for key in sorted(rows)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
