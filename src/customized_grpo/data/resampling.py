"""Resize 8-bit pictures as Pillow does, on any device.

Pillow resizes one axis after the other and rounds to 8 bits in between, with weights of 22 binary places. Encoders were
trained and their scores published with pictures that Pillow resized; torch's own antialiased resizing rounds once and
differs from Pillow by several levels of 255 at hard edges.
"""

import math

import torch
from torch import Tensor

PRECISION = 22
"""Binary places of a weight: the products of 8-bit levels and weights, summed, fit 32 bits."""
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
"""Kernels by name, and how far each reaches, in pixels of the larger of the two pictures' grids."""
NEAREST = "nearest"


def to_levels(images: Tensor) -> Tensor:
    """Round `images` in [0, 1] to 8-bit levels, as a file holds them: uint8 of the same shape."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def resample(levels: Tensor, size: tuple[int, int], kernel: str) -> Tensor:
    """Resize `levels` [..., h, w] uint8 to (height, width) `size`, equal to Pillow's `Image.resize` in every level.

    `kernel`: one of SUPPORT, or "nearest". The order of the axes is Pillow 13's: the vertical one first if the height
    shrinks by more than twice the pixels that the width does, else the horizontal one.
    """
    lost_rows, lost_columns = levels.shape[-2] - size[0], levels.shape[-1] - size[1]
    rows_first = lost_rows > 0 and lost_rows > 2 * lost_columns
    for axis in (-2, -1) if rows_first else (-1, -2):
        if levels.shape[axis] != size[axis]:
            levels = _along(levels.movedim(axis, 0), size[axis], kernel).movedim(0, axis)
    return levels.contiguous()


def _along(levels: Tensor, length: int, kernel: str) -> Tensor:
    """Resize the first axis of `levels` to `length`."""
    if kernel == NEAREST:
        # The pixel that lies under the new pixel's centre.
        places = (2 * torch.arange(length) + 1) * len(levels) // (2 * length)
        return levels[places.to(levels.device)]
    places, weights = (part.to(levels.device) for part in _taps(len(levels), length, kernel))
    levels = levels.contiguous()
    total = torch.full((length, *levels.shape[1:]), 1 << (PRECISION - 1), dtype=torch.int32, device=levels.device)
    for place, weight in zip(places, weights, strict=True):
        total.addcmul_(levels[place].int(), weight.view(-1, *[1] * (levels.ndim - 1)))
    return (total >> PRECISION).clamp(0, 255).to(torch.uint8)


def _taps(length: int, new_length: int, kernel: str) -> tuple[Tensor, Tensor]:
    """Return the position and the weight of each of the K pixels that make up a new pixel.

    Positions are [K, new_length] int64, weights [K, new_length] int32 in units of 2^-PRECISION.
    """
    scale = length / new_length
    stretch = max(scale, 1.0)
    reach = SUPPORT[kernel] * stretch
    centre = (torch.arange(new_length, dtype=torch.float64) + 0.5) * scale
    first = (centre - reach + 0.5).long().clamp(min=0)
    last = (centre + reach + 0.5).long().clamp(max=length)
    places = first + torch.arange(math.ceil(reach) * 2 + 1)[:, None]
    weights = _kernel((places - centre + 0.5) * (1 / stretch), kernel).where(places < last, 0.0)
    scaled = weights / weights.sum(0) * (1 << PRECISION)
    # Halves are rounded away from zero.
    return places.clamp(max=length - 1), (scaled + 0.5 * scaled.sign()).int()


def _kernel(x: Tensor, name: str) -> Tensor:
    if name == "lanczos":
        return (torch.sinc(x) * torch.sinc(x / 3)).where((x >= -3) & (x < 3), 0.0)
    x = x.abs()
    if name == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return near.where(x < 1, far.where(x < 2, 0.0))
