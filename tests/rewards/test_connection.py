"""The way to a server by the environment's proxies and certificates, with a proxy of each kind on a real port."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import constants

from customized_grpo.cli.main import main
from customized_grpo.errors import UserError
from customized_grpo.io import connection
from customized_grpo.io.connection import parsed_address, route_to
from customized_grpo.rewards.http import Transport, Unavailable

Start = Callable[[Callable[[dict[str, Any], int], tuple[Any, ...]]], Any]
AWAY = "http://judge.invalid:8000/v1"
"""A server that only a proxy can know."""


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_proxy".upper(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


def transport(url: str, deadline: float = 10.0) -> Transport:
    return Transport("rewards.vlm_judge.url", url, deadline, longest_wait=0.05)


@pytest.fixture
def socks() -> Iterator[Callable[[int], str]]:
    """Starts a SOCKS5 proxy that leads every connection to one port of this machine; returns its address."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def pass_on(source: socket.socket, target: socket.socket) -> None:
            with suppress(OSError):
                while data := source.recv(65536):
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        def serve(port: int) -> None:
            asker, _ = listener.accept()
            asker.recv(64)
            asker.sendall(b"\x05\x00")
            asker.recv(512)
            asker.sendall(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
            target = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=pass_on, args=(target, asker), daemon=True).start()
            pass_on(asker, target)

        def start(port: int) -> str:
            threading.Thread(target=serve, args=(port,), daemon=True).start()
            return f"127.0.0.1:{listener.getsockname()[1]}"

        yield start


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_proxy_is_used(variable: str, server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running = server(lambda question, number: (200, {"through": "a proxy"}))
    monkeypatch.setenv(variable, f"http://127.0.0.1:{running.http.server_address[1]}")
    assert transport(AWAY).post("/score", {}) == {"through": "a proxy"}


def test_a_socks_proxy_is_used(server: Start, socks: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    running = server(lambda question, number: (200, {"through": "socks"}))
    monkeypatch.setenv("ALL_PROXY", f"socks5h://{socks(running.http.server_address[1])}")
    assert transport(AWAY).post("/score", {}) == {"through": "socks"}


@pytest.mark.parametrize(
    "named",
    ["judge.invalid", "other, .invalid", "*.invalid", "*", "judge.invalid:8000", "INVALID", "http://judge.invalid"],
)
def test_no_proxy_is_used_for_what_no_proxy_names(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    assert route_to(httpx2.URL(AWAY)).variable == "HTTP_PROXY"
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, named)
        assert route_to(httpx2.URL(AWAY)).proxy is None
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("address", "named", "exempt"),
    [
        ("http://10.1.2.3:8000", "10.0.0.0/8", True),
        ("http://11.1.2.3:8000", "10.0.0.0/8", False),
        ("http://[fd00::7]:8000", "fd00::/8", True),
        ("http://[fd00::7]:8000", "[fd00::7]:8000", True),
        ("http://[fd00::7]:8000", "[fd00::7]:9", False),
        ("http://judge.invalid:8000", "judge.invalid:9", False),
        ("https://judge.invalid", "judge.invalid:443", True),
        ("http://wrongjudge.invalid", "judge.invalid", False),
        ("http://judge.invalid.example", "judge.invalid", False),
        ("http://judge.invalid", "", False),
        ("http://judge.invalid", " , ", False),
        ("http://judge.invalid", "10.0.0.0/99,x/y,:,[", False),
    ],
)
def test_networks_ports_and_likenesses_in_no_proxy(
    address: str, named: str, exempt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", named)
    assert (route_to(httpx2.URL(address)).proxy is None) == exempt


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.9", "[::1]", "localhost", "judge.localhost", "0.0.0.0"])
@pytest.mark.parametrize("proxy", ["http://proxy:3128", "socks5://proxy", "ftp://bad", "http://"])
def test_this_machine_is_reached_without_a_proxy_be_it_a_bad_one(
    host: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert transport(f"http://{host}:8000/v1").route.proxy is None


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "all_proxy"])
@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        ("socks4://proxy:1", "socks4 is no kind of proxy that is known"),
        ("ftp://proxy", "ftp is no kind of proxy"),
        ("http://", "it is no address"),
        ("http://proxy:port", "it is no address"),
        ("proxy:99999", "it is no address"),
        ("http://[bad", "it is no address"),
        ("http://me:hidden@proxy:port", r"found 'http://\(not shown\)@proxy:port'"),
    ],
)
def test_a_bad_proxy_is_told_by_its_variable(
    variable: str, proxy: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy)
    with pytest.raises(UserError, match=rf"^{variable}: .*{said}.* or name the server in NO_PROXY") as refused:
        transport(AWAY)
    assert "hidden" not in str(refused.value)
    transport("https://judge.invalid" if variable == "HTTP_PROXY" else "http://127.0.0.1:9")  # it is not for these


