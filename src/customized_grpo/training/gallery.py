"""The gallery of a validation: references above the images of the base generator and of the tuned one."""

import torch
from torch import Tensor

from customized_grpo.data import fit, image_grid
from customized_grpo.evaluation.evaluator import Evaluation

SIDE, PADDING = 128, 4
"""Smaller pictures are shown enlarged by a whole factor; both in pixels."""


def draw_gallery(evaluation: Evaluation, base_images: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    """Draw the first `count` samples as a grid [3, H, W] of three rows: references, base images, tuned images.

    `size`: height and width of the images in pixels.
    """
    shown = min(count, len(evaluation.images))
    references = torch.stack([fit(row[0], size) for row in evaluation.references[:shown]])
    rows = [references, base_images[:shown].cpu(), evaluation.images[:shown].cpu()]
    return image_grid(torch.cat(rows), columns=shown, scale=max(1, SIDE // max(size)), padding=PADDING)
