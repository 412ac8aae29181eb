"""Pairs of a reference and a target picture with the target's caption: what ToyBox networks are trained on."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from customized_grpo.toybox.drawing import render
from customized_grpo.toybox.language import caption
from customized_grpo.toybox.world import (
    ACCESSORIES,
    PATTERNS,
    POSITIONS,
    SCENES,
    SHAPES,
    Scenes,
    Split,
    Subjects,
    sample_reference_scenes,
    sample_scenes,
    sample_subjects,
)


@dataclass(frozen=True)
class PairNoise:
    """How wrong the web's pairs are: the chance that the target departs from what its caption and reference say.

    A generator trained on clean pairs follows every prompt, and its groups hold no variance that RL could use; one
    trained on noisy pairs draws right and wrong pictures, as generators trained on the web do.
    """

    caption: float = 0.0
    """Chance, for each of scene, accessory and position, that the target shows another than its caption says."""
    shape: float = 0.0
    """Chance that the target's subject has another shape than the reference's."""
    pattern: float = 0.0
    """Chance that it has another pattern."""
    hue: float = 0.0
    """Standard deviation of the error of each hue, in turns."""
    copy: float = 0.0
    """Chance that the target is the reference picture itself."""
    stay: float = 0.0
    """Chance that the target keeps the reference's background, as two pictures of one occasion do."""


@dataclass(frozen=True)
class Pairs:
    """A batch of pairs: `references`, `targets` [B, 3, 32, 32] in [0, 1], `masks` [B, 1, 32, 32] of the references.

    `subjects`, `reference_scenes` and `target_scenes` are what the reference and the *caption* say.
    """

    subjects: Subjects
    reference_scenes: Scenes
    target_scenes: Scenes
    references: Tensor
    masks: Tensor
    targets: Tensor
    captions: list[str]

    def take(self, index: Tensor) -> "Pairs":
        """Return the pairs at `index` [N]."""
        return Pairs(
            self.subjects.take(index),
            self.reference_scenes.take(index),
            self.target_scenes.take(index),
            self.references[index],
            self.masks[index],
            self.targets[index],
            [self.captions[i] for i in index.tolist()],
        )


def draw_pairs(count: int, split: Split, generator: torch.Generator, noise: PairNoise | None = None) -> Pairs:
    """Draw `count` pairs with identities of `split`; the target's scene is never the reference's."""
    subjects = sample_subjects(count, split, generator)
    reference_scenes = sample_reference_scenes(count, generator)
    target_scenes = sample_scenes(count, generator, other_than=reference_scenes.scene)
    captions = caption(subjects, target_scenes, generator)
    references, masks = render(subjects, reference_scenes)
    drawn_subjects, drawn_scenes = _mistaken(subjects, target_scenes, noise or PairNoise(), generator)
    if noise is not None:
        stays = torch.rand(count, generator=generator) < noise.stay
        drawn_scenes = replace(
            drawn_scenes,
            scene=torch.where(stays, reference_scenes.scene, drawn_scenes.scene),
            variation=torch.where(stays.unsqueeze(-1), reference_scenes.variation, drawn_scenes.variation),
        )
    targets, _ = render(drawn_subjects, drawn_scenes)
    if noise is not None:
        copied = torch.rand(count, generator=generator) < noise.copy
        targets = torch.where(copied.view(-1, 1, 1, 1), references, targets)
    return Pairs(subjects, reference_scenes, target_scenes, references, masks, targets, captions)


def _mistaken(
    subjects: Subjects, scenes: Scenes, noise: PairNoise, generator: torch.Generator
) -> tuple[Subjects, Scenes]:
    def other(values: Tensor, choices: int, chance: float) -> Tensor:
        wrong = torch.rand(len(values), generator=generator) < chance
        return torch.where(wrong, torch.randint(choices, values.shape, generator=generator), values)

    hues = subjects.hues + noise.hue * torch.randn(subjects.hues.shape, generator=generator)
    drawn = Subjects(
        other(subjects.shape, len(SHAPES), noise.shape), other(subjects.pattern, len(PATTERNS), noise.pattern), hues % 1
    )
    return drawn, replace(
        scenes,
        scene=other(scenes.scene, len(SCENES), noise.caption),
        accessory=other(scenes.accessory, len(ACCESSORIES), noise.caption),
        position=other(scenes.position, len(POSITIONS), noise.caption),
    )
