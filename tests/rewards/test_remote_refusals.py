"""A reward server that refuses some images, or all, or dies between requests."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.rewards.http import Transport
from customized_grpo.rewards.remote import RemoteReward, encoded
from customized_grpo.types import PromptBatch

Start = Callable[[Callable[[dict[str, Any], int], tuple[Any, ...]]], Any]


def remote(running: Any, deadline: float = 10.0) -> RemoteReward:
    transport = Transport("rewards.prompt.remote.url", running.url, deadline, longest_wait=0.05)
    return RemoteReward(transport, masks=True)


def make_batch(groups: int, size: int, *, masks: bool = False) -> tuple[Tensor, PromptBatch]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (groups, size, 3, 6, 6), generator=draw).float() / 255
    references = torch.rand(groups, 1, 3, 5, 5, generator=draw)
    return images, PromptBatch(
        [f"prompt {p}" for p in range(groups)], references, torch.ones(groups, 1, 1, 5, 5) if masks else None
    )


def scored(question: dict[str, Any]) -> tuple[int, Any]:
    """To each image a number of its own: whatever the request, its score is the same."""
    values = [[sum(map(ord, image)) / 1e4 for image in group] for group in question["images"]]
    return 200, {"values": values, "valid": [[True] * len(row) for row in values]}


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("masks", [False, True])
def test_a_refused_image_is_invalid_alone_and_the_others_keep_their_scores(
    status: int, masks: bool, server: Start
) -> None:
    images, batch = make_batch(3, 4, masks=masks)
    bad = encoded(images[1, 2])

    def reply(question: dict[str, Any], number: int) -> tuple[Any, ...]:
        if any(bad in group for group in question["images"]):
            return status, {"error": "no faces"}
        assert (question["masks"] is None) == (not masks)
        return scored(question)

    running = server(reply)
    reward = remote(running)
    found = reward.score(images, batch)
    assert found.valid.tolist() == [[True] * 4, [True, True, False, True], [True] * 4]
    expected = remote(server(lambda question, number: scored(question))).score(images, batch)
    assert torch.equal(found.values[found.valid], expected.values[found.valid])
    assert found.reason is not None and found.reason.endswith(f"with status {status}: no faces")
    # All of them, a trial image, three groups, and the images of one.
    assert len(running.asked) == 1 + 1 + 3 + 4


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_server_that_refuses_every_image_ends_the_run_at_once(status: int, server: Start) -> None:
    running = server(lambda question, number: (status, {"error": "out of memory"}))
    with pytest.raises(UserError, match=rf"status {status}: out of memory; a trial image, all grey, was refused too"):
        remote(running).score(*make_batch(20, 3))
    assert len(running.asked) == 2


def test_a_server_that_is_too_small_for_the_whole_gets_parts(server: Start) -> None:
    def reply(question: dict[str, Any], number: int) -> tuple[Any, ...]:
        return scored(question) if sum(map(len, question["images"])) <= 2 else (413, {"error": "too much"})

    assert remote(server(reply)).score(*make_batch(3, 4)).valid.all()


def test_a_dead_server_is_asked_one_request_of_many(server: Start) -> None:
    go = threading.Event()
    running = server(lambda question, number: scored(question) if number == 0 or go.wait(60) else (500, {}))
    running.about = 200, {"max_images": 3}
    reward = remote(running, deadline=0.5)
    images, batch = make_batch(10, 3)
    found = reward.score(images, batch)
    assert found.valid.tolist() == [[True] * 3] + [[False] * 3] * 9 and len(running.asked) == 2
    assert "gave no answer within 0.5 s" in (found.reason or "")
    go.set()
    assert reward.score(images, batch).valid.all()
