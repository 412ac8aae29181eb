"""Evaluation: deterministic images of fixed samples, measured by any metrics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customized_grpo.data import Sample, SubjectDataset
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import telling_where
from customized_grpo.evaluation.diversity import diversity
from customized_grpo.evaluation.metrics import Metric, measure, metric_names
from customized_grpo.evaluation.statistics import mean_interval
from customized_grpo.policies.policy import Policy
from customized_grpo.policies.sampling import sample_ode
from customized_grpo.randomness import batched_normal
from customized_grpo.rewards.texture import laplacian
from customized_grpo.runtime.memory import DRAWING, SCORING, explain_out_of_memory
from customized_grpo.tracking.metric_info import MetricInfo
from customized_grpo.tracking.timer import OnProgress
from customized_grpo.types import PromptBatch, References

PURPOSE = "evaluation"


def ignore_progress(share: float) -> None:
    """Ignore the `share` in [0, 1] of the images that are drawn."""


@dataclass(frozen=True)
class Sampling:
    """How images of an evaluation are drawn; equal seeds give equal initial noise."""

    num_steps: int
    shift: float | None
    seed: int
    micro_batch: int


@dataclass(frozen=True)
class Evaluation:
    """Images [N, 3, H, W] of N samples, and each metric [N] (float; verdicts 0 or 1) with what is shown of it.

    References are as the files have them, read when they are indexed.
    """

    samples: Sequence[Sample]
    references: References
    images: Tensor
    metrics: dict[str, Tensor]
    infos: Sequence[MetricInfo]
    reasons: Sequence[str | None] = ()
    """Why values of this process are missing."""
    roughness: Tensor | None = None
    """The mean absolute Laplacian of each image, [N]."""
    diversity: Tensor | None = None
    """The mean distance of two images of one prompt, [D] of the first D samples; None where it is not measured."""

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over the samples that have a value."""
        return {name: float(values.nanmean()) for name, values in self._figures().items()}

    def missing_share(self) -> float:
        """Return the share of scores, in [0, 1], that could not be computed."""
        values = list(self.metrics.values())
        return float(torch.stack(values).isnan().float().mean()) if values else 0.0

    def records(self) -> list[dict[str, Any]]:
        """Return one JSON object for each sample."""
        rows = []
        for index, sample in enumerate(self.samples):
            row: dict[str, Any] = {"id": sample.id, "prompt": sample.prompt, "subject": sample.subject}
            for info in self.infos:
                value = json_number(self.metrics[info.name][index])
                row[info.name] = bool(value) if info.verdict and value is not None else value
            rows.append(row)
        return rows

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the mean and 95 % interval of each metric."""
        intervals = {name: mean_interval(values.tolist()) for name, values in self._figures().items()}
        return {name: {"mean": mean, "low": low, "high": high} for name, (mean, low, high) in intervals.items()}

    def _figures(self) -> dict[str, Tensor]:
        return self.metrics if self.diversity is None else self.metrics | {"diversity": self.diversity}


@dataclass(frozen=True)
class Repeats:
    """How diversity is measured: `images` images of each of the first `samples` samples, by their `features`."""

    samples: int
    images: int
    features: Callable[[Tensor], Tensor]
    """Of images [N, 3, H, W], [N, E]."""


class Evaluator:
    """Draws and measures images of `policy` for the first samples of `dataset`."""

    def __init__(
        self,
        policy: Policy[Any],
        dataset: SubjectDataset,
        metrics: Sequence[Metric],
        sampling: Sampling,
        *,
        masks: bool = False,
        repeats: Repeats | None = None,
        ranks: DistributedGroup | None = None,
    ) -> None:
        """Take the parts of an evaluation.

        `masks`: the metrics want the references' masks. Without `repeats`, diversity is not measured. `ranks` share the
        samples out, and each gets all results.
        """
        self.policy, self.dataset, self.metrics, self.sampling = policy, dataset, metrics, sampling
        self.ranks = ranks or DistributedGroup()
        self._masks, self._repeats = masks, repeats

    def evaluate(self, num_samples: int, on_progress: OnProgress = ignore_progress) -> Evaluation:
        """Draw and measure the first `num_samples` samples. Raises `NotFinite` where an image is not finite."""
        ranks, samples = self.ranks, list(self.dataset)[:num_samples]
        rows = ranks.local_range(len(samples))
        own = samples[rows.start : rows.stop]
        names = metric_names(self.metrics)
        images, table = torch.zeros(0, 3, *self.policy.size), torch.zeros(0, len(names))
        with ranks.synchronized():
            with self.policy.lockstep(ranks), explain_out_of_memory("drawing images to evaluate", DRAWING):
                if own:
                    images = self._draw(own, rows, on_progress)
                diversity = self._diversity(samples)
            if own:
                with ranks.interruptible(), explain_out_of_memory("scoring images to evaluate", SCORING):
                    table = torch.stack(list(measure(self.metrics, images, self._batch(own)).values()), 1)
        reasons = [reason for metric in self.metrics for reason in metric.reasons] if own else []
        table, images = ranks.gather(table), ranks.gather(images)
        return Evaluation(
            samples,
            self.dataset.originals(samples),
            images,
            dict(zip(names, table.unbind(1), strict=True)),
            [info for metric in self.metrics for info in metric.infos],
            reasons,
            laplacian(images),
            None if self._repeats is None else ranks.gather(diversity),
        )

    def _diversity(self, samples: Sequence[Sample]) -> Tensor:
        """Draw this process's share of the repeated images, and return the diversity of each sample."""
        if self._repeats is None:
            return torch.zeros(0)
        count = self._repeats.images
        rows = self.ranks.local_range(min(self._repeats.samples, len(samples)))
        repeated = [samples[row] for row in rows for _ in range(count)]
        if not repeated:
            return torch.zeros(0)
        images = self._draw(repeated, [row for row in rows for _ in range(count)], numbers=[*range(count)] * len(rows))
        return diversity(self._repeats.features(images).cpu().unflatten(0, (-1, count))).float()

    def _draw(
        self, samples: Sequence[Sample], rows: Sequence[int], on_progress: OnProgress = ignore_progress,
        numbers: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """Draw images [N, 3, H, W] of `samples`, which are the `rows` of the evaluation.

        `numbers`: of each image among those of its row, None if each is the only one.
        """
        prepared = self.dataset.references(samples, self.policy.prepare_reference)
        prompts = [sample.prompt for sample in samples]
        with telling_where(PURPOSE):
            return draw(self.policy, prompts, prepared, rows, self.sampling, PURPOSE, on_progress, numbers)

    def _batch(self, samples: Sequence[Sample]) -> PromptBatch:
        return PromptBatch.of(self.dataset, samples, masks=self._masks)

    @property
    def ceiling(self) -> dict[str, float]:
        """What ideal images come to by name, for the metrics that know it."""
        return {name: value for metric in self.metrics for name, value in metric.ceiling.items()}

    def chance_levels(self, evaluation: Evaluation) -> dict[str, float]:
        """Return what metrics say of images that were drawn for another prompt and subject, by name.

        Empty if no metric asks for it, or if a sample has no such other sample.
        """
        asking = [metric for metric in self.metrics if metric.chance_names]
        others = [_other(evaluation.samples, row) for row in range(len(evaluation.samples))]
        if not asking or None in others:
            return {}
        images, batch = evaluation.images[torch.tensor(others)], self._batch(evaluation.samples)
        found = measure(asking, images, batch)
        return {name: float(found[name].mean()) for metric in asking for name in metric.chance_names}


def draw(
    policy: Policy[Any], prompts: Sequence[str], references: References, rows: Sequence[int], sampling: Sampling,
    purpose: str, on_progress: OnProgress = ignore_progress, numbers: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Draw images [N, 3, H, W], one for each of N `prompts` and its prepared `references`.

    `rows`, `numbers` (of the images of a row) and `purpose` name each image's initial noise. Raises `NotFinite` where
    an image is not finite.
    """
    numbers = [0] * len(rows) if numbers is None else numbers
    noise = batched_normal(sampling.seed, 0, rows, numbers, purpose, policy.latent_shape).to(policy.device)
    condition = policy.encode(prompts, references)
    sigmas = policy.sigmas(sampling.num_steps, sampling.shift)
    return sample_ode(policy, condition, noise, sigmas, sampling.micro_batch, on_progress)


def _other(samples: Sequence[Sample], row: int) -> int | None:
    """Return the next row with another prompt and another subject (by its name, else by its references)."""
    mine = samples[row]
    for step in range(1, len(samples)):
        other = samples[(row + step) % len(samples)]
        same = mine.subject == other.subject if mine.subject and other.subject else mine.references == other.references
        if other.prompt != mine.prompt and not same:
            return (row + step) % len(samples)
    return None


def json_number(value: Tensor) -> float | None:
    """Return a value as JSON has it: null where it is not finite."""
    return float(value) if bool(value.isfinite()) else None
