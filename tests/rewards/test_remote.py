"""A reward on another machine: a real server on a real port, and one that misbehaves in every way a server can."""

import base64
import io
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fork_server import Process
from PIL import Image
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.rewards.http import MAX_RESPONSE_BYTES, Transport, Unavailable
from customized_grpo.rewards.remote import TOKEN, RemoteReward, encoded, parsed
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.rewards.score_request import Limits
from customized_grpo.rewards.server import RewardServer
from customized_grpo.types import PromptBatch

Answer = tuple[int, Any, dict[str, str]] | None
"""Status, body (bytes, or what becomes JSON) and headers; None: no answer at all."""


class Redness(Reward):
    """The mean of the red channel; images of prompts that begin with 'bad' have no score."""

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        values = images[:, :, 0].mean((-2, -1)) - batch.references[0][0].mean()
        valid = torch.tensor([[not prompt.startswith("bad")] * images.shape[1] for prompt in batch.prompts])
        return Scores(values, valid)


@pytest.fixture
def served() -> Iterator[Callable[..., RewardServer]]:
    servers: list[RewardServer] = []

    def start(reward: Reward | None = None, token: str | None = None, **limits: int) -> RewardServer:
        limits = {"max_images": 64, "max_pixels": 2**20, "max_bytes": 2**24} | limits
        server = RewardServer(("127.0.0.1", 0), reward or Redness(), "redness", Limits(**limits), token)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def misbehaving(server: Callable[..., Any]) -> Callable[..., tuple[str, list[dict[str, Any]]]]:
    """Starts a server that answers POSTs as the arguments say, one after the other, the last one ever after; returns
    its URL and what it was asked."""

    def start(*answers: Answer, health: Any = None) -> tuple[str, list[dict[str, Any]]]:
        def reply(question: dict[str, Any], number: int) -> Answer:
            answer = answers[min(number, len(answers) - 1)]
            if answer is None:
                time.sleep(2)
            return answer

        running = server(reply)
        running.about = 200, {"status": "ok", "reward": "test", "max_images": 64} if health is None else health
        return running.url.removesuffix("/v1"), running.asked

    return start


def url_of(server: RewardServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def transport(url: str, deadline: float = 5.0, **more: Any) -> Transport:
    return Transport("rewards.prompt.remote.url", url, deadline, longest_wait=0.05, **more)


def make_batch(groups: int = 2, size: int = 3, *, masks: bool = False) -> tuple[Tensor, PromptBatch]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (groups, size, 3, 8, 10), generator=draw).float() / 255
    references = [[torch.randint(0, 256, (3, 6, 4), generator=draw).float() / 255] for _ in range(groups)]
    cut = [[torch.ones(1, 6, 4)] for _ in range(groups)] if masks else None
    return images, PromptBatch([f"prompt {p}" for p in range(groups)], references, cut)


SCORES = {"values": [[0.1, 0.2, 0.3], [0.4, None, 0.6]], "valid": [[True] * 3, [True, False, True]]}


@pytest.mark.parametrize("masks", [False, True])
def test_scores_are_those_of_the_reward(masks: bool, served: Callable[..., RewardServer]) -> None:
    images, batch = make_batch(masks=masks)
    batch = PromptBatch(["fine", "bad one"], batch.references, batch.masks)
    found = RemoteReward(transport(url_of(served()))).score(images, batch)
    expected = Redness().score(images, batch)
    assert torch.allclose(found.values[0], expected.values[0], atol=1e-6)
    assert found.valid.tolist() == [[True] * 3, [False] * 3]


def test_a_large_reference_and_its_mask_are_sent_scaled_down(misbehaving: Callable[..., Any]) -> None:
    url, asked = misbehaving((200, {"values": [[0.5]], "valid": [[True]]}, {}))
    reference, mask = torch.full((3, 1200, 2048), 0.5), torch.ones(1, 1200, 2048)
    batch = PromptBatch(["a cat"], [[reference]], [[mask]])
    RemoteReward(transport(url), masks=True).score(torch.zeros(1, 1, 3, 8, 8), batch)
    for name in ("references", "masks"):
        with Image.open(io.BytesIO(base64.b64decode(asked[0][name][0][0]))) as picture:
            assert picture.size == (1024, 600)


