"""The mean absolute Laplacian against convolution and closed forms, and the reward that compares it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from customized_grpo.data.images import resize
from customized_grpo.rewards.texture import TextureReward, laplacian
from customized_grpo.types import PromptBatch


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def checkerboard(low: float, high: float) -> Tensor:
    """Draw one picture [3, 8, 8] in which every pixel differs from its 4 neighbors."""
    dark = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == 0
    return torch.where(dark, low, high).expand(3, 8, 8)


def batch(*references: list[Tensor], names: list[str] | None = None) -> PromptBatch:
    return PromptBatch(["a cup"] * len(references), references, None, names)


def test_the_laplacian_is_that_of_a_convolution() -> None:
    images = pictures(4, 3, 7, 9).double()
    kernel = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]], dtype=torch.float64)
    found = F.conv2d(images.flatten(0, 1)[:, None], kernel[None, None]).abs().mean((1, 2, 3)).unflatten(0, (4, 3))
    assert torch.allclose(laplacian(images), found.mean(1), rtol=1e-12)


def test_a_checkerboard_has_four_steps_at_every_pixel_and_a_ramp_has_none() -> None:
    ramp = torch.linspace(0, 1, 8).expand(3, 8, 8)
    found = laplacian(torch.stack([checkerboard(0.25, 0.75), ramp]).double())
    assert found.tolist() == pytest.approx([4 * 0.5, 0.0], abs=1e-6)


def test_images_without_inner_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 x 3"):
        laplacian(torch.zeros(1, 3, 2, 8))


@given(contrast=st.floats(0.01, 1), offset=st.floats(-1, 1), turns=st.integers(0, 3))
def test_texture_grows_with_contrast_and_knows_neither_brightness_nor_direction(
    contrast: float, offset: float, turns: int
) -> None:
    images = pictures(2, 3, 6, 6).double()
    changed = torch.rot90(contrast * images + offset, turns, (2, 3))
    assert torch.allclose(laplacian(changed), contrast * laplacian(images), rtol=1e-9)


def test_the_reference_scores_1_noise_more_and_blur_less() -> None:
    reference = pictures(3, 16, 16)
    noisy = reference + 0.5 * pictures(3, 16, 16, seed=1)
    blurred = F.avg_pool2d(reference, 3, 1, 1)
    scores = TextureReward().score(torch.stack([reference, noisy, blurred])[None], batch([reference]))
    same, rough, smooth = scores.values[0].tolist()
    assert same == pytest.approx(1) and rough > 1.05 and smooth < 0.5
    assert scores.valid.all() and scores.reason is None


def test_each_group_is_held_against_the_mean_of_its_own_resized_references() -> None:
    images = pictures(2, 3, 3, 16, 24)
    references = [[pictures(3, 40, 24, seed=1)], [pictures(3, 16, 24, seed=2), pictures(3, 64, 64, seed=3)]]
    values = TextureReward().score(images, batch(*references)).values
    for p, row in enumerate(references):
        expected = sum(float(laplacian(resize(each, (16, 24))[None])) for each in row) / len(row)
        assert torch.allclose(values[p], laplacian(images[p]) / expected)


def test_images_of_a_flat_reference_have_no_score() -> None:
    gray = torch.full((3, 16, 16), 0.5)
    almost = gray.clone()
    almost[:, 8, 8] += 1 / 255  # one pixel, one level
    images = pictures(3, 2, 3, 16, 16)
    scores = TextureReward().score(images, batch([gray], [pictures(3, 16, 16)], [almost]))
    assert scores.valid.tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert scores.reason == "texture: the reference is flat, nothing to compare with"
    assert all(map(math.isnan, scores.values[[0, 2]].flatten().tolist()))


def test_an_image_that_is_not_finite_is_invalid() -> None:
    images = pictures(1, 2, 3, 16, 16)
    images[0, 1, 0, 4, 4] = math.nan
    assert TextureReward().score(images, batch([pictures(3, 16, 16)])).valid.tolist() == [[True, False]]


class Counting(list[list[Tensor]]):
    """References that count how often they are read."""

    read = 0

    def __getitem__(self, index: int) -> list[Tensor]:  # type: ignore[override]
        self.read += 1
        return super().__getitem__(index)


def test_named_references_are_read_once_for_a_size() -> None:
    reward, references = TextureReward(), Counting([[pictures(3, 16, 16)]])
    named = PromptBatch(["a cup"], references, None, ["cup"])
    small, large = pictures(1, 2, 3, 16, 16), pictures(1, 2, 3, 32, 32)
    found = [reward.score(images, named).values for images in (small, small, large)]
    assert references.read == 2 and torch.equal(found[0], found[1])
    assert torch.equal(found[2], TextureReward().score(large, batch(*references)).values)
