"""How close an image is to a copy of its reference, in layout."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.data import Sample, SubjectDataset

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


def reference_layouts(dataset: SubjectDataset, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return the layouts [K, 3 * LAYOUT ** 2] of the references of each subject among `samples`, by subject.

    Each file is read and counts once for a subject. Samples without a subject have it in common if they have the same
    references, by whose paths it goes.
    """
    layouts: dict[str, dict[Path, Tensor]] = {}
    for sample, each in zip(samples, dataset.references(samples, _prepared), strict=True):
        subject = sample.subject or "\n".join(map(str, sample.references))
        layouts.setdefault(subject, {}).update(zip(sample.references, each, strict=True))
    return {subject: torch.stack(list(each.values())) for subject, each in layouts.items()}


def _prepared(picture: Tensor, count: int) -> Tensor:
    return layout(picture[None])[0]
