"""What a dry run says: counted operations add up, and every setting that costs shows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from customized_grpo.config import Config
from customized_grpo.estimate import ADAM_BYTES, Estimate, Subject, estimate

WIDTH, TOKENS, DEPTH = 8, 6, 4


class Layers(nn.Module):
    """`DEPTH` linear layers with a nonlinearity, over tokens [b, TOKENS, WIDTH]; the last one is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        self.requires_grad_(False)
        self.layers[-1].requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class LinearPolicy:
    """The members of a policy that an estimate looks at."""

    size, latent_shape, device = (16, 16), torch.Size((TOKENS, WIDTH)), torch.device("cpu")

    def __init__(self) -> None:
        self.network = Layers()

    def sigmas(self, num_steps: int, shift: float | None) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        return self.network(latents)

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ torch.ones(WIDTH, WIDTH)

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]


ONE = 2 * TOKENS * WIDTH * WIDTH
"""Operations of one linear layer on one sample."""


def found(checkpointed: int = 0, processes: int = 1, **rollout: Any) -> Estimate:
    settings = {"prompts_per_iteration": 3, "group_size": 4, "num_steps": 6, "subset_share": 0.6, **rollout}
    config = Config.model_validate({"rollout": settings, "optimizer": {"micro_batch": 2}})
    policy = LinearPolicy()
    subject = Subject(policy, policy.network, None, 100.0, checkpointed, 7.0)  # type: ignore[arg-type]
    return estimate(config, subject, processes)


def test_operations_are_those_of_the_layers() -> None:
    estimated = found()
    assert estimated.flops["rollout"] == 3 * 4 * 6 * DEPTH * ONE
    assert estimated.flops["decoding"] == 3 * 4 * ONE
    # Forwards, and backwards through the trained layer alone, whose input needs no gradient.
    assert estimated.flops["update"] == 3 * 4 * 3 * (DEPTH + 1) * ONE
    assert estimated.parameters == (DEPTH - 1) * WIDTH * WIDTH and estimated.trainable == WIDTH * WIDTH


def test_all_weights_trained_are_all_weights() -> None:
    config = Config.model_validate({"policy": {"adapter": "full"}})
    policy = LinearPolicy()
    policy.network.requires_grad_(True)
    subject = Subject(policy, policy.network, None, 0.0, 0, 0.0)  # type: ignore[arg-type]
    estimated = estimate(config, subject)
    assert estimated.parameters == estimated.trainable == DEPTH * WIDTH * WIDTH
    assert "(100.00%)" in estimated.rows()["trained"]


def test_checkpointing_computes_each_forward_again() -> None:
    assert found(checkpointed=DEPTH).flops["update"] == 3 * 4 * 3 * (2 * DEPTH + 1) * ONE


def test_steps_before_a_window_are_walked_once_by_a_group() -> None:
    windowed = found(steps="window", window_size=2, window_start=2)
    assert windowed.flops["rollout"] == (3 * 2 + 12 * 4) * DEPTH * ONE
    assert windowed.flops["update"] == 12 * 2 * (DEPTH + 1) * ONE


def test_of_several_processes_it_is_of_the_one_with_the_most_groups() -> None:
    alone, shared = found(), found(processes=2)
    assert {name: flops * 2 / 3 for name, flops in alone.flops.items()} == pytest.approx(shared.flops)
    assert shared.memory == alone.memory | {"trajectories": alone.memory["trajectories"] * 2 / 3}


def test_memory_is_what_must_be_there_at_once() -> None:
    estimated = found()
    assert estimated.memory["frozen weights"] == 100
    assert estimated.memory["trained parameters, gradients, moments"] == ADAM_BYTES * WIDTH * WIDTH
    assert estimated.memory["trajectories"] == 2 * 36 * TOKENS * WIDTH * 4
    # A trained layer's input, and what the last tanh and the square keep.
    tensor = TOKENS * WIDTH * 4
    assert estimated.memory["activations of a micro-batch"] == pytest.approx(2 * 2 * tensor, abs=2 * tensor)
    assert estimated.peak_bytes == sum(estimated.memory.values())
    checkpointed = found(checkpointed=DEPTH).memory["activations of a micro-batch"]
    assert checkpointed == estimated.memory["activations of a micro-batch"] / DEPTH + 2 * DEPTH * 7


def test_rows_are_readable() -> None:
    rows = found().rows()
    assert rows["trained"].startswith("0.00 M") and rows["expected peak memory"].endswith("KiB")
    assert rows["operations an iteration, rollout"] == f"{3 * 4 * 6 * DEPTH * ONE / 1000:.1f} kFLOP"
