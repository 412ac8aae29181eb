"""Features of pictures and references, with an encoder that counts."""

import pytest
import torch
from torch import Tensor

from customized_grpo.rewards import similarity
from customized_grpo.rewards.similarity import PictureEncoder


def test_features_of_references_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server meets ever new references; the oldest are forgotten and encoded again."""
    monkeypatch.setattr(similarity, "KEPT", 2)
    seen: list[Tensor] = []

    def encode(pictures: Tensor) -> Tensor:
        seen.extend(pictures)
        return pictures.flatten(1)

    encoder = PictureEncoder(encode, lambda pictures: pictures, torch.device("cpu"), 4)
    pictures = torch.rand(3, 3, 2, 2)
    for number in (0, 1, 0, 1, 2, 1, 2, 0):
        features = encoder.reference(pictures[number])
        assert torch.allclose(features, pictures[number].flatten() / pictures[number].norm())
    assert len(seen) == 4
