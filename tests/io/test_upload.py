"""An exported adapter on the hub: the true library against a stand-in of the hub's HTTP interface."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from customized_grpo.cli.main import main
from customized_grpo.io.files import file_sha256

TOKEN = "hf_a-token-that-no-file-holds"


@dataclass
class Hub:
    """Takes uploads to one model, by users that have the token."""

    http: ThreadingHTTPServer
    repository: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 200
    """Of the answer to a commit."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, path: str, body: bytes, token: str) -> tuple[int, dict[str, Any]]:
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            self.repository = json.loads(body)
            return 200, {"url": f"{self.url}/me/toy", "name": "me/toy"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {
                "files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]
            }
        if "/commit/" in path:
            if self.status == 200:
                values = [json.loads(line)["value"] for line in body.splitlines()]
                self.files = {each["path"]: base64.b64decode(each["content"]) for each in values if "content" in each}
            commit = {"commitOid": "0" * 40, "commitUrl": f"{self.url}/me/toy/commit/{'0' * 40}"}
            return self.status, commit if self.status == 200 else {"error": "the storage is full"}
        return 200, {"name": "me", "type": "user", "orgs": []} if path == "/api/whoami-v2" else {}


@pytest.fixture
def hub() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, answer = found.answer(self.path, self._body(), self.headers.get("Authorization", ""))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            return body

        def log_message(self, *_: object) -> None:
            pass

    found = Hub(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    Thread(target=found.http.serve_forever, daemon=True).start()
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture
def push(four: Path, tmp_path: Path) -> Callable[..., Any]:
    """Exports a run to `tmp_path/out` and uploads it to me/toy, in a process that sees the hub at an address."""

    def push(url: str, *more: str, token: str = TOKEN) -> Any:
        env = os.environ | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
        options = [str(four), str(tmp_path / "out"), "--push", "me/toy", *more]
        # A new process: the library reads these variables when it is imported.
        command = [sys.executable, "-m", "customized_grpo", "export", *options]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    return push


@pytest.mark.parametrize(("more", "visibility"), [([], "private"), (["--public"], "public")])
def test_all_files_are_uploaded_to_a_new_model(
    more: list[str], visibility: str, push: Callable[..., Any], hub: Hub, tmp_path: Path
) -> None:
    done = push(hub.url, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"model: {hub.url}/me/toy"
    assert hub.repository["visibility"] == visibility
    out = tmp_path / "out"
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert hub.files == files and {"README.md", "adapter_model.safetensors", "config.yaml"} <= files.keys()
    assert not any(TOKEN.encode() in content for content in files.values())


def test_a_wrong_token_is_told_before_anything_is_written(push: Callable[..., Any], hub: Hub, tmp_path: Path) -> None:
    done = push(hub.url, token="hf_wrong")
    assert done.returncode == 2 and "--push: me/toy could not be uploaded to (" in done.stderr
    assert "nothing was written" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_hub_refuses_stays_in_the_folder(
    push: Callable[..., Any], hub: Hub, four: Path, tmp_path: Path
) -> None:
    hub.status = 507
    done = push(hub.url)
    assert done.returncode == 2 and f"{tmp_path / 'out'} is written" in done.stderr and "Traceback" not in done.stderr
    name = "adapter_model.safetensors"
    assert file_sha256(tmp_path / "out" / name) == file_sha256(four / name)


def test_a_hub_that_is_not_there_is_told_first(push: Callable[..., Any], hub: Hub, tmp_path: Path) -> None:
    hub.http.server_close()
    done = push(hub.url)
    assert done.returncode == 2 and "--push: me/toy could not be uploaded to" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--push", "toy"], "--push: 'toy' is no name on the hub; give owner/name"),
        (["--push", "me/to y"], "--push: 'me/to y' is no name on the hub"),
        (["--push", "me/toy"], "--push: no token of the hub is known; log in with `hf auth login`, or set HF_TOKEN"),
        (["--public"], "--public: only with --push; leave it out"),
    ],
)
def test_what_cannot_be_uploaded_is_told_before_anything_is_written(
    options: list[str], said: str, four: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("customized_grpo.io.hub.get_token", lambda: None)
    with pytest.raises(SystemExit):
        main(["export", str(four), str(tmp_path / "out"), *options])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
