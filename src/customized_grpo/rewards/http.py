"""JSON over HTTP to a scorer that may be busy, slow or away: deadlines, bounded back-off, and errors that say why."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    wait_random_exponential,
)

from customized_grpo.errors import UserError
from customized_grpo.io.connection import Route, open_client, parsed_address, route_to
from customized_grpo.rewards.answers import Answer, Failure, content_of

PASSING = (408, 425, 429)
"""Statuses, beside 5xx, of what another try may mend."""
OF_THE_REQUEST = (400, 413, 415, 422, 451)
"""Statuses that may be the fault of this one request: its picture, its size, or what a policy says of it."""
NOT_THERE = (404, 405, 501)
MAX_RESPONSE_BYTES = 2**24
"""Bytes of an answer; scores take a few for an image."""
MIN_TIMEOUT = 0.05
"""Seconds of the shortest wait."""
POLL_INTERVAL = 0.2
"""Seconds after which a waiting question looks whether it was given up."""


class Unavailable(Exception):
    """The server did not answer as it should before the deadline."""


class Refused(Exception):
    """The server refuses this request, and may well answer another."""


class Scoring:
    """The questions of one scoring, which share one patience.

    `deadline` seconds are the limit of each answer, further tries included: a slow server with many pictures takes as
    long as it takes. They are the limit of the server's silence too. Once it has answered nothing for so long while
    questions were open, it is taken for dead: the open questions are given up, and no further ones are asked.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._open = 0
        self._heard = 0.0

    @contextmanager
    def question(self) -> Iterator[float]:
        """Open a question; yields the time (`time.monotonic`) at which its answer must be there."""
        start = time.monotonic()
        with self._lock:
            if self._open == 0:
                self._heard = start  # the server was not asked before, so it was not silent
            self._open += 1
        missing = False
        try:
            yield start + self.deadline
        except Unavailable:
            missing = True
            raise
        finally:
            with self._lock:
                self._open -= 1
                # The last try may end a little before the deadline, and would never make the silence whole.
                if missing and self._open == 0 and self._heard <= start:
                    self.stopped.set()

    def heard(self) -> None:
        """Note that the server has answered."""
        self._heard = time.monotonic()

    def is_over(self) -> bool:
        """Return whether this scoring has ended: it was canceled, or the server was silent for the timeout."""
        if self._open and time.monotonic() >= self._heard + self.deadline:
            self.stopped.set()
        return self.stopped.is_set()

    def cancel(self) -> None:
        """Make every waiting call, in any thread, soon raise `Unavailable`."""
        self.stopped.set()


