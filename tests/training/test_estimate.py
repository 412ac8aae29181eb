"""What a dry run says: counted operations add up, and every setting that costs shows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from customized_grpo.config.run import Config
from customized_grpo.factory.rewards import build_rewards
from customized_grpo.training.dry_run import dry_run
from customized_grpo.training.estimate import Estimate, LivePeak, ProfileTarget, estimate

WIDTH, TOKENS, DEPTH = 8, 6, 4


class Layers(nn.Module):
    """`DEPTH` linear layers with a nonlinearity, over tokens [b, TOKENS, WIDTH]; the last one is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        self.requires_grad_(False)
        self.layers[-1].requires_grad_(True)
        self._again = False

    def compute_again(self) -> float:
        self._again = True
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(self._one, layer, x, use_reentrant=False) if self._again else self._one(layer, x)
        return x

    def _one(self, layer: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(layer(x))


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


def found(
    processes: int = 1, changes: Mapping[str, Any] | None = None, checkpointing: bool = False, **rollout: Any
) -> Estimate:
    settings = {
        "prompts_per_iteration": 3,
        "group_size": 4,
        "num_steps": 6,
        "subset": {"timestep_fraction": 0.6},
        **rollout,
    }
    config = Config.model_validate({"rollout": settings, "optimizer": {"micro_batch": 2}} | dict(changes or {}))
    policy = LinearPolicy()
    checkpoint = policy.network.compute_again if checkpointing else None
    subject = ProfileTarget(policy, policy.network, lambda count: None, 100.0, checkpoint)  # type: ignore[arg-type]
    return estimate(config, subject, processes)


def test_operations_are_those_of_the_layers() -> None:
    estimated = found()
    assert estimated.flops["rollout"] == 3 * 4 * 6 * DEPTH * ONE
    assert estimated.flops["decoding"] == 3 * 4 * ONE
    # Forwards, and backwards through the trained layer alone, whose input needs no gradient.
    assert estimated.flops["update"] == 3 * 4 * 3 * (DEPTH + 1) * ONE
    assert estimated.parameters == (DEPTH - 1) * WIDTH * WIDTH and estimated.trainable == WIDTH * WIDTH


def test_all_weights_trained_are_all_weights() -> None:
    config = Config.model_validate({"policy": {"toybox": {"adapter": "full"}}})
    policy = LinearPolicy()
    policy.network.requires_grad_(True)
    subject = ProfileTarget(policy, policy.network, lambda count: None, 0.0)  # type: ignore[arg-type]
    estimated = estimate(config, subject)
    assert estimated.parameters == estimated.trainable == DEPTH * WIDTH * WIDTH
    assert "(100.00%)" in estimated.rows()["trained"]


def test_checkpointing_computes_each_forward_again() -> None:
    assert found(checkpointing=True).flops["update"] == 3 * 4 * 3 * (2 * DEPTH + 1) * ONE


def test_steps_before_a_window_are_walked_once_by_a_group() -> None:
    windowed = found(trained_steps="window", window={"size": 2, "start": 2})
    assert windowed.flops["rollout"] == (3 * 2 + 12 * 4) * DEPTH * ONE
    assert windowed.flops["update"] == 12 * 2 * (DEPTH + 1) * ONE


def test_of_several_processes_it_is_of_the_one_with_the_most_groups() -> None:
    alone, shared = found(), found(processes=2)
    assert {name: flops * 2 / 3 for name, flops in alone.flops.items()} == pytest.approx(shared.flops)
    assert shared.memory == alone.memory
    assert shared.phases["update"]["trajectories"] == alone.phases["update"]["trajectories"] * 2 / 3
    assert shared.phases["decoding"]["pictures"] == alone.phases["decoding"]["pictures"] * 2 / 3


def test_memory_is_what_must_be_there_at_once() -> None:
    estimated = found()
    assert estimated.memory["frozen weights"] == 100
    assert estimated.memory["trained parameters and moments"] == 3 * 4 * WIDTH * WIDTH
    update = estimated.phases["update"]
    assert update["gradients"] == 4 * WIDTH * WIDTH and update["trajectories"] == 2 * 36 * TOKENS * WIDTH * 4
    # Of both samples: the trained layer's input and output, and what the backward pass makes of them.
    tensor = TOKENS * WIDTH * 4
    activations = update["activations of a micro-batch"]
    assert 2 * 3 * tensor < activations < 2 * 8 * tensor
    doubled = found(changes={"optimizer": {"micro_batch": 4}}).phases["update"]["activations of a micro-batch"]
    assert doubled == pytest.approx(2 * activations, rel=0.01)
    assert update["pictures"] == 12 * tensor
    # Without gradients there are a layer's input, its product and what tanh makes of it; decoding makes a matrix, and
    # the picture.
    assert estimated.phases["rollout"]["activations of a micro-batch"] == 12 * 3 * tensor
    decoding = estimated.phases["decoding"]
    assert decoding["activations of a micro-batch"] == 12 * tensor + 4 * WIDTH * WIDTH
    assert decoding["pictures"] == 12 * tensor


def test_the_peak_is_that_of_one_phase() -> None:
    estimated = found()
    tops = {phase: sum(top.values()) for phase, top in estimated.phases.items()}
    assert list(tops) == ["rollout", "decoding", "update"]
    assert estimated.peak_bytes == sum(estimated.memory.values()) + max(tops.values())
    assert estimated.rows()["expected peak memory"].endswith(f", in the {max(tops, key=tops.__getitem__)}")


def test_an_average_is_held_and_swapped_in() -> None:
    plain, averaged, unused = (
        found(changes=changes) for changes in ({}, {"ema": {"decay": 0.9}}, {"ema": {"decay": 0.9, "evaluate": False}})
    )
    copy = 4 * WIDTH * WIDTH
    assert sum(averaged.memory.values()) == sum(plain.memory.values()) + copy == sum(unused.memory.values())
    assert averaged.phases["evaluation"]["copy of the trained parameters"] == copy
    assert "evaluation" not in {**plain.phases, **unused.phases}
    assert averaged.disk["a checkpoint"] > plain.disk["a checkpoint"] + copy
    # The last weights and the best validation's, and beside these the average.
    assert (plain.disk["adapters at the end"], averaged.disk["adapters at the end"]) == (2 * copy, 3 * copy)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"iterations": 50, "checkpoint": {"every": 10}}, 3),
        ({"iterations": 15, "checkpoint": {"every": 10}}, 2),
        ({"iterations": 100, "checkpoint": {"every": 10, "keep_last": 3}}, 4),
        ({"iterations": 100, "checkpoint": {"every": 10, "keep_every": 20}}, 8),
    ],
)
def test_checkpoints_are_counted_at_their_most(changes: dict[str, Any], count: int) -> None:
    disk = found(changes=changes).disk
    assert disk[f"at most {count} checkpoints"] == count * disk["a checkpoint"]


