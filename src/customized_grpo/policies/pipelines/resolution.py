"""Sizes of references: whole numbers of tokens, in about the shape of the picture."""

import math
from collections.abc import Sequence

from torch import Tensor

TOKEN = 16
"""Pixels along the side of an image token: 8 by the VAE, 2 by packing."""


def sizes_of(pictures: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of each picture [C, h, w]."""
    return tuple((picture.shape[-2], picture.shape[-1]) for picture in pictures)


def token_count(sizes: Sequence[tuple[int, int]]) -> int:
    """Return tokens of pictures of (height, width) `sizes`."""
    return sum(height * width // TOKEN**2 for height, width in sizes)


def to_area(height: int, width: int, area: int, multiple: int = TOKEN) -> tuple[int, int]:
    """Return (height, width) of about `area` pixels in the shape of `height` x `width`, in multiples of `multiple`."""
    return _rounded_root(area * height, width, multiple), _rounded_root(area * width, height, multiple)


def to_longer_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Return (height, width) with `side` pixels on the longer side, the shorter one rounded down to whole tokens."""
    longer, shorter = side // TOKEN * TOKEN, side * min(height, width) // max(height, width) // TOKEN * TOKEN
    shorter = max(TOKEN, shorter)
    return (longer, shorter) if height >= width else (shorter, longer)


def _rounded_root(numerator: int, denominator: int, multiple: int) -> int:
    """Return the multiple of `multiple`, at least one, that is nearest to sqrt(numerator / denominator); of two as
    near, the even one. Computed in integers: a float may fall on the other side of a half."""
    square, unit = 4 * numerator, denominator * multiple**2
    halves = math.isqrt(square // unit)
    count = (halves + 1) // 2
    if halves % 2 and count % 2 and halves**2 * unit == square:  # exactly between two, of which `count` is the odd one
        count -= 1
    return max(1, count) * multiple
