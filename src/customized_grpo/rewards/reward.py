"""What a reward must do, and `TellsFailure` and `policies.ReadsPrompts` what it may. `toybox.rewards` holds two."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from customized_grpo.data import Sample, SubjectDataset
from customized_grpo.policies.policy import References


@dataclass(frozen=True)
class Task:
    """What P groups were asked for: the prompts, for each its K references [3, h, w] in [0, 1], and their masks
    [1, h, w], None where the data has none.

    References and masks have the size of their files, whatever size the generator sees. They may be read each time they
    are indexed. `names`: of each prompt's references and masks; equal names mean equal pictures, so that a reward may
    keep what it computes of them. None: they have no names.
    """

    prompts: Sequence[str]
    references: References
    masks: References | None
    names: Sequence[Hashable] | None = None

    @classmethod
    def of(cls, dataset: SubjectDataset, samples: Sequence[Sample], *, masks: bool) -> "Task":
        """The task that `samples` of `dataset` are, with their masks if the rewards want `masks`."""
        return cls(
            [sample.prompt for sample in samples],
            dataset.originals(samples),
            dataset.masks(samples) if masks and samples else None,
            [(sample.references, sample.masks) for sample in samples],
        )


@dataclass(frozen=True)
class Scores:
    """One reward of every image: `values` [P, G], and `valid` [P, G], False where it could not be computed.

    A failure is never a number: an invalid sample leaves its group's statistics and gets advantage 0.
    """

    values: Tensor
    valid: Tensor


class Reward(Protocol):
    """Scores images; deterministic. What the group shares (its prompt, its reference) is computed once per group."""

    def score(self, images: Tensor, task: Task) -> Scores:
        """Scores of `images` [P, G, 3, H, W] in [0, 1], higher is better."""
        ...


@runtime_checkable
class TellsFailure(Protocol):
    """A reward that others compute, and may fail to."""

    @property
    def last_failure(self) -> str | None:
        """Why a score of its last `score` is invalid, without what is secret; None where none failed."""
        ...
