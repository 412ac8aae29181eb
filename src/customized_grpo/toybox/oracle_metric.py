"""ToyBox's oracle as a metric: whether the prompt is satisfied, the identity kept, the reference copied."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.data import resize_square
from customized_grpo.evaluation.metrics import Metric
from customized_grpo.toybox.drawing import SIZE
from customized_grpo.toybox.oracle import Oracle
from customized_grpo.tracking.metric_info import metric_info
from customized_grpo.types import PromptBatch, References

FIGURES = ("prompt_satisfied", "identity_kept", "joint_success", "copied", "copy_score")
CHANCE_FIGURES = FIGURES[:3]
"""An image of another sample is no copy of this reference: chance says nothing of copying."""


class OracleMetric(Metric):
    """Measures images of ToyBox by the oracle's five figures."""

    chance_names = CHANCE_FIGURES

    def __init__(self, oracle: Oracle) -> None:
        """Read the ceiling now: it is shown when training ends, and better missed before."""
        self.infos = [metric_info(name) for name in FIGURES]
        self.ceiling = oracle.ceiling
        self._oracle = oracle

    @classmethod
    def load(cls, weights: Path | None = None) -> "OracleMetric":
        """Load the oracle in the folder `weights`, or the shipped one. Raises `UserError` where it is missing."""
        return cls(Oracle(weights))

    def measure(self, images: Tensor, batch: PromptBatch) -> Mapping[str, Tensor]:
        """Measure `images` [N, 3, 32, 32] by their prompts and first references."""
        verdict = self._oracle.judge(images, batch.prompts, first_references(batch.references))
        return {name: getattr(verdict, name).float() for name in FIGURES}


def first_references(references: References) -> Tensor:
    """Return the first reference of each prompt at the size that the oracle sees, [N, 3, 32, 32]."""
    return torch.stack([resize_square(row[0], SIZE) for row in references])