def test_a_socks_proxy_without_its_package_is_told_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy:1080")
    monkeypatch.setattr(connection, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^ALL_PROXY: .* SOCKS proxy .* pip install 'customized-grpo\[socks\]'"):
        transport(AWAY)


def test_a_connection_that_fails_tells_of_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="refused, through the proxy that HTTP_PROXY names"):
        transport(AWAY, deadline=0.3).post("/score", {})


def test_a_socks_proxy_that_answers_garbage_is_a_failed_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    asker, _ = listener.accept()
                    with closing(asker):
                        asker.recv(64)
                        asker.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("HTTP_PROXY", f"socks5://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(Unavailable, match=r"\([^;]+, through the proxy that HTTP_PROXY names"):
            transport(AWAY, deadline=0.5).post("/score", {})


@pytest.mark.parametrize(
    ("variable", "content"), [("SSL_CERT_FILE", None), ("SSL_CERT_FILE", "no PEM"), ("SSL_CERT_DIR", None)]
)
def test_bad_certificates_are_told_by_their_variable_where_they_are_needed(
    variable: str, content: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "certificates"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(variable, str(path))
    transport("http://127.0.0.1:9")
    with pytest.raises(UserError, match=rf"^{variable}: .*{path}.*; correct it, or unset it"):
        transport("https://judge.invalid")


def test_the_command_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toybox_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks4://proxy:1")
    options = [f"--data.path={toybox_data / 'train'}", f"--output={tmp_path / 'run'}", "--rewards.prompt.kind=remote"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *options, f"--rewards.prompt.remote.url={AWAY}"])
    assert ended.value.code == 2 and "error: ALL_PROXY: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://x", "http://", "http://host:port", "http://host:99999", ""]
)
def test_what_is_no_address_of_a_server(url: str) -> None:
    with pytest.raises(UserError, match=r"^rewards\.vlm_judge\.url: .* is no address .*expected http://host:port/path"):
        parsed_address("rewards.vlm_judge.url", url)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ALL_PROXY", "socks5://proxy:1"), ("http_proxy", "socks4://proxy"), ("SSL_CERT_FILE", "/nowhere.pem")],
)
@pytest.mark.parametrize(
    "options",
    [
        [
            "--policy.kind=flux1-kontext",
            "--policy.pipeline.model=nobody/x",
            "--rewards.prompt.kind=clip_t",
            "--rewards.identity.kind=dino",
        ],
        ["--rewards.identity.kind=dino", "--rewards.identity.dino.model=nobody/x"],
        ["--rewards.prompt.kind=hpsv2", "--rewards.prompt.hpsv2.model=nobody/x"],
        ["--rewards.prompt.kind=hpsv3"],
    ],
    ids=["policy", "encoder", "hpsv2", "hpsv3"],
)
def test_the_hub_is_not_asked_over_a_bad_way(
    options: list[str], variable: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toybox_data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(connection, "find_spec", lambda name: None)
    monkeypatch.setattr("customized_grpo.rewards.hpsv3.read_instruction", lambda path, field: "")
    monkeypatch.setenv(variable, value)
    folders = [f"--data.path={toybox_data / 'train'}", f"--output={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *folders, *options])
    assert ended.value.code == 2 and f"error: {variable}: " in capsys.readouterr().err