@pytest.mark.parametrize("changes", [{}, {"ema.decay": 0.9}])
def test_a_checkpoint_and_the_adapters_take_what_was_told(
    changes: dict[str, Any], make_config: Callable[..., Config], run_training: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_config({"iterations": 1, "evaluation.every": 5, "policy.lora_rank": 32} | changes)
    told = dry_run(config).disk
    run_training(config)
    saved = (tmp_path / "run" / "checkpoints" / "000001" / "state.safetensors").stat().st_size
    assert told["a checkpoint"] == pytest.approx(saved, rel=0.01)
    adapters = sum(path.stat().st_size for path in (tmp_path / "run").rglob("adapter_model.safetensors"))
    assert told["adapters at the end"] == pytest.approx(adapters, rel=0.05)  # a small file's header is a part of it


def test_rewards_on_the_same_device_are_counted(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    memory = dry_run(config).scores
    held = sum(sum(p.nbytes for p in each._encoder.parameters()) for each in build_rewards(config).values())  # type: ignore[attr-defined]
    names = [name for name in memory if name.startswith("weights of rewards.")]
    assert names == [
        "weights of rewards.prompt (toybox_prompt)", "weights of rewards.identity (toybox_identity)",
    ]  # fmt: skip
    assert sum(memory[name] for name in names) == pytest.approx(held, rel=0.01)


def test_live_peak_counts_what_is_there_at_once() -> None:
    before = torch.zeros(100)
    with LivePeak() as live:
        one = before.view(10, 10) + 1  # a view of what was there, and 400 bytes
        two = torch.cat([one, one])  # 800
        del one
        three = two.T.reshape(-1)  # 800: a copy
        del two, three
    assert live.peak == 1600
    with LivePeak(fused_tokens=7) as live:
        pairs = torch.zeros(3, 7, 7) + 1
    assert live.peak == 0 and pairs.shape == (3, 7, 7)


def test_rows_are_readable() -> None:
    rows = found().rows()
    assert rows["trained"].startswith("0.00 M") and rows["expected peak memory"].endswith("KiB, in the rollout")
    assert rows["operations an iteration, rollout"] == f"{3 * 4 * 6 * DEPTH * ONE / 1000:.1f} kFLOP"
