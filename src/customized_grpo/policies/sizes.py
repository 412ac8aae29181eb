"""Sizes of references: whole numbers of tokens, in about the shape of the picture."""

import math
from collections.abc import Sequence

from torch import Tensor

TOKEN = 16
"""Pixels along the side of an image token: 8 by the VAE, 2 by packing."""


def sizes_of(pictures: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """(height, width) of each picture [C, h, w]."""
    return tuple((picture.shape[-2], picture.shape[-1]) for picture in pictures)


def token_count(sizes: Sequence[tuple[int, int]]) -> int:
    """Tokens of pictures of (height, width) `sizes`."""
    return sum(height * width // TOKEN**2 for height, width in sizes)


def to_area(height: int, width: int, area: float, multiple: int = TOKEN) -> tuple[int, int]:
    """(height, width) of about `area` pixels in the shape of `height` x `width`, in multiples of `multiple`."""
    scale = math.sqrt(area / (height * width))
    return _rounded(height * scale, multiple), _rounded(width * scale, multiple)


def to_longer_side(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) with `side` pixels on the longer side, the shorter one rounded down to whole tokens."""
    longer, shorter = side // TOKEN * TOKEN, side * min(height, width) // max(height, width) // TOKEN * TOKEN
    shorter = max(TOKEN, shorter)
    return (longer, shorter) if height >= width else (shorter, longer)


def _rounded(length: float, multiple: int) -> int:
    return max(multiple, round(length / multiple) * multiple)
