"""Every pretrained reward and metric on the second device: scores are the CPU's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from second_device import NAME, NEEDS_DEVICE

from customized_grpo.config.rewards import PRETRAINED, ScoreConfig
from customized_grpo.factory.rewards import RewardLoader
from customized_grpo.types import PromptBatch

pytestmark = NEEDS_DEVICE
FOLDERS = {"clip_t": "clip", "clip_i": "clip", "pickscore": "clip", "hpsv2": "clip"}


@pytest.mark.parametrize(
    ("kind", "reference"), [*((kind, "whole") for kind in PRETRAINED), ("dino", "segmented"), ("clip_i", "segmented")]
)
def test_scores_are_the_cpus(kind: str, reference: str, models: dict[str, Path]) -> None:
    section: dict[str, Any] = {"model": str(models[FOLDERS.get(kind, kind)])}
    if reference == "segmented":
        section |= {"reference": reference, "several_references": "mean"}
    if kind == "hpsv3":
        section |= {"backbone": str(models["backbone"]), "instruction": str(models["instruction"])}
    config = ScoreConfig.model_validate({"kind": kind, kind: section})
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 3, 40, 56, generator=draw)
    references = [[torch.rand(3, 48, 48, generator=draw)], [torch.rand(3, 60, 40, generator=draw)] * 2]
    masks = [[(each[:1] > 0.3).float() for each in some] for some in references] if reference == "segmented" else None

    def scores(device: str) -> torch.Tensor:
        there = torch.device(device)
        reward = RewardLoader(there).load("rewards.it", config)
        found = reward.score(images.to(there), PromptBatch(["a cat", "a dog"], references, masks))
        assert found.valid.all()
        return found.values.cpu()

    expected = scores("cpu")
    assert expected.std() > 0
    torch.testing.assert_close(scores(NAME), expected, rtol=1e-6, atol=1e-6)
