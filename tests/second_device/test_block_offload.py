"""Frozen blocks that wait on the host: two blocks at most are on the device, and no number changes."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EVERY_FAMILY_OR_FAST, QUANTIZATION
from runs import settings, tree
from second_device import NAME, NEEDS_DEVICE, second_device

from customized_grpo.config.run import Config
from customized_grpo.data import SubjectDataset
from customized_grpo.factory.policy import build_policy
from customized_grpo.factory.rewards import build_rewards
from customized_grpo.policies.block_offload import repeated_blocks
from customized_grpo.training.trainer import Trainer

pytestmark = NEEDS_DEVICE


@pytest.fixture
def trained(generators: dict[str, Path], models: dict[str, Path], photographs: Path, tmp_path: Path) -> Any:
    """Trains an iteration; returns the trainer, its log, and the bytes of blocks on the device as each block ran."""

    def trained(kind: str, **changes: Any) -> tuple[Trainer[Any], dict[str, Any], list[int], list[int]]:
        names: dict[str, Any] = {f"policy.pipeline.{name}": value for name, value in changes.items()}
        names["objective.old_log_probs"] = "recomputed"  # forward passes whose backward passes do not follow
        config = Config.model_validate(tree(settings(kind, generators, models, tmp_path) | names))
        policy: Any = build_policy(config.policy, config.seed)
        trainer = Trainer(config, policy, build_rewards(config), SubjectDataset.open(photographs))
        lora = {parameter for _, parameter in policy.trainable_parameters()}
        weights = [[p for p in block.parameters() if p not in lora] for block in repeated_blocks(policy._transformer)]
        sizes = [sum(parameter.nbytes for parameter in own) for own in weights]
        seen: list[int] = []

        def look(*_: object) -> None:
            there = [p for block in blocks for p in block.parameters() if p not in lora and p.device.type == NAME]
            seen.append(sum(parameter.nbytes for parameter in there))

        blocks = repeated_blocks(policy._transformer)
        policy._placement.bring_transformer()
        for block in blocks:
            block.register_forward_pre_hook(look)
        return trainer, trainer.train_step(), sizes, seen

    return trained


@EVERY_FAMILY_OR_FAST
@pytest.mark.parametrize("quantization", ["none", pytest.param("int8", marks=QUANTIZATION)])
def test_no_number_changes(kind: str, quantization: str, trained: Any) -> None:
    usual, log, _, _ = trained(kind, quantization=quantization)
    offloaded, its_log, sizes, seen = trained(kind, quantization=quantization, block_offload=True)
    assert set(seen) == set(sizes)  # the block that runs, and the copy of the one ahead is in no place yet
    for (name, expected), (_, found) in zip(
        usual.policy.trainable_parameters(), offloaded.policy.trainable_parameters(), strict=True
    ):
        assert found.device.type == NAME and torch.equal(found, expected), name
    for name, value in log.items():
        if not name.startswith(("seconds", "samples_per_second")):
            assert its_log[name] == value, name


def test_the_device_holds_two_blocks(trained: Any) -> None:
    native, peaks = second_device(), []
    for offload in (False, True):
        gc.collect()
        before = native.live()
        trainer, _, sizes, _ = trained("flux1-kontext", block_offload=offload)
        native.reset_peak()
        trainer.train_step()
        peaks.append(native.peak() - before)
        del trainer
    assert peaks[0] - peaks[1] >= sum(sizes) - sum(sorted(sizes)[-2:]) > 0
