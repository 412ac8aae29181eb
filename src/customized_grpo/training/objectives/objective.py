"""What an objective must do to be minimized by the trainer. `objectives.grpo` is one.

Shape legend: b samples of this process in prompt-major order, S trained steps, M items of a micro-batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from customized_grpo.io.jsonl import Metrics
from customized_grpo.policies.policy import Policy
from customized_grpo.training.rollout import Plan, Rollout


class Loss(NamedTuple):
    """The `loss` of a micro-batch, 0-d, the mean over its items; detached `metrics`, 0-d each, in the order of
    `metric_names`. Both stay on the generator's device: the host waits for it once an update."""

    loss: Tensor
    metrics: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """What was measured on the n micro-batches of an iteration, in all processes; n may be 0.

    update: [n] the number of the optimizer step that a micro-batch belongs to.
    size: [n] the number of its items.
    columns: [n] each of the objective's metrics by name.
    """

    update: Tensor
    size: Tensor
    columns: Mapping[str, Tensor]

    def mean(self, name: str) -> float:
        """Return the mean of a metric over items, NaN if there are none."""
        return float((self.columns[name] * self.size).sum() / self.size.sum())

    def min(self, name: str, *, first_update: bool = False) -> float:
        """Return the smallest value of a metric, NaN if there is none; with `first_update`, of that one alone."""
        values = self.columns[name][self.update == 0] if first_update else self.columns[name]
        return float(values.min()) if len(values) else math.nan

    def max(self, name: str, *, first_update: bool = False) -> float:
        """Return the largest value of a metric, as `min` does."""
        values = self.columns[name][self.update == 0] if first_update else self.columns[name]
        return float(values.max()) if len(values) else math.nan


class Objective(Protocol):
    """What an update minimizes, over items: pairs (pass, sample). A sample has an item for each of its passes."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What `loss` measures on each micro-batch."""
        ...

    @property
    def reference_forwards(self) -> int:
        """Forward passes of the generator that an item takes beside the one that has a gradient."""
        ...

    def num_passes(self, plan: Plan) -> int:
        """Return how many items each sample of an iteration of `plan` has."""
        ...

    def matters(self, advantages: Tensor) -> Tensor:
        """Return which samples [b] change the gradient, by their `advantages` [b, S]; the others are left out."""
        ...

    def targets(
        self, policy: Policy[Any], rollout: Rollout[Any], advantages: Tensor, micro_batches: Sequence[Tensor]
    ) -> Any:
        """Return the targets that stay fixed for the iteration, from `advantages` [b, S] and the weights that drew
        `rollout`. `micro_batches`: the items [M, 2] of each `loss` to come."""
        ...

    def loss(self, policy: Policy[Any], targets: Any, items: Tensor) -> Loss:
        """Return the loss of the `items` [M, 2], (pass, sample), under the present weights.

        A velocity with a gradient comes last: its backward pass must follow before the next velocity.
        """
        ...

    def metrics(self, parts: MicroBatches) -> Metrics:
        """Return an iteration's metrics from those of its micro-batches."""
        ...
