"""Pictures as an encoder of a checkpoint wants them: its image processor's steps, in torch, on the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.data.resampling import resample, to_levels
from customized_grpo.errors import UserError

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Kernels that pictures are resized with, by Pillow's numbers."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize -> centre crop -> normalise. `shortest`: the shorter side after resizing, or `exact` (height, width).

    `half`: where the crop begins when an odd number of pixels is cut off: "down" half of them rounded down, as
    transformers does, or "even" rounded to the nearest even number, as torchvision does.
    """

    shortest: int | None
    exact: tuple[int, int] | None
    crop: tuple[int, int] | None
    kernel: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    half: str = "down"

    @classmethod
    def of(cls, settings: Mapping[str, Any], source: str) -> "Preprocessing":
        """Return the steps of a transformers image processor with these `settings`, as its file has them.

        `source`: where they are from. Raises `UserError`, naming it, for sizes and ways to resize that are not known.
        """
        resample = settings.get("resample", 3)
        if resample not in RESAMPLE:
            known = ", ".join(f"{number} ({mode})" for number, mode in RESAMPLE.items())
            raise UserError(f"{source}: the image processor cannot resize by resample={resample}; expected {known}")
        size = dict(settings.get("size") or {}) if settings.get("do_resize", True) else {}
        shortest, exact = size.get("shortest_edge"), None
        if {"height", "width"} <= size.keys():
            exact = (size["height"], size["width"])
        if size and shortest is None and exact is None:
            raise UserError(
                f"{source}: the image processor cannot resize to {size}; expected shortest_edge, or height and width"
            )
        crop = settings.get("crop_size") if settings.get("do_center_crop") else None
        return cls(
            shortest,
            exact,
            (crop["height"], crop["width"]) if crop else None,
            RESAMPLE[resample],
            tuple(settings["image_mean"]),
            tuple(settings["image_std"]),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Map `images` [B, 3, H, W] in [0, 1], rounded to 8 bits, to normalized inputs [B, 3, h, w]."""
        levels = to_levels(images)
        height, width = levels.shape[-2:]
        target = self.exact or (height, width)
        if self.shortest is not None:
            short = min(height, width)
            target = (self.shortest * height // short, self.shortest * width // short)
        levels = resample(levels, target, self.kernel)
        if self.crop is not None:
            levels = _centre(levels, self.crop, self.half)
        return _normalised(levels.float() / 255, self.mean, self.std)


@dataclass(frozen=True)
class Letterbox:
    """Resize the longer side to `side` -> pad with black to a square -> normalise, as HPSv2's published scorer does.

    Resized values are neither clamped nor rounded, as there. A square picture is only resized.
    """

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Map `images` [B, 3, H, W] in [0, 1], rounded to 8 bits, to normalized inputs [B, 3, side, side]."""
        pixels = to_levels(images).float() / 255
        scale = self.side / max(pixels.shape[-2:])
        height, width = (round(length * scale) for length in pixels.shape[-2:])
        if scale != 1:
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        left, top = (self.side - width) // 2, (self.side - height) // 2
        pixels = F.pad(pixels, (left, self.side - width - left, top, self.side - height - top))
        return _normalised(pixels, self.mean, self.std)


DINO_PUBLISHED = Preprocessing(256, None, (224, 224), "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "even")
"""What DINO's scores on DreamBench are published with: its checkpoint's own processor resizes to 224 x 224."""


def composited(reference: Tensor, mask: Tensor, background: float) -> Tensor:
    """Return the subject of `reference` [3, h, w], cut out by `mask` [1, h, w], on a gray `background` in [0, 1]."""
    return torch.lerp(torch.full_like(reference, background), reference, mask)


def _normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    level, spread = (pixels.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (pixels - level) / spread


def _centre(pixels: Tensor, size: tuple[int, int], half: str) -> Tensor:
    height, width = pixels.shape[-2:]
    missing = [max(0, wanted - given) for wanted, given in zip(size, (height, width), strict=True)]
    if any(missing):
        top, left = missing[0] // 2 + missing[0] % 2, missing[1] // 2 + missing[1] % 2
        pixels = F.pad(pixels, (left, missing[1] - left, top, missing[0] - top))
        height, width = pixels.shape[-2:]
    cut = (height - size[0], width - size[1])
    # Python rounds halves to even.
    top, left = (round(each / 2) if half == "even" else each // 2 for each in cut)
    return pixels[..., top : top + size[0], left : left + size[1]]
