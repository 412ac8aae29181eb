"""The judge: reads a picture's attributes and says whether the prompt is satisfied, the identity kept, the reference
copied.

For evaluation only, never a reward. It knows nothing but pictures and prompts, so it judges any data folder: the
identity to keep is what it reads off the reference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.evaluation.copy_paste import COPIED
from customized_grpo.toybox.copy_score import copy_scores
from customized_grpo.toybox.encoders import JudgeNetwork
from customized_grpo.toybox.language import parse
from customized_grpo.toybox.weights import load_network, read_quality
from customized_grpo.toybox.world import Subjects, hue_distance

HUE_TOLERANCE = 0.08
"""Both hues of a kept identity lie within this distance of the reference's, in turns (29 degrees)."""
PROMPT_ATTRIBUTES = ("shape", "scene", "accessory", "position")


@dataclass(frozen=True)
class Reading:
    """What the judge sees in each picture: `attributes` [B] int64 by name, `hues` [B, 2] in [0, 1)."""

    attributes: dict[str, Tensor]
    hues: Tensor


@dataclass(frozen=True)
class Verdict:
    """`prompt_satisfied`, `identity_kept` [B] bool; `joint_success`, both at once, is what a user wants.

    `copy_score` [B] is the copy-paste meter: 0 as close to the reference as correct pictures are, 1 an exact copy.
    """

    prompt_satisfied: Tensor
    identity_kept: Tensor
    copy_score: Tensor

    @property
    def joint_success(self) -> Tensor:
        """[B] bool."""
        return self.prompt_satisfied & self.identity_kept

    @property
    def copied(self) -> Tensor:
        """[B] bool: closer to a copy of the reference than to a correct picture."""
        return self.copy_score > COPIED


class Oracle:
    """The shipped judge, or the one in the folder `weights`."""

    def __init__(self, weights: Path | None = None) -> None:
        self._weights = weights
        self._network = load_network(JudgeNetwork(), "judge", weights)

    @property
    def ceiling(self) -> dict[str, float]:
        """What it says of clean renders of test prompts, by metric, as measured when the weights were made."""
        ceiling: dict[str, float] = read_quality(self._weights)["ceiling"]
        return ceiling

    @torch.no_grad()
    def read(self, images: Tensor) -> Reading:
        """Read `images` [B, 3, 32, 32] in [0, 1]."""
        logits, directions = self._network(images)
        hues = torch.atan2(directions[..., 1], directions[..., 0]) / (2 * math.pi) % 1.0
        return Reading({name: values.argmax(-1) for name, values in logits.items()}, hues)

    def judge(self, images: Tensor, prompts: Sequence[str], references: Tensor) -> Verdict:
        """Judge `images` [B, 3, 32, 32] made for `prompts` and `references` [B, 3, 32, 32].

        A prompt is satisfied if class, scene, accessory and position match it; identity is kept if shape, pattern and
        both hues match the reference.
        """
        seen, wanted = self.read(images), self.read(references)
        requests = [parse(prompt) for prompt in prompts]
        satisfied = torch.ones(len(images), dtype=torch.bool)
        for row, request in enumerate(requests):
            for name in PROMPT_ATTRIBUTES:
                asked = getattr(request, name)
                satisfied[row] &= asked is None or bool(seen.attributes[name][row] == asked)
        kept = (hue_distance(seen.hues, wanted.hues) <= HUE_TOLERANCE).all(-1)
        for name in ("shape", "pattern"):
            kept &= seen.attributes[name] == wanted.attributes[name]
        subjects = Subjects(wanted.attributes["shape"], wanted.attributes["pattern"], wanted.hues)
        return Verdict(satisfied, kept, copy_scores(images, requests, references, subjects))
