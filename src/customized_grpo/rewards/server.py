"""A reward behind a small HTTP server, for trainers on other machines.

The protocol is `rewards.remote`'s. One request is decoded and scored at a time, while the body of the next is read.
"""

import hmac
import ipaddress
import json
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from customized_grpo.errors import UserError, first_line
from customized_grpo.rewards.http import read_token
from customized_grpo.rewards.remote import TOKEN
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.rewards.score_request import Limits, Refused, read_request
from customized_grpo.runtime.memory import is_out_of_memory

BODIES = 2
"""Requests whose bodies are in memory at once: one is scored, the next is read."""
CONNECTIONS = 128
"""Connections at once; each takes a thread. Further ones are closed, and clients try again."""
PATIENCE = 30.0
"""Seconds until the headers, or the body at SLOWEST, must have come."""
SLOWEST = 2**20
"""Bytes a second at which a body must come, averaged since its start, after PATIENCE."""
PEEK = 1.0
"""Seconds after which a request that waits looks whether its client is still there."""


class RewardServer(ThreadingHTTPServer):
    """A server of `reward` under `name`, within `limits`."""

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(
        self, address: tuple[str, int], reward: Reward, name: str, limits: Limits, token: str | None = None
    ) -> None:
        super().__init__(address, _Handler)
        self.reward, self.name, self.limits, self.token = reward, name, limits, token
        self.bodies, self.turn = threading.Semaphore(BODIES), threading.Semaphore(1)
        self.patience = PATIENCE
        self._due: dict[Any, float] = {}

    def process_request(self, request: Any, client_address: Any) -> None:
        """See `socketserver`. Closes a connection that is one too many."""
        if len(self._due) >= CONNECTIONS:
            self.shutdown_request(request)
            return
        self.expect(request, self.patience)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """See `socketserver`."""
        self._due.pop(request, None)
        super().shutdown_request(request)

    def expect(self, request: Any, seconds: float) -> None:
        """End a connection's input after `seconds`, unless another call extends the time."""
        self._due[request] = time.monotonic() + seconds

    def service_actions(self) -> None:
        """See `socketserver`, which calls this each half second: time-outs of a socket start again with every byte."""
        for request, due in list(self._due.items()):
            if time.monotonic() > due:
                with suppress(OSError):  # it may be closed already
                    request.shutdown(socket.SHUT_RD)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """See `socketserver`. A client that is gone is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def score(self, body: bytearray) -> dict[str, Any]:
        """Return the answer to a request's body, and empty the body. Raise `Refused` if it cannot be scored."""
        try:
            images, batch = read_request(body, self.limits)
            return _answer(self.reward.score(images, batch))
        except Refused:
            raise
        except Exception as error:  # of a user's function or a model's library: anything may come out of it
            refusal = _refusal(error)
        # Raised here, where the failed call's tensors are let go already.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        raise refusal


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60

    def do_GET(self) -> None:
        self._headers_came()
        if self.path != "/health":
            self._reply(HTTPStatus.NOT_FOUND, {"error": "there are GET /health and POST /score"})
        elif self._allowed():
            self._reply(HTTPStatus.OK, {"status": "ok", "reward": self.server.name} | vars(self.server.limits))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._headers_came()
        if self.path != "/score":
            self._reply(HTTPStatus.NOT_FOUND, {"error": "there are GET /health and POST /score"})
            return
        if not self._allowed():
            return
        try:
            answer = self._scores(self._length())
        except Refused as error:
            self._reply(error.status, {"error": str(error)})
        else:
            self._reply(HTTPStatus.OK, answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the trainer reports what fails."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """See `http.server`, which calls this for requests that it cannot read, and other methods."""
        self.close_connection = True
        self._reply(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})

    def _headers_came(self) -> None:
        self.server.expect(self.connection, math.inf)

    def _scores(self, length: int) -> dict[str, Any]:
        """Read bodies one after the other, however many clients send: clients wait with theirs in their own memory."""
        with self._turn(self.server.bodies):
            body = self._body(length)
            with self._turn(self.server.turn):
                return self.server.score(body)

    @contextmanager
    def _turn(self, gate: threading.Semaphore) -> Iterator[None]:
        """Wait for `gate`. Raises ConnectionError once the client is gone: nobody would read the scores."""
        while not gate.acquire(timeout=PEEK):
            self._check_client()
        try:
            self._check_client()
            yield
        finally:
            gate.release()

    def _check_client(self) -> None:
        self.connection.settimeout(0)
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError("the client closed the connection")
        except BlockingIOError:
            pass  # it waits
        finally:
            self.connection.settimeout(self.timeout)

    def _length(self) -> int:
        length = self.headers.get("Content-Length", "")
        most = self.server.limits.max_bytes
        if not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        # int() refuses thousands of digits.
        if len(length) > 20 or int(length) > most:
            self.close_connection = True
            limit = f"{length:.20} bytes, and {most} are taken at once"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, limit)
        return int(length)

    def _body(self, length: int) -> bytearray:
        """Return the body, using only the memory of what has arrived. Raise `Refused` if it comes too slowly."""
        body = bytearray()
        start = time.monotonic()
        while len(body) < length:
            due = start + self.server.patience + len(body) / SLOWEST
            self.server.expect(self.connection, due - time.monotonic())
            part = self.rfile.read1(min(length - len(body), 2**20))
            if not part:
                self.close_connection = True
                # Worth another try, so no 4xx.
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{len(body)} of {length} bytes came in time")
            body += part
        self._headers_came()
        return body

    def _allowed(self) -> bool:
        wanted = self.server.token
        given = self.headers.get("Authorization", "")
        if wanted is None or hmac.compare_digest(given.encode(), f"Bearer {wanted}".encode()):
            return True
        self.close_connection = True
        self._reply(HTTPStatus.UNAUTHORIZED, {"error": "a bearer token is wanted, and this is not it"})
        return False

    def _reply(self, status: HTTPStatus, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _refusal(error: Exception) -> Refused:
    if is_out_of_memory(error):
        # Of 5xx, for the trainer to try again: memory may be taken by others for a while.
        return Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"out of memory: {first_line(error)[:200]}")
    # Of 4xx, for the trainer to stop and say so: the same request would fail again.
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return Refused(HTTPStatus.UNPROCESSABLE_ENTITY, f"the reward failed: {kind}{first_line(error)[:200]}")


def _answer(scores: Scores) -> dict[str, Any]:
    valid = (scores.valid & scores.values.isfinite()).tolist()
    values = [
        [value if known else None for value, known in zip(*rows, strict=True)]
        for rows in zip(scores.values.tolist(), valid, strict=True)
    ]
    return {"values": values, "valid": valid}


def serve(
    reward: Reward, name: str, address: tuple[str, int], limits: Limits, *, on_ready: Callable[[str], None]
) -> None:
    """Serve `reward` under `name` until interrupted; `on_ready` gets a line that says where.

    Raises `UserError` as `check_server` does.
    """
    token = check_server(address, limits)
    try:
        server = RewardServer(address, reward, name, limits, token)
    except (OSError, OverflowError, UnicodeError) as error:
        raise _cannot_listen(address, error) from error
    with server:
        host, port = server.server_address[:2]
        guarded = "a token is wanted" if token else f"no token is wanted: {TOKEN} is not set"
        on_ready(f"serving {name} on http://{host!s}:{port} ({guarded})")
        server.serve_forever()


def check_server(address: tuple[str, int], limits: Limits) -> str | None:
    """Check that `serve` can start, before a model is loaded for minutes; return the token that requests must have.

    Raises `UserError` for limits below 1, and for an address that cannot be listened on, or that other machines reach
    although no token is set.
    """
    for option, value in vars(limits).items():
        if value < 1:
            raise UserError(f"--{option}: {value} takes no request; give 1 or more")
    token = read_token(TOKEN)
    try:
        with socket.create_server(address) as probe:
            host = probe.getsockname()[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise _cannot_listen(address, error) from error
    if token is None and not ipaddress.ip_address(host).is_loopback:
        raise UserError(
            f"--host: other machines reach {address[0] or host}, and no token is set; set the environment variable "
            f"{TOKEN} here and for the trainer, or serve on 127.0.0.1 alone"
        )
    return token


def _cannot_listen(address: tuple[str, int], error: Exception) -> UserError:
    return UserError(f"--host, --port: cannot listen on {address[0]}:{address[1]} ({error}); name others")
