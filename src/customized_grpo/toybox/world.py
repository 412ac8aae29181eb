"""What can exist in ToyBox: subjects, the scenes they stand in, and the disjoint splits of their identities.

Everything is a batch of integers and hues, so that a thousand pictures are a handful of tensors. Drawing them is
`drawing.render`; saying them in English is `language.caption`.

Shape legend: B pictures.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

SHAPES = ("ball", "block", "star", "heart", "drop", "flower", "cloud", "ghost")
PATTERNS = ("stripes", "dots", "checks", "belly", "halves")
SCENES = ("beach", "snow", "forest", "desert", "city", "space", "meadow", "sea")
ACCESSORIES = ("nothing", "hat", "scarf", "glasses", "crown")
POSITIONS = ("left", "middle", "right")

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HUE_BINS = 12
MIN_HUE_GAP = 2
"""The two hues of a subject lie at least this many bins apart on the colour circle, so both can be seen."""


@dataclass(frozen=True)
class Subjects:
    """A batch of identities: `shape`, `pattern` [B] int64 (indices above), `hues` [B, 2] in [0, 1)."""

    shape: Tensor
    pattern: Tensor
    hues: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def take(self, index: Tensor) -> "Subjects":
        """Return the subjects at `index` [N]."""
        return Subjects(self.shape[index], self.pattern[index], self.hues[index])


@dataclass(frozen=True)
class Scenes:
    """A batch of settings: `scene`, `accessory`, `position` [B] int64, and the free `variation` [B, 6] in [-1, 1].

    The variation is what no prompt speaks of: where props stand, and how far the subject is from the spot and the
    size that its position calls for.
    """

    scene: Tensor
    accessory: Tensor
    position: Tensor
    variation: Tensor

    def __len__(self) -> int:
        return len(self.scene)

    def take(self, index: Tensor) -> "Scenes":
        """Return the settings at `index` [N]."""
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))


def split_of(shape: Tensor, pattern: Tensor, bins: Tensor) -> Tensor:
    """Return the split (index into `SPLITS`) of each identity cell [B]: eight tenths train, one tenth each for the
    others.

    A Latin square over (shape, pattern, two hue bins): every split holds every shape, pattern and hue, but no
    combination stands in two of them.
    """
    cell = (shape + 2 * pattern + 3 * bins[..., 0] + 7 * bins[..., 1]) % 10
    return (cell >= 8).long() + (cell == 9).long()


def sample_subjects(count: int, split: Split, generator: torch.Generator) -> Subjects:
    """Draw `count` identities of `split`; hues keep to the middle 80 % of their bin, away from its neighbours."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    found = 0
    while found < count:
        n = 16 * count + 64
        shape = torch.randint(len(SHAPES), (n,), generator=generator)
        pattern = torch.randint(len(PATTERNS), (n,), generator=generator)
        bins = torch.randint(HUE_BINS, (n, 2), generator=generator)
        hues = (bins + 0.1 + 0.8 * torch.rand(n, 2, generator=generator)) / HUE_BINS
        gap = (bins[:, 0] - bins[:, 1]).abs()
        apart = torch.minimum(gap, HUE_BINS - gap) >= MIN_HUE_GAP
        keep = apart & (split_of(shape, pattern, bins) == SPLITS.index(split))
        kept.append((shape[keep], pattern[keep], hues[keep]))
        found += int(keep.sum())
    shapes, patterns, all_hues = (torch.cat(parts)[:count] for parts in zip(*kept, strict=True))
    return Subjects(shapes, patterns, all_hues)


def sample_scenes(count: int, generator: torch.Generator, *, other_than: Tensor | None = None) -> Scenes:
    """Draw `count` settings a prompt may ask for, in a scene other than `other_than` [count] where that is given."""
    if other_than is None:
        scene = torch.randint(len(SCENES), (count,), generator=generator)
    else:
        step = torch.randint(1, len(SCENES), (count,), generator=generator)
        scene = (other_than + step) % len(SCENES)
    return Scenes(
        scene,
        torch.randint(len(ACCESSORIES), (count,), generator=generator),
        torch.randint(len(POSITIONS), (count,), generator=generator),
        _variation(count, generator),
    )


def sample_reference_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Draw `count` settings of a reference picture: any scene, the subject in the middle and wearing nothing."""
    scenes = sample_scenes(count, generator)
    return replace(
        scenes,
        accessory=torch.zeros_like(scenes.accessory),
        position=torch.full_like(scenes.position, POSITIONS.index("middle")),
    )


def hue_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the distance of hues on the color circle, elementwise, in [0, 0.5] turns."""
    return ((a - b + 0.5) % 1.0 - 0.5).abs()


def _variation(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, 6, generator=generator) * 2 - 1
