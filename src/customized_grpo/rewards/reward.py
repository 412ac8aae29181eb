"""What a reward must do. `toybox.rewards` holds two; to write another, derive a class from `Reward`, define `score`."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from customized_grpo.types import PromptBatch, PromptLengths


@dataclass(frozen=True)
class Scores:
    """One reward of every image: `values` [P, G], and `valid` [P, G], False where it could not be computed.

    A failure is never a number: an invalid sample leaves its group's statistics and gets advantage 0. `reason`: why a
    score is invalid, without what is secret; None if none is, or if the reward cannot say.
    """

    values: Tensor
    valid: Tensor
    reason: str | None = None


class Reward(Protocol):
    """Scores images; deterministic. What the group shares (its prompt, its reference) is computed once per group."""

    @abstractmethod
    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        """Score `images` [P, G, 3, H, W] in [0, 1]; higher is better."""
        ...

    def prompt_lengths(self, prompts: Sequence[str]) -> PromptLengths | None:
        """Return the lengths of `prompts` in tokens; None if the reward reads all of every prompt."""
        return None


def in_brackets(reasons: Iterable[str | None]) -> str:
    """Return the `reasons` of `Scores`, each once, as ' (reason; reason)'; '' if there are none."""
    known = dict.fromkeys(reason for reason in reasons if reason)
    return f" ({'; '.join(known)})" if known else ""
