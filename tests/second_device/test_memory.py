"""What a dry run expects of memory, held against what an iteration takes on the second device."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EVERY_FAMILY_OR_FAST
from runs import settings, tree
from second_device import NEEDS_DEVICE, second_device

from customized_grpo.config.run import Config
from customized_grpo.data import SubjectDataset
from customized_grpo.factory.policy import build_policy
from customized_grpo.factory.rewards import build_rewards
from customized_grpo.training.dry_run import dry_run
from customized_grpo.training.trainer import Trainer

pytestmark = NEEDS_DEVICE


@EVERY_FAMILY_OR_FAST
def test_a_reference_takes_what_was_expected_while_it_is_encoded(
    kind: str, generators: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    names = settings(kind, generators, models, tmp_path) | {
        f"policy.pipeline.{name}": 128 for name in ("height", "width", "reference_side")
    }
    config, native = Config.model_validate(tree(names)), second_device()
    pipe = build_policy(config.policy, config.seed)._pipe  # type: ignore[attr-defined]
    vae = pipe.vae.to("hpu")
    pixels = torch.zeros(1, 3, *([1] if kind.startswith("qwen") else []), 128, 128, device="hpu")
    gc.collect()
    before = native.live()
    native.reset_peak()
    with torch.no_grad():
        vae.encode(pixels)
    expected = dry_run(config).before["encoding"]["activations of a reference"]
    assert expected == pytest.approx(native.peak() - before, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "side", "micro_batch", "how"),
    [
        ("flux1-kontext", 128, 3, {}),
        ("flux1-kontext", 128, 3, {"keep_every": 2}),
        ("flux1-kontext", 64, 1, {"gradient_checkpointing": False}),
        pytest.param("flux2-klein", 128, 3, {}, marks=pytest.mark.slow),  # two passes, for guidance
        pytest.param("uno", 96, 2, {}, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_within_a_tenth_of_what_an_iteration_takes(
    kind: str, side: int, micro_batch: int, how: dict[str, Any], generators: dict[str, Path],
    models: dict[str, Path], photographs: Path, tmp_path: Path,
) -> None:  # fmt: skip
    names = settings(kind, generators, models, tmp_path) | {
        "policy.pipeline.height": side, "policy.pipeline.width": side, "policy.pipeline.reference_side": side,
        "policy.pipeline.attention_backend": "_native_math", "rollout.group_size": 6, "objective.kl_weight": 0,
        "rollout.micro_batch": micro_batch, "optimizer.micro_batch": micro_batch,
        **{f"policy.pipeline.{name}": value for name, value in how.items()},
    }  # fmt: skip
    names.pop("ema.decay")
    config = Config.model_validate(tree(names))
    native, peaks = second_device(), dict[str, int]()
    gc.collect()
    before = native.live()
    policy = build_policy(config.policy, config.seed)
    trainer = Trainer(config, policy, build_rewards(config), SubjectDataset.open(photographs))
    for _ in range(2):
        trainer.train_step()  # encodes all prompts, once for all

    def measure(phase: str, share: float) -> None:
        if phase not in peaks:
            native.reset_peak()
        peaks[phase] = native.peak() - before

    trainer.train_step(measure)
    expected = dry_run(config).peaks
    assert max(expected["rollout"], expected["decoding"]) == pytest.approx(peaks["rollout"], rel=0.1)
    assert expected["update"] == pytest.approx(peaks["update"], rel=0.1)
