"""Conflicting gradients: the cosine between the gradients of the two rewards' own objectives, by denoising step.

Shape legend: N batches, B samples of a batch, S = T - 1 trainable steps, R = 2 rewards (prompt, identity).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from customized_grpo.algorithm import NORMALISERS
from customized_grpo.config.run import Config
from customized_grpo.data import SubjectDataset
from customized_grpo.policies.policy import ConditionT, Policy
from customized_grpo.rewards.reward import Reward
from customized_grpo.training.rollout import Plan, Rollout, sample_groups
from customized_grpo.training.trainer import Trainer

FRESH_NOISE = 1_000_000
"""Diagnosis draws the noise of the iterations from this one on, which no training reaches."""

Array = npt.NDArray[np.float64]
OnProgress = Callable[[int, int], None]
"""Called as (done, of how many)."""


def silent(done: int, of: int) -> None:
    """Progress that nobody watches."""


@dataclass
class Ticks:
    """Counts pieces of work, and says so."""

    on_progress: OnProgress
    of: int
    done: int = 0

    def tick(self) -> None:
        """One more is done."""
        self.done += 1
        self.on_progress(self.done, self.of)


@dataclass(frozen=True, eq=False)
class GradientConflict:
    """What was measured on N independent batches; NaN where a gradient or all advantages are zero.

    cosines: `[N, S]` between the rewards' gradients at each step.
    norms: `[N, S, R]` of those gradients.
    whole_cosines, whole_norms: `[N]`, `[N, R]`, the same for the gradients summed over all steps.
    advantage_cosines: `[N]` between the rewards' advantages. Were the log-probability gradients of the samples
        orthogonal and equally long, every cosine above would be this one: conflict of the rewards alone.
    """

    cosines: Array
    norms: Array
    whole_cosines: Array
    whole_norms: Array
    advantage_cosines: Array


def measure_conflict(
    config: Config,
    policy: Policy[ConditionT],
    rewards: Sequence[Reward],
    dataset: SubjectDataset,
    *,
    batches: int = 8,
    on_progress: OnProgress = silent,
) -> GradientConflict:
    """Gradients of both rewards' objectives on `batches` batches drawn as training draws them, every step trained.

    A reward's own objective is `-mean_b(A[b] log p[b])` with its advantages alone, unshaped and unweighted: its
    gradient is that of the clipped surrogate on the first pass, where the ratio is 1. Weights and their `.grad` stay
    as they are. Raises `TrainingError` when too many rewards failed.
    """
    trainer = Trainer(config, policy, rewards, dataset)
    steps = tuple(range(config.rollout.num_steps - 1))
    plan = Plan(trainer.sigmas, steps, steps)
    found: list[list[Array]] = []
    ticks = Ticks(on_progress, batches * len(steps))
    for batch in range(batches):
        samples = trainer.samples(batch)
        rollout = sample_groups(
            policy, trainer.condition(samples), len(samples), plan, config.rollout,
            seed=config.seed, iteration=FRESH_NOISE + batch,
        )  # fmt: skip
        scores, valid = trainer.score(rollout.images, trainer.batch(samples))
        trainer.check_valid(valid)
        valid = valid.all(-1, keepdim=True).expand_as(valid)
        advantages = NORMALISERS[config.advantages.normalize](scores, valid).flatten(0, 1).T
        found.append(_batch_gradients(trainer, rollout, plan, advantages, ticks))
    return GradientConflict(*(np.stack(column) for column in zip(*found, strict=True)))


def _batch_gradients(
    trainer: Trainer[Any], rollout: Rollout[Any], plan: Plan, advantages: Tensor, ticks: Ticks
) -> list[Array]:
    """The fields of `GradientConflict` for one batch, of `advantages` [R, B]."""
    cosines, norms = [], []
    whole: list[list[Tensor]] | None = None
    for index in range(len(plan.trained)):
        gradients = step_gradients(trainer, rollout, plan, advantages, index)
        cosine, norm = _cosine_and_norms(*gradients)
        cosines.append(cosine)
        norms.append(norm)
        if whole is None:
            whole = gradients
        else:
            _add(whole, gradients)
        ticks.tick()
    assert whole is not None
    whole_cosine, whole_norms = _cosine_and_norms(*whole)
    advantage_cosine, _ = _cosine_and_norms(*([row] for row in advantages))
    return [np.array(values) for values in (cosines, norms, whole_cosine, whole_norms, advantage_cosine)]


def step_gradients(
    trainer: Trainer[Any], rollout: Rollout[Any], plan: Plan, advantages: Tensor, index: int
) -> list[list[Tensor]]:
    """Gradients of `-mean_b(advantages[k, b] log p[b])` at trained step number `index`, in micro-batches: for each
    reward k as the parameters are, where the parameters are.

    `advantages` [R, B]. One forward pass serves all rewards.
    """
    parameters = [parameter for _, parameter in trainer.policy.trainable_parameters()]
    total = [[torch.zeros_like(parameter) for parameter in parameters] for _ in advantages]
    rows = torch.arange(advantages.shape[1])
    for chunk in rows.split(trainer.config.optimizer.micro_batch):
        log_prob = trainer.transition(rollout, plan, torch.full_like(chunk, index), chunk).log_prob
        for reward, own in enumerate(advantages):
            loss = -(own[chunk].to(log_prob.device) * log_prob).sum() / len(rows)
            last = reward == len(advantages) - 1
            parts = torch.autograd.grad(
                loss, parameters, retain_graph=not last, allow_unused=True, materialize_grads=True
            )
            _add([total[reward]], [parts])
    return total


def _add(total: Sequence[Sequence[Tensor]], more: Sequence[Sequence[Tensor]]) -> None:
    """Add the tensors of each reward in place."""
    for into, parts in zip(total, more, strict=True):
        for tensor, part in zip(into, parts, strict=True):
            tensor.add_(part)


def _cosine_and_norms(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[float, list[float]]:
    """Cosine between two vectors, each in pieces, NaN where one is zero, and their norms."""
    norms = [_dot(each, each) ** 0.5 for each in (first, second)]
    product = norms[0] * norms[1]
    return _dot(first, second) / product if product > 0 else float("nan"), norms


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Product of two vectors in pieces: that of a piece where it lies, in its precision, their sum in float64."""
    pieces = torch.stack([a.flatten() @ b.flatten() for a, b in zip(first, second, strict=True)])
    return float(pieces.cpu().double().sum())
