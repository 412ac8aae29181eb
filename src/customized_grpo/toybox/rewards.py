"""ToyBox's two rewards: cosines in the shipped encoders. Learned and hackable, as the real ones are."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from customized_grpo.data import resize_square
from customized_grpo.errors import UserError
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.toybox.drawing import SIZE
from customized_grpo.toybox.encoders import IdentityEncoder, PromptEncoder
from customized_grpo.toybox.language import tokenize
from customized_grpo.toybox.weights import load_network
from customized_grpo.types import PromptBatch

CHUNK = 64
"""Images encoded at once; bounds memory."""

BACKDROP = 0.5
"""Grey level behind a segmented reference."""


class PromptReward(Reward):
    """Cosine of the image with its prompt, in [-1, 1]."""

    def __init__(self, weights: Path | None = None) -> None:
        self._encoder = load_network(PromptEncoder(), "prompt_encoder", weights)

    @torch.no_grad()
    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        """See `Reward.score`."""
        return _cosines(
            _in_chunks(self._encoder.image, images.flatten(0, 1)), self._encoder.text(tokenize(batch.prompts))
        )


class IdentityReward(Reward):
    """Cosine of the image with its reference, in [-1, 1], as DINO's is used."""

    def __init__(
        self, reference: Literal["whole", "segmented"] = "whole", weights: Path | None = None, leak: str = "high"
    ) -> None:
        self._encoder = load_network(IdentityEncoder(), f"identity_encoder_{leak}", weights)
        self._segmented = reference == "segmented"

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the features [N, E] of `images` [N, 3, 32, 32] in which subjects are compared: unit vectors."""
        return _in_chunks(self._encoder, images)

    @torch.no_grad()
    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        """See `Reward.score`. Raises `UserError` when it is to segment and the data has no masks."""
        references = torch.stack([resize_square(row[0], SIZE) for row in batch.references])
        if self._segmented:
            if batch.masks is None:
                raise UserError(
                    "toybox_identity.reference is 'segmented', but the data has no masks; "
                    'add "masks" to its metadata.jsonl or set toybox_identity.reference=whole'
                )
            masks = torch.stack([resize_square(row[0], SIZE) for row in batch.masks])
            references = torch.lerp(torch.full_like(references, BACKDROP), references, masks)
        return _cosines(_in_chunks(self._encoder, images.flatten(0, 1)), self._encoder(references))


def _in_chunks(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([encode(chunk) for chunk in images.split(CHUNK)])


def _cosines(images: Tensor, targets: Tensor) -> Scores:
    """Compare `images` [P * G, E] with their group's target [P, E], unit vectors; non-finite scores are invalid."""
    values = torch.einsum("pge,pe->pg", images.unflatten(0, (len(targets), -1)), targets)
    return Scores(values, values.isfinite())
