"""Conflicting gradients: the cosine between the gradients of the rewards' own objectives, by denoising step.

Shape legend: N batches, B samples of a batch, S = T - 1 trainable steps, R >= 2 rewards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from customized_grpo.algorithm import NORMALISERS
from customized_grpo.config.run import Config
from customized_grpo.data import SubjectDataset
from customized_grpo.evaluation.statistics import Array
from customized_grpo.policies.policy import ConditionT, Policy
from customized_grpo.rewards.reward import Reward
from customized_grpo.rewards.scoring import Scorer
from customized_grpo.training.objectives.grpo import step_transition
from customized_grpo.training.rollout import Plan, Rollout, encode_samples, iteration_samples, sample_groups

FRESH_NOISE = 1_000_000
"""Diagnosis draws the noise of the iterations from this one on, which no training reaches."""

OnProgress = Callable[[int, int], None]
"""Called as (done, of how many)."""


def silent(done: int, of: int) -> None:
    """Ignore progress."""


@dataclass
class Ticks:
    """Counts pieces of work, and says so."""

    on_progress: OnProgress
    of: int
    done: int = 0

    def tick(self) -> None:
        """Count one more step as done."""
        self.done += 1
        self.on_progress(self.done, self.of)


@dataclass(frozen=True, eq=False)
class GradientConflict:
    """What was measured on N independent batches; NaN where a gradient or all advantages are zero.

    cosines: `[N, S]` between the rewards' gradients at each step; for more than two, the mean over all pairs.
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
    rewards: Mapping[str, Reward],
    dataset: SubjectDataset,
    *,
    batches: int = 8,
    on_progress: OnProgress = silent,
) -> GradientConflict:
    """Measure the gradients of the rewards' objectives on `batches` batches drawn as in training, every step trained.

    A reward's own objective is `-mean_b(A[b] log p[b])` with its advantages alone, unshaped and unweighted: its
    gradient equals the gradient of the clipped surrogate on the first pass, where the ratio is 1. Weights and their
    `.grad` stay unchanged. Raises `TrainingError` when too many rewards failed.
    """
    scorer, settings = Scorer(rewards, config.rewards), config.rollout
    steps = tuple(range(settings.num_steps - 1))
    plan = Plan(policy.sigmas(settings.num_steps, settings.shift), steps, steps)
    found: list[list[Array]] = []
    ticks = Ticks(on_progress, batches * len(steps))
    for batch in range(batches):
        samples = iteration_samples(dataset, settings.prompts_per_iteration, config.seed, batch)
        rollout = sample_groups(
            policy, encode_samples(policy, dataset, samples), len(samples), plan, settings,
            seed=config.seed, iteration=FRESH_NOISE + batch,
        )  # fmt: skip
        scores = scorer.score(rollout.images, scorer.batch(dataset, samples))
        scorer.check(scores, f"batch {batch + 1} of the gradients")
        valid = scores.valid.all(-1, keepdim=True).expand_as(scores.valid)
        advantages = NORMALISERS[config.advantages.normalize](scores.values, valid).flatten(0, 1).T
        found.append(_batch_gradients(config, policy, rollout, advantages, ticks))
    return GradientConflict(*(np.stack(column) for column in zip(*found, strict=True)))


def _batch_gradients(
    config: Config, policy: Policy[Any], rollout: Rollout[Any], advantages: Tensor, ticks: Ticks
) -> list[Array]:
    """Return the fields of `GradientConflict` for one batch, of `advantages` [R, B]."""
    cosines, norms = [], []
    whole: list[list[Tensor]] | None = None
    for index in range(len(rollout.plan.trained)):
        gradients = step_gradients(config, policy, rollout, advantages, index)
        cosine, norm = _cosine_and_norms(gradients)
        cosines.append(cosine)
        norms.append(norm)
        if whole is None:
            whole = gradients
        else:
            _add(whole, gradients)
        ticks.tick()
    assert whole is not None
    whole_cosine, whole_norms = _cosine_and_norms(whole)
    advantage_cosine, _ = _cosine_and_norms([[row] for row in advantages])
    return [np.array(values) for values in (cosines, norms, whole_cosine, whole_norms, advantage_cosine)]


def step_gradients(
    config: Config, policy: Policy[Any], rollout: Rollout[Any], advantages: Tensor, index: int
) -> list[list[Tensor]]:
    """Return the gradients of `-mean_b(advantages[k, b] log p[b])` at trained step number `index`, of each reward k.

    `advantages` [R, B]. A gradient is a tensor for each trained parameter, of its shape and on its device. One forward
    pass, in micro-batches, serves all rewards.
    """
    parameters = [parameter for _, parameter in policy.trainable_parameters()]
    total = [[torch.zeros_like(parameter) for parameter in parameters] for _ in advantages]
    rows = torch.arange(advantages.shape[1])
    for chunk in rows.split(config.optimizer.micro_batch):
        present = step_transition(policy, rollout, config.rollout, torch.full_like(chunk, index), chunk)
        log_prob = present.log_prob(rollout.next_states[index, chunk])
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


def _cosine_and_norms(vectors: Sequence[Sequence[Tensor]]) -> tuple[float, list[float]]:
    """Return the mean cosine over all pairs of vectors, each in pieces, NaN if one is zero, and their norms."""
    norms = [_dot(each, each) ** 0.5 for each in vectors]
    cosines = []
    for i, j in combinations(range(len(vectors)), 2):
        product = norms[i] * norms[j]
        cosines.append(_dot(vectors[i], vectors[j]) / product if product > 0 else float("nan"))
    return sum(cosines) / len(cosines), norms


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the product of two vectors given in pieces: each piece on its device in its precision, the sum in
    float64."""
    pieces = torch.stack([a.flatten() @ b.flatten() for a, b in zip(first, second, strict=True)])
    return float(pieces.cpu().double().sum())
