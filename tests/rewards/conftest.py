"""A server on a real port that answers as a test says."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Reply = Callable[[dict[str, Any], int], tuple[Any, ...] | None]


class Server:
    """Answers the n-th question (from 0) with `reply(question, n)` and a GET with `about`: status, body (bytes, or what
    becomes JSON) and perhaps headers; None for no answer at all. Keeps what it was asked, and how many at once."""

    def __init__(self, reply: Reply) -> None:
        self.about: tuple[Any, ...] = (200, {"data": [{"id": "judge-7b"}, {"id": "other"}], "max_images": 64})
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most, self._now, self._lock = 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(*outer.about)

            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.asked)
                    outer.asked.append(question)
                    outer.keys.append(self.headers.get("Authorization"))
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                answer = reply(question, number)
                with outer._lock:
                    outer._now -= 1
                if answer is not None:
                    self.answer(*answer)

            def answer(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with suppress(OSError):  # who asked may be gone
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Callable[[Reply], Server]]:
    """Starts servers, each with a way to reply."""
    servers: list[Server] = []

    def start(reply: Reply) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for each in servers:
        each.http.shutdown()
        each.http.server_close()