def test_groups_go_in_as_few_requests_as_the_server_takes(served: Callable[..., RewardServer]) -> None:
    """More groups than fit in one: each still gets its own scores (the reference of its own request's first group)."""
    images, batch = make_batch(groups=5)
    batch = PromptBatch(batch.prompts, [batch.references[0]] * 5, None)
    expected = Redness().score(images, batch).values
    assert torch.allclose(
        RemoteReward(transport(url_of(served(max_images=7)))).score(images, batch).values, expected, atol=1e-6
    )
    # Groups of three are split as well: every image is scored by itself.
    assert torch.allclose(
        RemoteReward(transport(url_of(served(max_images=2)))).score(images, batch).values, expected, atol=1e-6
    )


@pytest.mark.parametrize(
    "first",
    [
        (429, {"error": "busy"}, {"Retry-After": "0"}),
        (500, {"error": "down"}, {}),
        (503, b"<html>", {}),
        (200, b"<html>not json</html>", {}),
    ],
    ids=["429", "500", "503", "garbage"],
)
def test_what_passes_is_tried_again(first: Answer, misbehaving: Callable[..., Any]) -> None:
    url, asked = misbehaving(first, first, (200, SCORES, {}))
    found = RemoteReward(transport(url)).score(*make_batch())
    assert len(asked) == 3 and asked[0] == asked[2]
    assert found.valid.tolist() == SCORES["valid"]
    assert found.values[1, 2] == pytest.approx(0.6)


@pytest.mark.parametrize(
    "answer",
    [None, (500, {}, {}), (200, b"garbage", {}), (200, {"values": [[1.0]], "valid": [[True]]}, {}), (200, [1], {})],
    ids=["hangs", "500", "not json", "too few", "not scores"],
)
def test_what_stays_wrong_is_invalid_and_never_a_number(answer: Answer, misbehaving: Callable[..., Any]) -> None:
    url, _ = misbehaving(answer)
    start = time.monotonic()
    found = RemoteReward(transport(url, deadline=0.5)).score(*make_batch())
    assert not found.valid.any() and found.values.isfinite().all()
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "answer",
    [
        {"values": [[10**400]], "valid": [[True]]},
        b"[" * 10**5,
        {"values": [[0.9]], "valid": [[7]]},
        {"values": [[0.9]], "valid": [["false"]]},
        {"values": [["0.9"]], "valid": [[True]]},
        {"values": [[True]], "valid": [[True]]},
        {"values": [{"0": 0.9}], "valid": [[True]]},
        b'{"values": [[0.9]], "valid": [[true]]}' + b" " * MAX_RESPONSE_BYTES,
    ],
    ids=["huge", "deep", "7", "text for a flag", "text", "flag", "object", "large"],
)
def test_garbage_is_no_score(answer: Any, misbehaving: Callable[..., Any]) -> None:
    url, _ = misbehaving((200, answer, {}))
    found = RemoteReward(transport(url, deadline=0.5)).score(*make_batch(1, 1))
    assert not found.valid.any() and found.values.isfinite().all()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, {}, {}), r"^rewards\.prompt\.remote\.url: http.* gave no answer within 2 s \(status 500"),
        ((429, {}, {"Retry-After": "20"}), r"\(status 429"),
        ((200, b"garbage", {}), "an answer that is not JSON"),
        (
            (200, {"values": [["tok"]], "valid": [[True]]}, {}),
            r"^rewards\.prompt\.remote\.url: no scores .* a value is a str",
        ),
        ((200, {"values": [[1.0]] * 2, "valid": [[True]] * 2}, {}), r"scores of \[2, 1\] for \[1, 1\] images"),
    ],
)
def test_a_failure_is_told(answer: Answer, said: str, misbehaving: Callable[..., Any]) -> None:
    url, _ = misbehaving(answer)
    found = RemoteReward(Transport("rewards.prompt.remote.url", url, 2.0)).score(*make_batch(1, 1))
    assert not found.valid.any()
    assert re.search(said, found.reason or "")


