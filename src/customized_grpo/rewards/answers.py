"""What came over the wire: JSON, or a failure with its code and the server's words.

An error is one whatever its status: some servers and gateways answer 200 with `{"error": {"code": 429, ...}}`.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

WORDS = 300
"""Characters that are kept of what a server says of an error."""
CODES = {
    "invalid_api_key": 401, "model_not_found": 404, "rate_limit_exceeded": 429, "content_filter": 400,
    "content_policy_violation": 400, "invalid_request_error": 400,
}  # fmt: skip
"""Statuses of errors that have a name alone, of OpenAI's protocol."""


@dataclass(frozen=True)
class Answer:
    """Status, body and headers (names in small letters)."""

    status: int
    body: bytes
    headers: Mapping[str, str]


class Failure(Exception):
    """No answer, or one that is an error."""

    def __init__(self, kind: str, words: str = "", status: int = 0, after: float | None = None) -> None:
        """Describe a failure.

        `kind`: what happened. `words`: the server's message. `status`: of HTTP, 0 without one. `after`: the seconds
        that the server asks to wait.
        """
        super().__init__(kind)
        self.kind, self.words, self.status, self.after = kind, words, status, after


def content_of(answer: Answer, redact: Callable[[str], str]) -> Any:
    """Return the JSON of an answer.

    Raises `Failure` where it is none, and where status or content say that it is an error, with words that `redact` has
    gone over.
    """
    try:
        content = json.loads(answer.body)
    except (ValueError, RecursionError):
        if answer.status < 300:
            raise Failure("an answer that is not JSON, or too deep") from None
        content = answer.body.decode("utf-8", "replace")
    error = _error_in(content)
    if answer.status < 300 and error is None:
        return content
    status, kind = answer.status, f"status {answer.status}"
    if status < 300:
        status = _code(error)
        kind = f"status {answer.status} with an error" + (f" of code {status}" if status else "")
    said = answer.headers.get("location") if 300 <= status < 400 else None
    words = " ".join(redact(said or _words(content if error is None else error)).split())
    after = _retry_after(answer.headers)
    asks = f"asks to wait {after:g} s" if after else ""
    raise Failure(kind, "; ".join(filter(None, [words[:WORDS], asks])), status, after)


def _error_in(content: Any) -> Any:
    """Return the error in an answer, at its top or in the first choice of a chat completion; None without one."""
    if not isinstance(content, dict):
        return None
    choices = content.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    held = [holder["error"] for holder in (content, first) if isinstance(holder, dict) and holder.get("error")]
    return held[0] if held else content if content.get("object") == "error" else None


def _code(error: Any) -> int:
    """Return the HTTP status of an error, 0 if it names none."""
    told = [error.get(name) for name in ("code", "status", "type")] if isinstance(error, dict) else [error]
    for code in told:
        if isinstance(code, str) and code in CODES:
            return CODES[code]
        if isinstance(code, int | str) and str(code).isdecimal() and 400 <= int(code) < 600:
            return int(code)
    return 0


def _words(content: Any) -> str:
    """Return the server's message in an error's body."""
    while isinstance(content, dict):
        held = next((content[name] for name in ("error", "message", "detail") if content.get(name)), None)
        if held is None:
            return json.dumps(content) if content else ""
        content = held
    return content if isinstance(content, str) else json.dumps(content)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait by a Retry-After in seconds or as a date (RFC 9110), None if unknown."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        moment = _moment(text)
        now = _moment(headers.get("date", "")) or time.time()  # the server's own clock, where it shows that
        seconds = -1.0 if moment is None else max(0.0, moment - now)
    return seconds if 0 <= seconds < float("inf") else None


def _moment(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
