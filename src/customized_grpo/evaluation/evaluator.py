"""Evaluation: deterministic samples of fixed pairs, scored by the rewards and by a judge that no policy is trained
against."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customized_grpo.data import Sample, SubjectDataset, resize_square
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import telling_where
from customized_grpo.policies.policy import ConditionT, Policy, in_step
from customized_grpo.policies.sampling import sample_ode
from customized_grpo.randomness import batched_normal
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.runtime.memory import DRAWING, SCORING, explain_out_of_memory
from customized_grpo.statistics import mean_interval
from customized_grpo.toybox.drawing import SIZE
from customized_grpo.toybox.oracle import Oracle
from customized_grpo.types import PromptBatch, References

JUDGE_METRICS = ("prompt_satisfied", "identity_kept", "joint_success", "copied")
CHANCE_METRICS = JUDGE_METRICS[:3]
"""A picture of another pair is no copy of this reference: chance says nothing of copying."""
COPY_SCORE = "copy_score"
REWARD_METRICS = ("reward/prompt", "reward/identity")
PURPOSE = "evaluation"


@dataclass(frozen=True)
class Evaluation:
    """Images [N, 3, H, W] of N pairs, their references as the files have them, read when they are asked for, and each
    metric [N] (float; the judge's verdicts 0 or 1)."""

    samples: Sequence[Sample]
    references: References
    images: Tensor
    metrics: dict[str, Tensor]

    def means(self) -> dict[str, float]:
        """The mean of each metric over the pairs whose reward could be computed."""
        return {name: float(values.nanmean()) for name, values in self.metrics.items()}

    def missing_share(self) -> float:
        """The share of the rewards, in [0, 1], that could not be computed."""
        values = torch.stack([self.metrics[name] for name in REWARD_METRICS])
        return float(values.isnan().float().mean())

    def records(self) -> list[dict[str, Any]]:
        """One JSON object for each pair."""
        rows = []
        for index, sample in enumerate(self.samples):
            row: dict[str, Any] = {"id": sample.id, "prompt": sample.prompt, "subject": sample.subject}
            for name, values in self.metrics.items():
                row[name] = bool(values[index]) if name in JUDGE_METRICS else number(values[index])
            rows.append(row)
        return rows

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and 95 % interval of each metric."""
        intervals = {name: mean_interval(values.tolist()) for name, values in self.metrics.items()}
        return {name: {"mean": mean, "low": low, "high": high} for name, (mean, low, high) in intervals.items()}


def evaluate(
    policy: Policy[ConditionT], dataset: SubjectDataset, rewards: Mapping[str, Reward], judge: Oracle | None, *,
    pairs: int, num_steps: int, shift: float | None, seed: int, micro_batch: int, masks: bool = False,
    ranks: DistributedGroup | None = None, on_progress: Callable[[float], None] = lambda share: None,
) -> Evaluation:  # fmt: skip
    """Evaluate `policy` on the first `pairs` samples of `dataset`; equal seeds give equal initial noise.

    `masks`: the rewards want the references' masks. `ranks` share the pairs out, and each gets the whole evaluation.
    Raises `NotFinite` where a picture is not finite.
    """
    ranks = ranks or DistributedGroup()
    samples = list(dataset)[:pairs]
    mine = ranks.local_range(len(samples))
    own = samples[mine.start : mine.stop]
    with ranks.synchronized():
        images, metrics = torch.zeros(0, 3, *policy.size), None
        with in_step(policy, ranks), explain_out_of_memory("drawing images to evaluate", DRAWING):
            batch = PromptBatch.of(dataset, own, masks=masks)
            if own:
                prepared = dataset.references(own, policy.prepare_reference)
                noise = batched_normal(seed, 0, mine, [0] * len(own), PURPOSE, policy.latent_shape).to(policy.device)
                condition = policy.encode(batch.prompts, prepared)
                sigmas = policy.sigmas(num_steps, shift)
                with telling_where("evaluation"):
                    images = sample_ode(policy, condition, noise, sigmas, micro_batch, on_progress)
        if own:
            with ranks.interruptible(), explain_out_of_memory("scoring images to evaluate", SCORING):
                metrics = measure(images, batch, rewards, judge)
    names = (*JUDGE_METRICS, COPY_SCORE, *REWARD_METRICS) if judge else REWARD_METRICS
    table = ranks.gather(torch.stack([metrics[name] for name in names], 1) if metrics else torch.zeros(0, len(names)))
    return Evaluation(
        samples, dataset.originals(samples), ranks.gather(images), dict(zip(names, table.unbind(1), strict=True))
    )


def measure(
    images: Tensor, batch: PromptBatch, rewards: Mapping[str, Reward], judge: Oracle | None
) -> dict[str, Tensor]:
    """Each metric [N] of `images` [N, 3, H, W], one for each prompt of the task."""
    groups = images.unsqueeze(1)  # one tensor for all rewards: a judge of both is asked once
    metrics = {f"reward/{name}": _known(reward.score(groups, batch)) for name, reward in rewards.items()}
    if judge is not None:
        verdict = judge.judge(images, batch.prompts, first_references(batch.references))
        metrics = {name: getattr(verdict, name).float() for name in (*JUDGE_METRICS, COPY_SCORE)} | metrics
    return metrics


def scores(images: Tensor, batch: PromptBatch, reward: Reward) -> Tensor:
    """The reward [N] of `images` [N, 3, H, W], one for each prompt of the task; NaN where there is none."""
    return _known(reward.score(images.unsqueeze(1), batch))


def _known(found: Scores) -> Tensor:
    """Scores [N, 1] as values [N], NaN where they are invalid."""
    return torch.where(found.valid, found.values, torch.nan).squeeze(1).float().cpu()


def chance_levels(evaluation: Evaluation, judge: Oracle) -> dict[str, float]:
    """What the judge says when every picture is held against another pair's prompt and reference, both different.

    Empty where the data has no such other pair.
    """
    others = [_other(evaluation.samples, row) for row in range(len(evaluation.samples))]
    if None in others:
        return {}
    prompts = [sample.prompt for sample in evaluation.samples]
    verdict = judge.judge(evaluation.images[torch.tensor(others)], prompts, first_references(evaluation.references))
    return {name: float(getattr(verdict, name).float().mean()) for name in CHANCE_METRICS}


def first_references(references: References) -> Tensor:
    """The first reference of each pair as ToyBox's judge sees it, [N, 3, 32, 32]."""
    return torch.stack([resize_square(row[0], SIZE) for row in references])


def _other(samples: Sequence[Sample], row: int) -> int | None:
    """The next row with another prompt and another subject (by its name, else by its references)."""
    mine = samples[row]
    for step in range(1, len(samples)):
        other = samples[(row + step) % len(samples)]
        same = mine.subject == other.subject if mine.subject and other.subject else mine.references == other.references
        if other.prompt != mine.prompt and not same:
            return (row + step) % len(samples)
    return None


def number(value: Tensor) -> float | None:
    """A value as JSON has it, null where it is not finite."""
    return float(value) if bool(value.isfinite()) else None