def test_a_failure_is_told_until_all_is_well(misbehaving: Callable[..., Any]) -> None:
    url, _ = misbehaving((200, {"values": "sk-secret"}, {}), (200, SCORES, {}))
    reward = RemoteReward(transport(url, token="sk-secret"))
    reason = reward.score(*make_batch()).reason
    assert reason is not None and "secret" not in reason
    assert reward.score(*make_batch()).reason is None


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"])
def test_a_server_that_drips_is_given_up_at_the_deadline(first: bytes) -> None:
    """A byte each tenth of a second, in the status line, the headers or the body."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with closing(connection), suppress(OSError):
                connection.sendall(first)
                while True:
                    connection.sendall(b"H")
                    time.sleep(0.1)

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        with pytest.raises(Unavailable, match=r"gave no answer within 0\.6 s"):
            transport(f"http://127.0.0.1:{server.getsockname()[1]}", deadline=0.6).post("/score", {})
        assert time.monotonic() - start < 30


def test_a_last_try_that_is_cut_off_hides_no_reason(misbehaving: Callable[..., Any]) -> None:
    url, _ = misbehaving((500, {}, {}), (200, b"garbage", {}), (500, {}, {}), None)
    with pytest.raises(Unavailable, match=r"within 2 s \(status 500; an answer that is not JSON, or too deep; \w"):
        transport(url, deadline=2.0).post("/score", {})


def test_neither_retry_after_nor_back_off_outlasts_the_deadline(misbehaving: Callable[..., Any]) -> None:
    url, _ = misbehaving((429, {}, {"Retry-After": "30"}))
    start = time.monotonic()
    with pytest.raises(Unavailable, match=r"within 0\.5 s"):
        Transport("rewards.prompt.remote.url", url, 0.5).post("/score", {})
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("status", [401, 403, 404])
def test_any_other_4xx_is_told_at_once(status: int, misbehaving: Callable[..., Any]) -> None:
    url, asked = misbehaving((status, {"error": "your fault"}, {}))
    with pytest.raises(
        UserError, match=rf"rewards\.prompt\.remote\.url: .* refused the request with status {status}: .*fault"
    ):
        RemoteReward(transport(url)).score(*make_batch())
    assert len(asked) == 1


def test_a_server_that_dies_and_comes_back() -> None:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    link = transport(f"http://127.0.0.1:{port}")
    server: list[RewardServer] = []

    def later() -> None:
        time.sleep(0.5)
        server.append(RewardServer(("127.0.0.1", port), Redness(), "r", Limits(9, 2**20, 2**20)))
        server[0].serve_forever()

    threading.Thread(target=later, daemon=True).start()
    answer = link.post("/score", _payload())
    assert len(answer["values"]) == 1
    server[0].shutdown()
    server[0].server_close()


def test_no_server() -> None:
    with pytest.raises(UserError, match=r"rewards\.prompt\.remote\.url: http://127\.0\.0\.1:9 does not answer"):
        RemoteReward(transport("http://127.0.0.1:9"))
    with pytest.raises(Unavailable, match=r"gave no answer within 0\.2 s"):
        transport("http://127.0.0.1:9", deadline=0.2).post("/score", {})


def test_another_server(misbehaving: Callable[..., Any]) -> None:
    url, _ = misbehaving((200, {}, {}), health={"hello": "world"})
    with pytest.raises(UserError, match=r"is no reward server .* start one with: customized-grpo serve-reward NAME"):
        RemoteReward(transport(url))


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_token_is_wanted(token: str | None, served: Callable[..., RewardServer]) -> None:
    url = url_of(served(token="right"))
    with pytest.raises(UserError, match="does not answer .*401"):
        RemoteReward(transport(url, token=token))
    assert httpx2.post(url + "/score", json=_payload()).status_code == 401
    assert RemoteReward(transport(url, token="right")).score(*make_batch()).valid.all()


def _payload(**changes: Any) -> dict[str, Any]:
    picture = encoded(torch.rand(3, 4, 4))
    return {"prompts": ["a"], "images": [[picture]], "references": [[picture]], "masks": None} | changes


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"images": [[encoded(torch.rand(3, 4, 4))] * 65]}, 413, "65 images, and 64 are taken at once"),
        ({"images": [["not base64!"]]}, 400, "not a request for scores"),
        ({"images": [["aGVsbG8="]]}, 400, "pictures are PNGs"),
        ({"images": [[encoded(torch.rand(3, 4, 4)), encoded(torch.rand(3, 5, 4))]]}, 400, "all of one size"),
        ({"images": [[encoded(torch.zeros(3, 1, 5000))]]}, 400, "5000x1; a side is at most 32 times the other"),
        ({"prompts": ["a", "b"]}, 400, "differ in number"),
        ({"prompts": [7]}, 400, "prompts are strings"),
        ({"references": None}, 400, "not a request for scores"),
    ],
)
def test_bad_requests_are_refused(
    changes: dict[str, Any], status: int, said: str, served: Callable[..., RewardServer]
) -> None:
    answer = httpx2.post(url_of(served()) + "/score", json=_payload(**changes))
    assert answer.status_code == status and said in answer.json()["error"]


def test_a_reward_that_fails_is_told_at_once(
    served: Callable[..., RewardServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Redness, images: Tensor, batch: PromptBatch) -> Scores:
        raise RuntimeError("no such part")

    monkeypatch.setattr(Redness, "score", fail)
    with pytest.raises(UserError, match=r"status 422: .*the reward failed: RuntimeError: no such part"):
        RemoteReward(transport(url_of(served()))).score(*make_batch())


def test_requests_that_are_too_large_or_not_json(served: Callable[..., RewardServer]) -> None:
    url = url_of(served(max_bytes=100))
    assert httpx2.post(url + "/score", json=_payload()).status_code == 413
    assert httpx2.post(url + "/score", content=b"{").status_code == 400
    assert httpx2.get(url + "/other").status_code == 404
    limits = {"max_images": 64, "max_pixels": 2**20, "max_bytes": 100}
    assert httpx2.get(url + "/health").json() == {"status": "ok", "reward": "redness"} | limits


@pytest.mark.parametrize("answer", [None, {}, {"values": [[1.0]]}, {"values": [["a"]], "valid": [[True]]}, []])
def test_answers_without_scores(answer: Any) -> None:
    with pytest.raises(ValueError, match="no scores in the answer"):
        parsed(answer, (1, 1))


def test_numbers_that_are_not_finite_are_not_valid() -> None:
    values, valid = parsed({"values": [[float("inf"), None, 2.0]], "valid": [[True, True, True]]}, (1, 3))
    assert valid.tolist() == [[False, False, True]] and values.tolist() == [[0.0, 0.0, 2.0]]


def test_the_command_serves(tmp_path: Path, python: Callable[..., Process]) -> None:
    (tmp_path / "mine.py").write_text("def red(images, task):\n    return images[:, :, 0].mean((-2, -1))\n")
    process = python("-m", "customized_grpo", "serve-reward", "python:mine.red", "--port", 0, env={TOKEN: "s3"})
    while not (said := process.written()[0]).endswith("\n"):
        assert process.poll() is None, process.written()
        time.sleep(0.05)
    assert said.startswith("serving python:mine.red on http://127.0.0.1:") and "a token is wanted" in said
    assert "s3" not in said
    images, batch = make_batch()
    found = RemoteReward(transport(said.split()[3], token="s3")).score(images, batch)
    assert torch.allclose(found.values, images[:, :, 0].mean((-2, -1)), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nothing"], "no reward 'nothing'; choose dino, clip_i, clip_t"),
        (["python:mine.red", "--model", "x"], "--model: only for dino or clip_i"),
        (["python:nowhere.red"], "module 'nowhere' could not be imported"),
        (["dino", "--backbone", "x"], "--backbone: only for hpsv2 or hpsv3"),
        (["hpsv3", "--model", "nowhere.safetensors", "--instruction", "x"], "--instruction: x is no file"),
        (["dino", "--max_images", "0"], "--max_images: 0 takes no request"),
        (["dino", "--model", "nobody/nothing"], "--model: nobody/nothing could not be loaded"),
    ],
)
def test_what_cannot_be_served(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from customized_grpo.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["serve-reward", *options])
    assert ended.value.code == 2 and said in capsys.readouterr().err
