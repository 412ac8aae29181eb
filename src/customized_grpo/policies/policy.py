"""What a generator must do to be tuned. `toybox.policy` is one; `diffusers_policy` makes one of a pipeline."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.types import PromptLengths, References

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
    def size(self) -> tuple[int, int]:
        """(height, width) of the images it makes, in pixels."""
        ...

    @property
    def latent_shape(self) -> torch.Size:
        """Shape of one latent, without the batch."""
        ...

    @property
    def device(self) -> torch.device:
        """Where latents live."""
        ...

    def check(self, prompt: str, num_references: int) -> None:
        """Raise `UserError` for a prompt, or a number of references, that it cannot take."""
        ...

    def prepare_reference(self, picture: Tensor, count: int) -> Tensor:
        """A picture or mask [C, h, w] in the size in which it is seen as one of `count` references."""
        ...

    def encode(self, prompts: Sequence[str], references: References) -> ConditionT:
        """Prompts and their prepared references to a condition of B rows."""
        ...

    def sigmas(self, num_steps: int, shift: float | None) -> Tensor:
        """Noise levels [num_steps + 1] float32 from 1 to 0, on the CPU; the generator's own schedule if `shift` is
        None."""
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

    def base_weights(self) -> AbstractContextManager[None]:
        """Within it the generator is the base: without what was trained, and without `policy.init_from`."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write what was trained as safetensors into `folder`."""
        ...

    def load_adapter(self, place: Path) -> None:
        """Read what `save_adapter` wrote into the folder `place`, or the file `place`.

        Raises `UserError` where it does not fit, or holds numbers that are not finite.
        """
        ...


class RowAsked(Protocol):
    """A prompt with the files of its references."""

    @property
    def prompt(self) -> str: ...
    @property
    def references(self) -> Sequence[Path]: ...


@runtime_checkable
class EncodesAhead(Protocol):
    """A policy whose encoders are large: they run once over the data, before the generator takes their place."""

    def reserve(
        self, rows: Sequence[RowAsked], references: Callable[[int], Sequence[Tensor]], *, check_only: bool = False
    ) -> None:
        """Make room for what `encode_ahead` leaves of `rows`, whose prepared `references` are had by index.

        Raises `UserError` where there is none. Of the processes of a machine one makes room; to the others it is
        `check_only`.
        """
        ...

    def encode_ahead(
        self, prompts: Sequence[str], references: Callable[[int], Sequence[Tensor]], on_progress: Callable[[int], None]
    ) -> None:
        """Encode every prompt with its prepared references (by its index), keep the results, let the encoders go.

        `on_progress` hears how many are done.
        """
        ...


@runtime_checkable
class RunsInStep(Protocol):
    """A policy that may be spread over processes, which then can only run it together."""

    def in_step(self, ranks: DistributedGroup) -> AbstractContextManager[None]:
        """Within it each process calls `velocity` as often as its share of the work asks, be it never.

        All enter it, and leave it together. A gradient is computed before the next call of `velocity`.
        """
        ...


def in_step(policy: Policy[ConditionT], ranks: DistributedGroup) -> AbstractContextManager[None]:
    """Enter `RunsInStep.in_step` of a policy that has it, within `DistributedGroup.synchronized`."""
    return policy.in_step(ranks) if isinstance(policy, RunsInStep) else nullcontext()


@runtime_checkable
class ReadsPrompts(Protocol):
    """A policy or a reward whose encoder may not read the whole of a prompt."""

    def prompt_lengths(self, prompts: Sequence[str]) -> PromptLengths | None:
        """The lengths of `prompts`; None where all is read, however long."""
        ...
