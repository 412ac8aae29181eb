"""What a reward must do, and `TellsFailure` and `policies.ReadsPrompts` what it may. `toybox.rewards` holds two."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from customized_grpo.types import PromptBatch


@dataclass(frozen=True)
class Scores:
    """One reward of every image: `values` [P, G], and `valid` [P, G], False where it could not be computed.

    A failure is never a number: an invalid sample leaves its group's statistics and gets advantage 0.
    """

    values: Tensor
    valid: Tensor


class Reward(Protocol):
    """Scores images; deterministic. What the group shares (its prompt, its reference) is computed once per group."""

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        """Scores of `images` [P, G, 3, H, W] in [0, 1], higher is better."""
        ...


@runtime_checkable
class TellsFailure(Protocol):
    """A reward that others compute, and may fail to."""

    @property
    def last_failure(self) -> str | None:
        """Why a score of its last `score` is invalid, without what is secret; None where none failed."""
        ...
