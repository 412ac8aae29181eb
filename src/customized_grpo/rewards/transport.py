"""JSON over HTTP to a scorer that may be busy, slow or away: a deadline, bounded back-off, and errors that are told."""

import os
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from customized_grpo.errors import UserError

BUSY = 429


class Unavailable(Exception):
    """The scorer did not answer as it should before the deadline: what was asked is not known."""


class _Again(Exception):
    """Worth another try; `after`: the seconds that the server asks for."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


@dataclass
class Transport:
    """Posts to `url` and answers with JSON. Time-outs, lost connections, 429 and 5xx are tried again until `deadline`
    seconds have passed; any other 4xx is the asker's fault and told at once."""

    field_name: str
    """The configuration field that named the server, for messages."""
    url: str
    deadline: float = 120.0
    longest_wait: float = 20.0
    token: str | None = None
    client: httpx2.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self.client = httpx2.Client(headers=headers)

    def post(self, path: str, payload: dict[str, Any], deadline: float | None = None) -> Any:
        """The answer to `payload`. Raises `Unavailable` at the deadline, `UserError` on a 4xx other than 429."""
        limit = self.deadline if deadline is None else deadline
        end = time.monotonic() + limit
        retrying = Retrying(
            retry=retry_if_exception_type(_Again), stop=stop_after_delay(limit), wait=self._wait, reraise=True
        )
        try:
            return retrying(self._once, path, payload, end)
        except _Again as error:
            raise Unavailable(f"{self.field_name}: {self.url} gave no answer within {limit:g} s ({error})") from error

    def get(self, path: str) -> Any:
        """The answer to a GET, tried once. Raises `UserError` where there is none."""
        try:
            answer = self.client.get(self.url.rstrip("/") + path, timeout=min(10.0, self.deadline))
            answer.raise_for_status()
            return answer.json()
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise UserError(
                f"{self.field_name}: {self.url} does not answer ({self._told(error)}); start the server, or name "
                "another"
            ) from error

    def _once(self, path: str, payload: dict[str, Any], end: float) -> Any:
        left = max(0.05, end - time.monotonic())
        try:
            answer = self.client.post(self.url.rstrip("/") + path, json=payload, timeout=left)
        except httpx2.HTTPError as error:
            raise _Again(self._told(error)) from error
        if answer.status_code == BUSY or answer.status_code >= 500:
            raise _Again(f"status {answer.status_code}", _seconds(answer.headers.get("Retry-After")))
        if answer.status_code >= 400:
            raise UserError(
                f"{self.field_name}: {self.url}{path} refused the request with status {answer.status_code}: "
                f"{self.without_token(answer.text)[:300]}"
            )
        try:
            return answer.json()
        except ValueError as error:
            raise _Again("an answer that is not JSON") from error

    def without_token(self, text: str) -> str:
        """`text` as it may be told: a server may repeat what it was sent, and messages end up in logs. To be shortened
        afterwards, or a part of the token stays."""
        return text.replace(self.token, "(not shown)") if self.token else text

    def _told(self, error: Exception) -> str:
        lines = self.without_token(str(error)).splitlines()
        return lines[0][:200] if lines else type(error).__name__

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.after if isinstance(error, _Again) else 0.0
        return max(min(asked, self.longest_wait), wait_random_exponential(multiplier=0.2, max=self.longest_wait)(state))


def secret(variable: str) -> str | None:
    """A token from the environment: nowhere else is one looked for, and none is ever written down. Space around it, in
    which files of secrets often end, is left out. Raises `UserError` where it cannot stand in a header."""
    found = os.environ.get(variable, "").strip()
    if not (found.isascii() and found.isprintable()):
        raise UserError(
            f"{variable}: the environment variable holds characters other than printable ASCII, of which keys and "
            "tokens consist; set it anew, or unset it"
        )
    return found or None


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isdecimal() else 0.0
