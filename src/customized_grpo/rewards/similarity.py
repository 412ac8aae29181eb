"""Rewards that are cosines in a pretrained encoder's space: DINO, CLIP, SigLIP, PickScore, HPSv2."""

import hashlib
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.rewards.preprocessing import composited
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.types import PromptBatch, PromptLengths

Encode = Callable[[Tensor], Tensor]
"""Preprocessed pictures [b, 3, h, w] to features [b, E]."""
Preprocess = Callable[[Tensor], Tensor]
"""Pictures [b, 3, H, W] in [0, 1] to what an encoder takes."""
KEPT = 2**16
"""References whose features are kept: 200 MB of 768 numbers each. A server meets ever new ones."""


class PictureEncoder:
    """Features of pictures, as unit vectors, in micro-batches; those of references are kept."""

    def __init__(self, encode: Encode, preprocess: Preprocess, device: torch.device, micro_batch: int) -> None:
        self._encode, self._preprocess = encode, preprocess
        self._device, self._micro_batch = device, micro_batch
        self._kept: dict[bytes, Tensor] = {}
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features [B, E] of `images` [B, 3, H, W] in [0, 1]."""
        parts = [
            F.normalize(self._encode(self._preprocess(part.to(self._device))).float(), dim=-1)
            for part in images.split(self._micro_batch)
        ]
        return torch.cat(parts)

    def groups(self, images: Tensor) -> Tensor:
        """Return features [P, G, E] of `images` [P, G, 3, H, W]; those of the last call are kept for another reward."""
        if self._last is not None and self._last[0]() is images and self._last[1] == images._version:
            return self._last[2]
        features = self(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        self._last = (weakref.ref(images), images._version, features)
        return features

    def reference(self, picture: Tensor) -> Tensor:
        """Return features [E] of a reference [3, h, w], computed once however often it comes."""
        key = hashlib.blake2b(picture.contiguous().cpu().numpy().tobytes(), digest_size=16).digest()
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]  # the oldest
            self._kept[key] = self(picture[None])[0]
        return self._kept[key]


class IdentitySimilarity(Reward):
    """Cosine of an image with its references, in [-1, 1], higher is more alike.

    The paper multiplies DINO's by 100; normalised within a group, that changes nothing.
    """

    def __init__(self, encoder: PictureEncoder, *, segmented: bool, background: float, several: str) -> None:
        """Compare images with references.

        `segmented`: compare with the subject cut out by its mask, on the gray level `background`. `several`: for more
        than one reference the "mean" of the cosines, or the largest ("max").
        """
        self._encoder, self._segmented, self._background, self._several = encoder, segmented, background, several
        self._kept: dict[Hashable, Tensor] = {}

    def features(self, images: Tensor) -> Tensor:
        """Return the features [N, E] of `images` [N, 3, H, W] in which subjects are compared: unit vectors."""
        return self._encoder(images)

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        """See `Reward.score`."""
        features = self._encoder.groups(images)
        values = torch.stack([self._to(group, self._targets(batch, p)) for p, group in enumerate(features)])
        return Scores(values, values.isfinite())

    def _targets(self, batch: PromptBatch, prompt: int) -> Tensor:
        """Return features [K, E] of the prompt's references; features of named ones are kept for later."""
        if batch.names is None:
            return self._encoded(batch, prompt)
        name = batch.names[prompt]
        if name not in self._kept:
            self._kept[name] = self._encoded(batch, prompt)
        return self._kept[name]

    def _encoded(self, batch: PromptBatch, prompt: int) -> Tensor:
        references = list(batch.references[prompt])
        if self._segmented:
            if batch.masks is None:
                raise ValueError("the task has no masks to segment by")
            pairs = zip(references, batch.masks[prompt], strict=True)
            references = [composited(reference, mask, self._background) for reference, mask in pairs]
        return torch.stack([self._encoder.reference(reference) for reference in references])

    def _to(self, group: Tensor, targets: Tensor) -> Tensor:
        cosines = group @ targets.T
        return cosines.amax(-1) if self._several == "max" else cosines.mean(-1)


class PromptSimilarity(Reward):
    """Cosine of an image with its prompt, in [-1, 1], higher is more as it says."""

    def __init__(
        self,
        encoder: PictureEncoder,
        read: Callable[[Sequence[str]], Tensor],
        measure: Callable[[Sequence[str]], PromptLengths],
    ) -> None:
        """`read`: prompts to features [P, E]; `measure`: prompts to their lengths."""
        self._encoder, self._read, self._measure = encoder, read, measure

    def prompt_lengths(self, prompts: Sequence[str]) -> PromptLengths:
        """See `Reward.prompt_lengths`."""
        return self._measure(prompts)

    @torch.no_grad()
    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        """See `Reward.score`."""
        features = self._encoder.groups(images)
        words = F.normalize(self._read(batch.prompts).float(), dim=-1)
        values = torch.einsum("pge,pe->pg", features, words)
        return Scores(values, values.isfinite())


def pooled(features: Any) -> Tensor:
    """Return the vectors in the output of transformers' `get_*_features`."""
    vectors: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return vectors
