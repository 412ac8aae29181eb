"""What a generator must do to be tuned. `toybox.policy` is one."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

ConditionT = TypeVar("ConditionT", bound="Condition")


class Condition(Protocol):
    """What a generator knows of prompts and references before it draws: opaque, one row per prompt.

    It does not depend on the trained weights, so it is computed once per group and used by every step of every
    sample.
    """

    def take(self, index: Tensor) -> Self:
        """The rows `index` [N] int64, repeats allowed: a group is its prompt's row G times."""
        ...


class Policy(Protocol[ConditionT]):
    """A subject-driven generator on rectified flow: sigma falls from 1 (noise) to 0 (image)."""

    @property
    def resolution(self) -> int:
        """Side of the square references it takes and of the images it makes, in pixels."""
        ...

    @property
    def latent_shape(self) -> torch.Size:
        """Shape of one latent, without the batch."""
        ...

    def check(self, prompt: str, num_references: int) -> None:
        """Raise `UserError` for a prompt, or a number of references, that it cannot take."""
        ...

    def encode(self, prompts: Sequence[str], references: Tensor) -> ConditionT:
        """Prompts and references [B, K, 3, H, W] in [0, 1] to a condition of B rows."""
        ...

    def sigmas(self, num_steps: int, shift: float) -> Tensor:
        """Noise levels [num_steps + 1] float32 from 1 to 0."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, condition: ConditionT) -> Tensor:
        """Velocity `noise - image` at `latents` [B, ...] and `sigma` [B], guidance included; fp32, as latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents at sigma 0 to images [B, 3, H, W] in [0, 1]."""
        ...

    def trainable_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """Name and value of each trained tensor, in a fixed order."""
        ...

    def untuned(self) -> AbstractContextManager[None]:
        """Within it the generator is the one that training started from."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write what was trained as safetensors into `folder`."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Read what `save_adapter` wrote. Raises `UserError` where it does not fit."""
        ...