@dataclass
class Transport:
    """Posts to `url` and answers with JSON.

    Time-outs, lost connections, 408, 425, 429 and 5xx are tried again until the deadline, and so is a 200 that holds an
    error of such a code. Raises `UserError` where `url` is no address, and where the environment names a proxy or
    certificates that cannot be used.
    """

    field_name: str
    """The configuration field that named the server, for messages."""
    url: str
    deadline: float = 120.0
    longest_wait: float = 20.0
    """Seconds of the longest pause before another try, where the server does not ask for one by Retry-After."""
    token: str | None = None
    client: httpx2.Client = field(init=False)
    route: Route = field(init=False)

    def __post_init__(self) -> None:
        address = parsed_address(self.field_name, self.url)
        self.route = route_to(address)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self.client = open_client(address, self.route, headers | {"Content-Type": "application/json"})

    def scoring(self) -> Scoring:
        """Begin a scoring, whose questions share one patience."""
        return Scoring(self.deadline)

    def post(self, path: str, payload: dict[str, Any], scoring: Scoring | None = None) -> Any:
        """Ask `payload`, as a question of `scoring`, and return the answer.

        Raises `Unavailable` at the deadline; `Refused` on a 400, 413, 415, 422 or 451; `UserError` on any other status
        from 300 on that another try does not mend.
        """
        scoring = scoring or self.scoring()
        if scoring.is_over():
            raise Unavailable(f"{self.field_name}: {self.url} was not asked any more in this scoring")
        body = json.dumps(payload, separators=(",", ":")).encode()
        reasons: dict[str, str] = {}
        with scoring.question() as end:

            def once() -> Any:
                try:
                    return self._once("POST", path, body, end, scoring.is_over)
                except Failure as error:
                    reasons[error.kind] = error.words
                    raise

            retrying = Retrying(
                retry=retry_if_exception(_passes),
                stop=lambda state: scoring.is_over() or time.monotonic() + state.upcoming_sleep >= end,
                wait=lambda state: self._wait(state, end),
                sleep=sleep_using_event(scoring.stopped),
                reraise=True,
            )
            try:
                found = retrying(once)
            except Failure as error:
                if _passes(error):
                    tried = "; ".join(_joined(kind, words) for kind, words in reasons.items())
                    raise Unavailable(
                        f"{self.field_name}: {self.url} gave no answer within {scoring.deadline:g} s ({tried})"
                    ) from error
                scoring.heard()
                raise self._refusal(path, error) from error
            scoring.heard()
            return found

    def get(self, path: str, *, optional: bool = False) -> Any:
        """Return the answer to a GET, tried once; None if it is `optional` and missing.

        Raises `UserError` if there is no answer.
        """
        end = time.monotonic() + min(10.0, self.deadline)
        try:
            return self._once("GET", path, None, end, lambda: False)
        except Failure as error:
            if optional and error.status in NOT_THERE:
                return None
            told = _joined(error.kind, error.words)
            key = error.status in (401, 403)
            remedy = "check its key or token in the environment" if key else "start the server, or name another"
            raise UserError(f"{self.field_name}: {self.url} does not answer ({told}); {remedy}") from error

    def _once(self, method: str, path: str, body: bytes | None, end: float, is_over: Callable[[], bool]) -> Any:
        """Ask once; raise `Failure` without an answer, or with one that holds an error."""
        return content_of(self._send(method, path, body, end, is_over), self.redact)

    def _refusal(self, path: str, error: Failure) -> Refused | UserError:
        told = f"{self.field_name}: {self.url}{path} refused the request with {_joined(error.kind, error.words)}"
        if error.status in OF_THE_REQUEST:
            return Refused(told)
        if error.status < 400:
            return UserError(f"{told}; it sends askers on to another address: name that one")
        return UserError(told)

    def _send(self, method: str, path: str, body: bytes | None, end: float, is_over: Callable[[], bool]) -> Answer:
        """Raise `Failure` if no complete answer has arrived at `end`.

        A thread asks, which is then left alone: a time-out of the client begins again with every byte.
        """
        found: Future[Answer] = Future()
        threading.Thread(target=self._receive, args=(method, path, body, end, found), daemon=True).start()
        while time.monotonic() < end and not is_over():
            with suppress(TimeoutError):
                return found.result(timeout=min(POLL_INTERVAL, _left(end)))
        raise Failure(f"no whole answer in time{self.route.words()}")

    def _receive(self, method: str, path: str, body: bytes | None, end: float, found: "Future[Answer]") -> None:
        received = bytearray()
        try:
            with self.client.stream(method, self.url.rstrip("/") + path, content=body, timeout=_left(end)) as answer:
                for part in answer.iter_bytes():
                    received += part
                    if len(received) > MAX_RESPONSE_BYTES or time.monotonic() > end:
                        raise Failure(f"an answer that takes too long, or more than {MAX_RESPONSE_BYTES} bytes")
                found.set_result(Answer(answer.status_code, bytes(received), dict(answer.headers)))
        except Failure as error:
            found.set_exception(error)
        except (httpx2.HTTPError, OSError) as error:
            found.set_exception(Failure(self._told(error)))
        except Exception as error:  # raised again where the answer is waited for; here nobody would hear it
            proxied = self.route.variable is not None  # garbage from a SOCKS proxy comes as many kinds of error
            found.set_exception(Failure(self._told(error)) if proxied else error)

    def redact(self, text: str) -> str:
        """Redact the token from `text`: servers may echo it, and messages are logged.

        Shorten only after redacting, or a part of the token stays.
        """
        return text.replace(self.token, "(not shown)") if self.token else text

    def _told(self, error: Exception) -> str:
        lines = self.redact(str(error)).splitlines()
        return (lines[0][:200] if lines else type(error).__name__) + self.route.words()

    def _wait(self, state: RetryCallState, end: float) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, Failure) and error.after is not None:
            return max(error.after, MIN_TIMEOUT)
        wait = wait_random_exponential(multiplier=0.2, max=self.longest_wait)(state)
        return max(min(wait, _left(end) / 2), MIN_TIMEOUT)


def read_token(variable: str) -> str | None:
    """Read a token from the environment, the only place for it; it is never written down.

    Space around it, in which files of secrets often end, is left out. Raises `UserError` where it cannot stand in a
    header.
    """
    found = os.environ.get(variable, "").strip()
    if not (found.isascii() and found.isprintable()):
        raise UserError(
            f"{variable}: the environment variable holds characters other than printable ASCII, and keys and tokens "
            "consist of nothing else; set it again, or unset it"
        )
    return found or None


def _passes(error: BaseException) -> bool:
    """Return whether another try may succeed."""
    return isinstance(error, Failure) and (error.status in PASSING or error.status >= 500 or error.status == 0)


def _joined(kind: str, words: str) -> str:
    return f"{kind}: {words}" if words else kind


def _left(end: float) -> float:
    """Return the seconds until `end`, or a little if it has passed: 0 would mean no timeout."""
    return max(MIN_TIMEOUT, end - time.monotonic())
