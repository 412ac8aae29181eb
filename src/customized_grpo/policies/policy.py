"""The protocol of a generator that can be tuned. `toybox.policy` is one; `diffusers_policy` wraps pipelines.

To write another, derive a class from `Policy` and define its abstract members. Three more members do nothing unless a
policy defines them: `prompt_lengths`, `precompute` and `lockstep`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.types import PromptLengths, References

ConditionT = TypeVar("ConditionT", bound="Condition")


class Condition(Protocol):
    """Encoded prompts and references: opaque, one row per prompt.

    It does not depend on the trained weights, so it is computed once per group and used by every step of every
    sample.
    """

    def take(self, index: Tensor) -> Self:
        """Return the rows `index` [N] int64, repeats allowed: a group is its prompt's row G times."""
        ...


class PromptRow(Protocol):
    """A prompt with the files of its references."""

    @property
    def prompt(self) -> str: ...
    @property
    def references(self) -> Sequence[Path]: ...


class Policy(Protocol[ConditionT]):
    """A subject-driven generator on rectified flow: sigma falls from 1 (noise) to 0 (image)."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(height, width) of the generated images, in pixels."""
        ...

    @property
    @abstractmethod
    def latent_shape(self) -> torch.Size:
        """Shape of one latent, without the batch."""
        ...

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where latents live."""
        ...

    @abstractmethod
    def check(self, prompt: str, num_references: int) -> None:
        """Raise `UserError` for a prompt, or a number of references, that the generator cannot take."""
        ...

    @abstractmethod
    def prepare_reference(self, picture: Tensor, count: int) -> Tensor:
        """Resize a picture or mask [C, h, w] to the size that the generator reads for one of `count` references."""
        ...

    @abstractmethod
    def encode(self, prompts: Sequence[str], references: References) -> ConditionT:
        """Encode B prompts and their prepared references as a condition of B rows."""
        ...

    @abstractmethod
    def sigmas(self, num_steps: int, shift: float | None) -> Tensor:
        """Return noise levels [num_steps + 1] float32 from 1 to 0, on the CPU; the own schedule if `shift` is
        None."""
        ...

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: Tensor, condition: ConditionT) -> Tensor:
        """Predict the velocity `noise - image` of `latents` [B, ...] at `sigma` [B], guidance included, in fp32."""
        ...

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents at sigma 0 to images [B, 3, H, W] in [0, 1]."""
        ...

    @abstractmethod
    def trainable_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """Return the name and value of each trained tensor, in a fixed order."""
        ...

    @abstractmethod
    def base_weights(self) -> AbstractContextManager[None]:
        """Use the base weights inside this block: without training, and without `policy.init_from`."""
        ...

    @abstractmethod
    def save_adapter(self, folder: Path) -> None:
        """Write the trained weights as safetensors into `folder`."""
        ...

    @abstractmethod
    def load_adapter(self, place: Path) -> None:
        """Load an adapter that `save_adapter` wrote into the folder `place`, or the file `place`.

        Raises `UserError` where it does not fit, or holds numbers that are not finite.
        """
        ...

    def prompt_lengths(self, prompts: Sequence[str]) -> PromptLengths | None:
        """Return the lengths of `prompts` in tokens; None if the generator reads all of every prompt."""
        return None

    def precompute(
        self,
        rows: Sequence[PromptRow],
        references: Callable[[int], Sequence[Tensor]],
        share: Sequence[int],
        on_progress: Callable[[int], None],
    ) -> None:
        """Encode the rows with the numbers `share` ahead of training; do nothing if encoders are small.

        A policy with large encoders keeps the results for `encode`, and then frees the encoders. `rows`: all that the
        processes of this machine read; `references` returns a row's prepared references by its number; `on_progress`
        gets how many rows are done. Raises `UserError`, before any row is encoded, if there is no room for `rows`.
        """
        return None

    def lockstep(self, ranks: DistributedGroup) -> AbstractContextManager[None]:
        """Return a context in which `velocity` may need all processes; do nothing if each has the whole generator.

        Around every use of `velocity`, all processes enter and leave the context together, within
        `DistributedGroup.synchronized`. In it each process calls `velocity` as often as its share of the work needs,
        even never, and runs the backward pass of a velocity before it computes the next one.
        """
        return nullcontext()
