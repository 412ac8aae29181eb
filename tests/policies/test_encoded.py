"""Batches of encoded prompts: equal shapes together, and each tensor moved to the device once a micro-batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from customized_grpo.policies.diffusers_policy import DiffusersPolicy
from customized_grpo.policies.pipelines.encoded import EncodedBatch, EncodedPrompt
from customized_grpo.policies.sampling import sample_ode

CPU, META = torch.device("cpu"), torch.device("meta")
SHARED = torch.arange(2.0)
ROWS = (
    EncodedPrompt({"text": torch.ones(3, 2), "negative": SHARED}, ((16, 16),)),
    EncodedPrompt({"text": torch.ones(4, 2), "negative": SHARED}, ((16, 16),)),
    EncodedPrompt({"text": torch.zeros(3, 2), "negative": SHARED}, ((16, 16),)),
)


class Moves(TorchFunctionMode):
    """Counts how often one of `tensors` is moved."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.watched, self.count = {id(tensor) for tensor in tensors}, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is Tensor.to and id(args[0]) in self.watched
        return function(*args, **(kwargs or {}))


def test_rows_of_equal_shapes_are_one_batch() -> None:
    one, other = EncodedBatch(ROWS, torch.tensor([0, 1, 2, 0])).batches(CPU)
    assert one.indices.tolist() == [0, 2, 3] and other.indices.tolist() == [1]
    assert one["text"].shape == (3, 3, 2) and other["text"].shape == (1, 4, 2)
    assert one["text"][:, 0, 0].tolist() == [1, 0, 1]


def test_a_batch_is_moved_once_to_each_device() -> None:
    batch = EncodedBatch(ROWS, torch.arange(3))
    with Moves([SHARED, *(row.tensors["text"] for row in ROWS)]) as moves:
        first = batch.batches(CPU)
        assert batch.batches(CPU) is first
    assert moves.count == 4  # three texts, and what the rows share
    assert {tensor.device for part in batch.batches(META) for tensor in part.tensors.values()} == {META}
    assert batch.batches(CPU) is first
    assert batch.take(torch.tensor([0])).batches(CPU)[0].indices.tolist() == [0]


def test_all_steps_of_a_micro_batch_share_one_move(
    load: Callable[..., DiffusersPolicy], picture: Callable[..., Tensor]
) -> None:
    policy = load("flux1-kontext")
    references = [[policy.prepare_reference(picture(64, 64), 1)], [policy.prepare_reference(picture(48, 80), 1)]]
    condition = policy.encode(["a cat", "a dog"], references)
    tensors = {id(tensor): tensor for row in condition.rows for tensor in row.tensors.values()}
    noise, sigmas = torch.randn(2, *policy.latent_shape), policy.sigmas(4, 3.0)
    with Moves(list(tensors.values())) as moves:
        sample_ode(policy, condition, noise, sigmas, micro_batch=1)
    assert moves.count == sum(len(row.tensors) for row in condition.rows)
