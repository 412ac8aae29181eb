"""Diversity within a prompt: how different the images of one prompt are. Near 0, the generator draws one image only."""

import torch.nn.functional as F
from torch import Tensor


def diversity(features: Tensor) -> Tensor:
    """Return the mean cosine distance of two images of a prompt, [D] float64 in [0, 2].

    `features` [D, K, E]: of K images of each of D prompts, of any length, in the space of an identity encoder. Raises
    ValueError for fewer than two images of a prompt.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"expected features [D, K >= 2, E] of K images of each prompt, got {list(features.shape)}")
    count = features.shape[1]
    unit = F.normalize(features.double(), dim=-1)
    cosines = unit @ unit.mT
    others = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    return (1 - others / (count * (count - 1))).clamp(0, 2)
