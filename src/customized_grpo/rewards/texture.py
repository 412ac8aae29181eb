"""Texture: how rough an image is beside its references. It sees dots and noise to which a learned reward is blind.

Shape legend: N images, P prompts, G samples of a group.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from customized_grpo.data.images import resize
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.types import PromptBatch

FLAT = 1e-3
"""A reference is flat below this mean absolute Laplacian: a quarter of one of 255 levels."""


def laplacian(images: Tensor) -> Tensor:
    """Return the mean absolute Laplacian [N] of `images` [N, 3, H, W] in [0, 1], in units of full white.

    The mean is over channels and inner pixels, each against its 4 neighbors: |4 x - up - down - left - right|. A grid
    of dots, noise and ringing raise it, blur lowers it. Raises ValueError for images without inner pixels.
    """
    if min(images.shape[-2:]) < 3:
        raise ValueError(f"expected images of at least 3 x 3 pixels, got {list(images.shape)}")
    values = images if images.dtype == torch.float64 else images.float()
    neighbors = values[..., :-2, 1:-1] + values[..., 2:, 1:-1] + values[..., 1:-1, :-2] + values[..., 1:-1, 2:]
    return (4 * values[..., 1:-1, 1:-1] - neighbors).abs().mean((-3, -2, -1))


class TextureReward(Reward):
    """Ratio of an image's mean absolute Laplacian to the mean of its references': 1 is as sharp as they are.

    Above 1: a grid or noise; below 1: blur. Not a score to maximize, but one for a constraint with `at_most`, say 1.25.
    References are resized to the images, so small ones look blurred, and a sharp image is above 1.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Hashable, tuple[int, int]], float] = {}

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        """See `Reward.score`. Images whose references are flat have no score."""
        size = (images.shape[-2], images.shape[-1])
        expected = torch.tensor([self._expected(batch, prompt, size) for prompt in range(len(images))])
        expected = expected.to(images.device).unsqueeze(1)
        values = torch.stack([laplacian(group) for group in images]) / expected.where(expected >= FLAT, torch.nan)
        reason = None if bool((expected >= FLAT).all()) else "texture: the reference is flat, nothing to compare with"
        return Scores(values, values.isfinite(), reason)

    def _expected(self, batch: PromptBatch, prompt: int, size: tuple[int, int]) -> float:
        """Return the texture of the prompt's references at (height, width) `size`; of named ones it is kept."""
        if batch.names is None:
            return _mean_texture(batch.references[prompt], size)
        key = (batch.names[prompt], size)
        if key not in self._kept:
            self._kept[key] = _mean_texture(batch.references[prompt], size)
        return self._kept[key]


def _mean_texture(pictures: Sequence[Tensor], size: tuple[int, int]) -> float:
    return float(torch.cat([laplacian(resize(picture, size)[None]) for picture in pictures]).mean())
