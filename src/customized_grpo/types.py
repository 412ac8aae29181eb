"""Types that policies and rewards share."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from customized_grpo.data import Sample, SubjectDataset

References = Sequence[Sequence[Tensor]]
"""References of B prompts: for each its K >= 1 pictures [3, h, w] in [0, 1]. K and sizes may differ; where they do not,
a tensor [B, K, 3, h, w] is one too."""


@dataclass(frozen=True)
class PromptLengths:
    """Token counts of prompts, template included, and the encoder's limit."""

    num_tokens: Sequence[int]
    max_tokens: int


@dataclass(frozen=True)
class PromptBatch:
    """What P groups were asked for: the prompts, for each its K references [3, h, w] in [0, 1], and their masks
    [1, h, w], None where the data has none.

    References and masks have the size of their files, whatever size the generator sees. They may be read each time they
    are indexed. `names`: of each prompt's references and masks; equal names mean equal pictures, so that a reward may
    keep what it computes of them. None: they have no names. `subjects`: each prompt's, if they are known. `pictures`:
    what a metric of identity compares with; None: the references.
    """

    prompts: Sequence[str]
    references: References
    masks: References | None
    names: Sequence[Hashable] | None = None
    subjects: Sequence[str | None] | None = None
    pictures: References | None = None

    def without_masks(self) -> "PromptBatch":
        """Return the batch without masks, for a reward that compares with whole references."""
        return self if self.masks is None else replace(self, masks=None)

    @classmethod
    def of(cls, dataset: SubjectDataset, samples: Sequence[Sample], *, masks: bool) -> "PromptBatch":
        """Return the batch of `samples` of `dataset`, with their masks if the rewards want `masks`."""
        return cls(
            [sample.prompt for sample in samples],
            dataset.originals(samples),
            dataset.masks(samples) if masks and samples else None,
            [(sample.references, sample.masks) for sample in samples],
            [sample.subject for sample in samples],
        )
