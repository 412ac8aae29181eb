"""The reward server under load, out of memory, and with clients that are slow, gone, or send what is no request."""

import base64
import io
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import httpx2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.rewards import remote
from customized_grpo.rewards import server as serve
from customized_grpo.rewards.custom import CustomReward
from customized_grpo.rewards.http import Transport
from customized_grpo.rewards.remote import RemoteReward, encoded
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.rewards.score_request import MAX_VALUES, Limits, Refused, read_request
from customized_grpo.rewards.server import RewardServer
from customized_grpo.types import PromptBatch

WAIT = 30.0
"""Seconds after which a test fails that waits for something."""
LIMITS = Limits(max_images=64, max_pixels=2**16, max_bytes=2**25)


class Brightness(Reward):
    """The mean of an image and of its group's references and masks, which decides nothing else."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.may_go = threading.Event()
        self.may_go.set()

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        self.asked.append((images.shape[0], images.shape[1]))
        assert self.may_go.wait(WAIT)
        others = [
            torch.stack([picture.mean() for picture in (*row, *(batch.masks[p] if batch.masks else ()))]).mean()
            for p, row in enumerate(batch.references)
        ]
        return Scores(images.mean((-3, -2, -1)) + torch.stack(others)[:, None], torch.ones(images.shape[:2]) > 0)


class Failing(Reward):
    """Raises `error` once, then scores."""

    def __init__(self, error: Callable[[], Any]) -> None:
        self._errors, self._well = [error], Brightness()

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        if self._errors:
            self._errors.pop()()
        return self._well.score(images, batch)


def raising(error: Exception) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


@pytest.fixture
def start() -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:

        def served(reward: Reward | None = None, limits: Limits = LIMITS, patience: float = WAIT) -> str:
            server = stack.enter_context(RewardServer(("127.0.0.1", 0), reward or Brightness(), "test", limits))
            server.patience = patience
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield served


def client(url: str) -> RemoteReward:
    return RemoteReward(Transport("rewards.prompt.remote.url", url, WAIT, longest_wait=0.05), masks=True)


def make_batch(groups: int = 2, size: int = 3, side: int = 8) -> tuple[Tensor, PromptBatch]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (groups, size, 3, side, side), generator=draw).float() / 255
    references = [[torch.randint(0, 256, (3, 6, 4), generator=draw).float() / 255] for _ in range(groups)]
    masks = [[torch.randint(0, 2, (1, 6, 4), generator=draw).float()] for _ in range(groups)]
    return images, PromptBatch([f"prompt {p} 🐈" for p in range(groups)], references, masks)


def request(**changes: Any) -> dict[str, Any]:
    picture = encoded(torch.rand(3, 4, 4))
    return {"prompts": ["a"], "images": [[picture]], "references": [[picture]], "masks": None} | changes


def chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)


def header(width: int, height: int) -> bytes:
    return chunk(b"IHDR", width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0]))


def png(width: int, height: int, *more: bytes) -> str:
    """The base64 of a greyscale PNG that has no pixels."""
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header(width, height) + b"".join(more)).decode()


def two_headers(width: int, height: int) -> str:
    """A PNG that says 8 x 8 at first, with the pixels of the size that it says afterwards."""
    pixels = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return png(8, 8, header(width, height), pixels)


def connected(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=WAIT)


def head(length: int) -> bytes:
    return f"POST /score HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode()


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# What a request holds is bounded.


@pytest.mark.parametrize("name", ["images", "references", "masks"])
def test_pixels_are_counted_before_anything_is_decoded(name: str, start: Callable[..., str]) -> None:
    """These pictures have no pixels at all: decoding them would be a 400."""
    rest = {"masks": [[]]} if name != "masks" else {}
    body = request(**rest | {name: [[png(200, 200)] * 2]})
    answer = httpx2.post(start() + "/score", json=body)
    assert answer.status_code == 413
    assert "pixels in images, references and masks, and 65536 are taken at once" in answer.json()["error"]


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"images": [[png(8, 8)]]}, 400, "not a request for scores"),
        ({"images": [[two_headers(9, 9)]]}, 400, "a picture has two headers"),
        ({"images": [[two_headers(20000, 20000)]]}, 400, "not a request for scores"),
        ({"images": [[png(4000, 4)]]}, 400, "a picture of 4000x4; a side is at most 32 times the other"),
        ({"images": [[png(9000, 9000)]]}, 400, "a picture of 9000x9000, more than 50,000,000 pixels"),
        ({"images": [[png(0, 0)]]}, 400, "not a request for scores"),
        ({"references": [[encoded(torch.rand(1, 1, 1))] * 4097]}, 413, "4097 references and masks, and 4096 are taken"),
        ({"prompts": ["x" * 2**17]}, 400, "at most 65536 characters"),
        ({"prompts": {"a": 1}}, 400, "prompts are strings"),
        ({"images": ["abc"]}, 400, "images: expected a list of pictures for each prompt"),
        ({"images": [[7]]}, 400, "images: expected the base64 of PNGs"),
        ({"images": [[]]}, 400, "expected images"),
        ({"images": []}, 400, "differ in number"),
        ({"masks": [[png(3, 3)], []]}, 400, "differ in number"),
    ],
)
def test_what_is_no_request_is_refused(
    changes: dict[str, Any], status: int, said: str, start: Callable[..., str]
) -> None:
    answer = httpx2.post(start() + "/score", json=request(**changes))
    assert answer.status_code == status and said in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 10**5, 400),
        (b"[" + b"[]," * (MAX_VALUES // 2) + b"[]]", 413),
        (b"[1]", 400),
        (b"\xff\xfe", 400),
        (b"", 400),
        (b"9" * 5000, 400),
    ],
    ids=["deep", "many values", "a list", "not utf-8", "empty", "a huge number"],
)
def test_json_that_is_no_request_is_refused(body: bytes, status: int, start: Callable[..., str]) -> None:
    assert httpx2.post(start() + "/score", content=body).status_code == status


@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_png_is_refused_or_read(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    Image.new("P", (5, 4)).save(buffer, "PNG")
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(8, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    text = base64.b64encode(damaged[: data.draw(st.integers(20, len(damaged)))]).decode()
    with suppress(Refused):
        read_request(bytearray(json.dumps(request(images=[[text]])).encode()), LIMITS)


def test_a_body_is_let_go_once_it_is_read() -> None:
    body = bytearray(json.dumps(request()).encode())
    read_request(body, LIMITS)
    assert not body


# The client splits by what the server says it takes.


IMAGE_BYTES = len(encoded(make_batch()[0][0, 0]))
"""Of an image of `batch`: about 300."""


@pytest.mark.parametrize(
    ("limits", "requests"),
    [
        (LIMITS, [(4, 3)]),
        (Limits(64, 2 * (3 * 64 + 48), 2**25), [(2, 3), (2, 3)]),
        (Limits(64, 3 * 64 + 40, 2**25), [(1, 2), (1, 1)] * 4),
        (Limits(64, 2**16, 5 * IMAGE_BYTES), [(1, 3)] * 4),
        (Limits(64, 2**16, 4 * IMAGE_BYTES), [(1, 2), (1, 1)] * 4),
    ],
    ids=["one request", "groups by pixels", "images by pixels", "groups by bytes", "images by bytes"],
)
def test_the_client_splits_by_pixels_and_bytes(
    limits: Limits, requests: list[tuple[int, int]], start: Callable[..., str]
) -> None:
    images, batch = make_batch(groups=4)
    reward = Brightness()
    found = client(start(reward, limits)).score(images, batch)
    assert reward.asked == requests
    assert found.valid.all() and torch.allclose(found.values, Brightness().score(images, batch).values, atol=1e-6)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (
            Limits(64, 100, 2**25),
            r"takes 100 pixels at once, and an image with its references has 112; .* --max_pixels",
        ),
        (Limits(64, 2**16, 500), r"takes 500 bytes at once, and an image with its references has \d+; .* --max_bytes"),
    ],
)
def test_an_image_that_the_server_never_takes_is_told_at_once(
    limits: Limits, said: str, start: Callable[..., str]
) -> None:
    reward = Brightness()
    with pytest.raises(UserError, match=said):
        client(start(reward, limits)).score(*make_batch())
    assert not reward.asked


def test_each_picture_is_encoded_once(start: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    images, batch = make_batch(groups=4)
    # As if each were read from the same file.
    batch = PromptBatch(batch.prompts, [[batch.references[0][0].clone()] for _ in range(4)], None)
    seen: list[Tensor] = []
    monkeypatch.setattr(remote, "encoded", lambda picture: (seen.append(picture), encoded(picture))[1])
    reward = Brightness()
    client(start(reward, Limits(2, 2**16, 2**25))).score(images, batch)
    assert len(reward.asked) == 8 and len(seen) == 4 * 3 + 1


# Errors of the reward.


def run_out_of_memory(images: Tensor, batch: PromptBatch) -> Tensor:
    return torch.empty(2**50)


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.empty(2**50),
        raising(MemoryError()),
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        raising(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")),
        lambda: CustomReward("python:mine.f", run_out_of_memory).score(*make_batch()),
    ],
    ids=["cpu", "python", "cuda", "mps", "own reward"],
)
def test_out_of_memory_is_tried_again(error: Callable[[], Any], start: Callable[..., str]) -> None:
    url = start(Failing(error))
    answer = httpx2.post(url + "/score", json=request())
    assert answer.status_code == 503 and "out of memory" in answer.json()["error"]
    assert client(start(Failing(error))).score(*make_batch()).valid.all()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("tail"), "the reward failed: KeyError: 'tail'"),
        (RuntimeError("shapes differ"), "the reward failed: RuntimeError: shapes differ"),
        (AssertionError(), "the reward failed: AssertionError: AssertionError"),
        (UserError("python:mine.f raised it"), "the reward failed: python:mine.f raised it"),
    ],
)
def test_any_other_error_of_the_reward_is_told(error: Exception, said: str, start: Callable[..., str]) -> None:
    answer = httpx2.post(start(Failing(raising(error))) + "/score", json=request())
    assert answer.status_code == 422 and answer.json()["error"] == said


# Clients.


def test_two_bodies_are_in_memory_however_many_clients_send(start: Callable[..., str]) -> None:
    """Further ones stay in the buffers of their connections, which are smaller."""
    reward = Brightness()
    reward.may_go.clear()
    url = start(reward)
    body = json.dumps(request()).encode().ljust(2**25)
    sent: list[int] = []
    done: list[int] = []

    def send(number: int) -> None:
        with closing(connected(url)) as connection:
            connection.sendall(head(len(body)))
            connection.sendall(body)
            sent.append(number)
            if connection.recv(12) == b"HTTP/1.0 200":
                done.append(number)

    threads = [threading.Thread(target=send, args=(number,), daemon=True) for number in range(5)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(sent) == 2 and reward.asked == [(1, 1)])
    time.sleep(0.3)
    assert len(sent) == 2 and reward.asked == [(1, 1)]
    reward.may_go.set()
    eventually(lambda: len(done) == 5)


def test_slow_clients_do_not_keep_others_out(start: Callable[..., str]) -> None:
    """Two hold the places for bodies and send nothing more."""
    url = start(patience=0.2)
    with closing(connected(url)) as first, closing(connected(url)) as second:
        for connection in (first, second):
            connection.sendall(head(1000) + b"{")
        assert client(url).score(*make_batch()).valid.all()
        for connection in (first, second):
            said = connection.makefile("rb").read()
            assert said.startswith(b"HTTP/1.0 503") and b"1 of 1000 bytes came in time" in said


@pytest.mark.parametrize("beginning", [b"", b"POST", b"POST /score HTTP/1.1\r\nContent-Le"])
def test_headers_that_do_not_come_are_not_waited_for(beginning: bytes, start: Callable[..., str]) -> None:
    with closing(connected(start(patience=0.2))) as connection:
        connection.sendall(beginning)
        connection.makefile("rb").read()  # until the server closes


def test_one_connection_too_many_is_closed(start: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "CONNECTIONS", 2)
    url = start(patience=10 * WAIT)
    with closing(connected(url)), closing(connected(url)), closing(connected(url)) as third:
        assert third.recv(1) == b""
    assert client_when_free(url).score(*make_batch()).valid.all()


def client_when_free(url: str) -> RemoteReward:
    end = time.monotonic() + WAIT
    while True:
        try:
            return client(url)
        except UserError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_client_that_is_gone_is_not_scored(start: Callable[..., str]) -> None:
    reward = Brightness()
    reward.may_go.clear()
    url = start(reward)
    body = json.dumps(request()).encode()
    with closing(connected(url)) as first:
        first.sendall(head(len(body)) + body)
        eventually(lambda: len(reward.asked) == 1)
        with closing(connected(url)) as second:
            second.sendall(head(len(body)) + body)
        reward.may_go.set()
        assert first.recv(12) == b"HTTP/1.0 200"
    assert httpx2.post(url + "/score", content=body).status_code == 200
    assert len(reward.asked) == 2


@pytest.mark.parametrize(
    ("length", "status"), [("-1", 411), ("", 411), ("x", 411), ("9" * 5000, 413), (str(2**25 + 1), 413)]
)
def test_a_length_that_is_none_is_refused(length: str, status: int, start: Callable[..., str]) -> None:
    with closing(connected(start())) as connection:
        connection.sendall(f"POST /score HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
        assert connection.recv(12) == f"HTTP/1.0 {status}".encode()


def test_other_methods(start: Callable[..., str]) -> None:
    url = start()
    probe = httpx2.head(url + "/health")
    assert (probe.status_code, probe.content) == (200, b"")
    answer = httpx2.put(url + "/score", json=request())
    assert answer.status_code == 501 and "PUT" in answer.json()["error"]
