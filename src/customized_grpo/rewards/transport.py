"""JSON over HTTP to a scorer that may be busy, slow or away: a deadline, bounded back-off, and errors that are told."""

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any

import httpx2
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_before_delay,
    stop_when_event_set,
    wait_random_exponential,
)

from customized_grpo.errors import UserError

BUSY = 429
MOST = 2**24
"""Bytes of an answer; scores take a few for an image."""
LEAST = 0.05
"""Seconds of the shortest wait."""
PAUSE = 0.2
"""Seconds after which who waits looks whether that was given up."""


class Unavailable(Exception):
    """The scorer did not answer as it should before the deadline: what was asked is not known."""


class _Again(Exception):
    """Worth another try; `after`: the seconds that the server asks for."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class _Answer:
    """What came over the wire."""

    status: int
    body: bytes
    retry_after: str | None


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
    _given_up: threading.Event = field(init=False, default_factory=threading.Event)

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self.client = httpx2.Client(headers=headers)

    def post(self, path: str, payload: dict[str, Any], deadline: float | None = None) -> Any:
        """The answer to `payload`. Raises `Unavailable` at the deadline, `UserError` on a 4xx other than 429."""
        limit = self.deadline if deadline is None else deadline
        end = time.monotonic() + limit
        reasons: list[str] = []

        def once() -> Any:
            try:
                return self._once(path, payload, end)
            except _Again as error:
                if str(error) not in reasons:
                    reasons.append(str(error))
                raise

        retrying = Retrying(
            retry=retry_if_exception_type(_Again),
            stop=stop_before_delay(limit) | stop_when_event_set(self._given_up),
            wait=lambda state: self._wait(state, end),
            sleep=sleep_using_event(self._given_up),
            reraise=True,
        )
        try:
            return retrying(once)
        except _Again as error:
            told = "; ".join(reasons)
            raise Unavailable(f"{self.field_name}: {self.url} gave no answer within {limit:g} s ({told})") from error

    def get(self, path: str) -> Any:
        """The answer to a GET, tried once. Raises `UserError` where there is none."""
        try:
            answer = self._send("GET", path, None, time.monotonic() + min(10.0, self.deadline))
            if answer.status >= 300:
                raise _Again(f"status {answer.status}")
            return _json(answer.body)
        except _Again as error:
            raise UserError(
                f"{self.field_name}: {self.url} does not answer ({error}); start the server, or name another"
            ) from error

    def _once(self, path: str, payload: dict[str, Any], end: float) -> Any:
        answer = self._send("POST", path, payload, end)
        if answer.status == BUSY or answer.status >= 500:
            raise _Again(f"status {answer.status}", _seconds(answer.retry_after))
        if answer.status >= 400:
            told = self.without_token(answer.body.decode("utf-8", "replace"))
            raise UserError(
                f"{self.field_name}: {self.url}{path} refused the request with status {answer.status}: {told[:300]}"
            )
        return _json(answer.body)

    def _send(self, method: str, path: str, payload: dict[str, Any] | None, end: float) -> _Answer:
        """Raises `_Again` where no whole answer is there at `end`. A thread asks, which is then left alone: a time-out
        of the client starts anew with every byte."""
        found: Queue[_Answer | _Again] = Queue()
        arguments = (method, path, payload, end, found)
        threading.Thread(target=self._receive, args=arguments, daemon=True).start()
        while time.monotonic() < end and not self._given_up.is_set():
            with suppress(Empty):
                answer = found.get(timeout=min(PAUSE, _left(end)))
                if isinstance(answer, _Again):
                    raise answer
                return answer
        raise _Again("no whole answer in time")

    def _receive(
        self, method: str, path: str, payload: dict[str, Any] | None, end: float, found: "Queue[_Answer | _Again]"
    ) -> None:
        body = bytearray()
        try:
            with self.client.stream(method, self.url.rstrip("/") + path, json=payload, timeout=_left(end)) as answer:
                for part in answer.iter_bytes():
                    body += part
                    if len(body) > MOST or time.monotonic() > end:
                        found.put(_Again(f"an answer that takes too long, or more than {MOST} bytes"))
                        return
                found.put(_Answer(answer.status_code, bytes(body), answer.headers.get("Retry-After")))
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            found.put(_Again(self._told(error)))

    def give_up(self) -> None:
        """Whoever waits for an answer, in whatever thread, soon gets `Unavailable`, and whoever asks from now on."""
        self._given_up.set()

    def without_token(self, text: str) -> str:
        """`text` as it may be told: a server may repeat what it was sent, and messages end up in logs. To be shortened
        afterwards, or a part of the token stays."""
        return text.replace(self.token, "(not shown)") if self.token else text

    def _told(self, error: Exception) -> str:
        lines = self.without_token(str(error)).splitlines()
        return lines[0][:200] if lines else type(error).__name__

    def _wait(self, state: RetryCallState, end: float) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.after if isinstance(error, _Again) else 0.0
        wait = min(wait_random_exponential(multiplier=0.2, max=self.longest_wait)(state), _left(end) / 2)
        return max(min(asked, self.longest_wait), wait, LEAST)


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


def _left(end: float) -> float:
    """Seconds until `end`; a little where it has passed, since 0 would be no time-out."""
    return max(LEAST, end - time.monotonic())


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Again("an answer that is not JSON, or too deep") from error


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isdecimal() else 0.0
