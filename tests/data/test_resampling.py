"""Resizing held against the installed Pillow, level by level."""

import numpy as np
import PIL
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from customized_grpo.data.images import resize
from customized_grpo.data.resampling import resample, to_levels

KERNELS = {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}  # fmt: skip
ROWS_FIRST = int(PIL.__version__.split(".")[0]) >= 13
"""Whether this Pillow resizes the rows of some tall pictures first."""
side = st.integers(1, 120)


def picture(height: int, width: int, seed: int, hard: bool) -> np.ndarray:
    """Noise of all levels, or of black and white alone: the hardest edges there are."""
    draw = np.random.default_rng(seed)
    levels = draw.integers(0, 2, (height, width, 3)) * 255 if hard else draw.integers(0, 256, (height, width, 3))
    return levels.astype(np.uint8)


def by_pillow(levels: np.ndarray, size: tuple[int, int], kernel: str) -> np.ndarray:
    return np.asarray(Image.fromarray(levels).resize((size[1], size[0]), KERNELS[kernel]))


def ours(levels: np.ndarray, size: tuple[int, int], kernel: str) -> np.ndarray:
    return resample(torch.from_numpy(levels).permute(2, 0, 1), size, kernel).permute(1, 2, 0).numpy()


@given(side, side, side, side, st.sampled_from(["bilinear", "bicubic", "lanczos"]), st.booleans(), st.integers(0, 9))
def test_every_level_is_pillows(
    height: int, width: int, new_height: int, new_width: int, kernel: str, hard: bool, seed: int
) -> None:
    lost_rows, lost_columns = height - new_height, width - new_width
    assume(ROWS_FIRST or lost_rows <= 0 or lost_rows <= 2 * lost_columns)
    levels = picture(height, width, seed, hard)
    size = (new_height, new_width)
    assert np.array_equal(ours(levels, size, kernel), by_pillow(levels, size, kernel))


@given(side, side, side, side, st.integers(0, 9))
def test_the_nearest_pixel_is_pillows(height: int, width: int, new_height: int, new_width: int, seed: int) -> None:
    levels = picture(height, width, seed, hard=False)
    # Pillow adds steps up in floating point: where a centre falls on the border of two pixels it takes either.
    for old, new in ((height, new_height), (width, new_width)):
        assume(all((2 * place + 1) * old % (2 * new) for place in range(new)))
    size = (new_height, new_width)
    assert np.array_equal(ours(levels, size, "nearest"), by_pillow(levels, size, "nearest"))


@pytest.mark.skipif(not ROWS_FIRST, reason="a Pillow that always begins with the columns")
@pytest.mark.parametrize(
    ("old", "new"), [((57, 41), (3, 59)), ((60, 40), (40, 30)), ((61, 40), (40, 30)), ((90, 40), (45, 20))]
)
def test_the_order_of_the_axes_is_pillows(old: tuple[int, int], new: tuple[int, int]) -> None:
    levels = picture(*old, seed=0, hard=True)
    assert np.array_equal(ours(levels, new, "lanczos"), by_pillow(levels, new, "lanczos"))


def test_a_photographs_sizes_in_a_batch() -> None:
    levels = np.stack([picture(768, 1024, seed, hard=seed == 0) for seed in range(2)])
    found = resample(torch.from_numpy(levels).permute(0, 3, 1, 2), (256, 341), "bicubic").permute(0, 2, 3, 1).numpy()
    for one, each in zip(found, levels, strict=True):
        assert np.array_equal(one, by_pillow(each, (256, 341), "bicubic"))


def test_pictures_are_resized_as_by_pillow() -> None:
    levels = picture(300, 200, 0, hard=True)
    found = resize(torch.from_numpy(levels).permute(2, 0, 1).float() / 255, (96, 64))
    expected = torch.from_numpy(by_pillow(levels, (96, 64), "bicubic").copy()).permute(2, 0, 1)
    assert torch.equal(found, expected.float() / 255)


def test_levels_are_those_of_a_file() -> None:
    assert to_levels(torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 2.0])).tolist() == [0, 0, 1, 255, 255]
