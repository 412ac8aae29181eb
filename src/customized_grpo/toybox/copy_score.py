"""The copy-paste meter: is a picture closer to being its reference than a correct picture would be?

Closeness is the correlation of two pictures' layouts: 8 x 8 local means, which shifts, small crops, brightness and
noise hardly move. A correct picture is close to the reference too, how close depends on the prompt's scene, so the
meter is relative: 0 is the closeness to be expected of correct pictures, 1 is an exact copy.
"""

import torch
from torch import Tensor

from customized_grpo.evaluation.copy_paste import closeness
from customized_grpo.randomness import generator
from customized_grpo.toybox.drawing import render
from customized_grpo.toybox.language import Request
from customized_grpo.toybox.world import Scenes, Subjects, sample_scenes

CORRECT_PICTURES = 4
"""Correct pictures drawn for each prompt, to know how close they are."""


def copy_scores(images: Tensor, requests: list[Request], references: Tensor, subjects: Subjects) -> Tensor:
    """Return how far each of `images` [B, 3, 32, 32] is from correct pictures (0) towards its reference (1); [B], at
    most 1.

    `subjects` are those of `references` [B, 3, 32, 32]; what a request leaves free differs among the correct pictures.
    """
    expected = torch.stack(
        [closeness(render(subjects, scenes)[0], references) for scenes in _correct_scenes(requests)]
    ).mean(0)
    return (closeness(images, references) - expected) / (1 - expected).clamp(min=1e-3)


def _correct_scenes(requests: list[Request]) -> list[Scenes]:
    """Return settings that satisfy the requests; the same free choices for every request, whatever the batch."""
    free = sample_scenes(CORRECT_PICTURES, generator(0, "copy meter"))
    chosen = []
    for row in range(CORRECT_PICTURES):
        same = free.take(torch.full((len(requests),), row))
        asked = {
            name: torch.tensor(
                [
                    default if getattr(request, name) is None else getattr(request, name)
                    for request, default in zip(requests, getattr(same, name).tolist(), strict=True)
                ]
            )
            for name in ("scene", "accessory", "position")
        }
        chosen.append(Scenes(**asked, variation=same.variation))
    return chosen
