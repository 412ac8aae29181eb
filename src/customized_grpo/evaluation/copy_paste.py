"""How close an image is to a copy of its reference, in layout."""

import torch.nn.functional as F
from torch import Tensor

LAYOUT = 8
COPIED = 0.5
"""A picture is a copy when it is at least half way from correct pictures to the reference itself."""


def closeness(images: Tensor, references: Tensor) -> Tensor:
    """Return correlation [B] in [-1, 1] of the layouts of `images` and `references` [B, 3, H, W]."""
    return (layout(images) * layout(references)).sum(-1)


def layout(images: Tensor) -> Tensor:
    """Return unit vectors [B, 3 * LAYOUT ** 2] of `images` [B, 3, H, W]: their products correlate the layouts."""
    cells = F.adaptive_avg_pool2d(images, LAYOUT).flatten(1)
    return F.normalize(cells - cells.mean(1, keepdim=True), dim=1)
