"""Where the parts of a pipeline lie: encoders while they encode, then the transformer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from customized_grpo.errors import UserError
from customized_grpo.policies.placement import Placement

DEVICE, CPU = torch.device("cpu", 0), torch.device("cpu")
"""Two devices on one machine, told apart by their index."""


class Part(nn.Module):
    """Records where it was moved."""

    def __init__(self, name: str, moves: list[tuple[str, Any]]) -> None:
        super().__init__()
        self.name, self.moves = name, moves
        self.weight = nn.Parameter(torch.ones(2))

    def to(self, device: Any) -> "Part":  # type: ignore[override]
        self.moves.append((self.name, device))
        return self


def pipeline(moves: list[tuple[str, Any]]) -> Any:
    pipe: Any = SimpleNamespace(**{name: Part(name, moves) for name in ("text", "vae", "transformer")})
    pipe.vae.encoder = nn.Linear(1, 1)
    pipe.register_modules = lambda **parts: vars(pipe).update(parts)
    return pipe


def placement(pipe: Any, *, keep_encoders: bool) -> Placement:
    return Placement(pipe, ["text"], [], DEVICE, how="whole", keep_encoders=keep_encoders)


@pytest.mark.parametrize("keep_encoders", [False, True])
def test_encoders_leave_before_the_transformer_comes(keep_encoders: bool) -> None:
    moves: list[tuple[str, Any]] = []
    pipe = pipeline(moves)
    parts = placement(pipe, keep_encoders=keep_encoders)
    with parts.encoding():
        pass
    assert moves == [("text", DEVICE), ("vae", DEVICE)]
    moves.clear()
    parts.release_encoders()
    assert moves == [("text", CPU)] * keep_encoders + [("transformer", DEVICE), ("vae", DEVICE)]
    moves.clear()
    parts.bring_transformer()
    assert not moves
    assert (pipe.text is None) == (not keep_encoders) == isinstance(pipe.vae.encoder, nn.Identity)


def test_kept_encoders_go_back_beside_the_transformer() -> None:
    moves: list[tuple[str, Any]] = []
    parts = placement(pipeline(moves), keep_encoders=True)
    parts.release_encoders()
    moves.clear()
    with parts.encoding():
        assert moves == [("text", DEVICE), ("vae", DEVICE)]
    assert moves[2:] == [("text", CPU)]


def test_freed_encoders_encode_nothing() -> None:
    parts = placement(pipeline([]), keep_encoders=False)
    parts.release_encoders()
    with pytest.raises(UserError, match=r"policy\.pipeline\.cache: a prompt that was encoded before"), parts.encoding():
        pass


def test_encoders_and_vae_are_frozen() -> None:
    pipe = pipeline([])
    placement(pipe, keep_encoders=False)
    assert not pipe.text.weight.requires_grad and not pipe.vae.weight.requires_grad
    assert pipe.transformer.weight.requires_grad
