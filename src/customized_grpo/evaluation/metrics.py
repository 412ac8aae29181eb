"""What images are measured by: the protocol of a metric, and metrics of any generator.

Shape legend: N images, K pictures of a subject, D features.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.evaluation.copy_paste import layout
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.tracking.metric_info import REWARD_PREFIX, MetricInfo, metric_info
from customized_grpo.types import PromptBatch

COPY = "copy"
SAME = 1 - 1e-5
"""Two pictures whose layouts correlate more than this are one picture."""


class Metric(Protocol):
    """Measures images by one figure or several; deterministic.

    A subclass inherits "unknown" for ceiling, chance and reasons.
    """

    infos: Sequence[MetricInfo]
    """What is shown of each figure; its name is the key in `measure`."""
    ceiling: Mapping[str, float] = MappingProxyType({})
    """Figures of ideal images by name, if they are known."""
    chance_names: Sequence[str] = ()
    """Figures whose level by chance is of interest: an evaluation measures it on images of other prompts."""
    reasons: Sequence[str | None] = ()
    """Why values of the last `measure` are missing, without what is secret."""

    @abstractmethod
    def measure(self, images: Tensor, batch: PromptBatch) -> Mapping[str, Tensor]:
        """Measure `images` [N, 3, H, W] in [0, 1], one for each prompt of `batch`.

        Returns values [N] by the names of `infos`, NaN where a value is missing.
        """
        ...


def measure(metrics: Sequence[Metric], images: Tensor, batch: PromptBatch) -> dict[str, Tensor]:
    """Measure `images` [N, 3, H, W] by all `metrics`: float values [N] on the CPU by name, NaN where missing."""
    found: dict[str, Tensor] = {}
    for metric in metrics:
        values = metric.measure(images, batch)
        for info in metric.infos:
            value = values.get(info.name)
            if value is None or value.shape != (len(images),):
                shape = "nothing" if value is None else f"a tensor of shape {list(value.shape)}"
                raise UserError(
                    f"{type(metric).__name__}.measure: found {shape} for '{info.name}', expected a tensor of shape "
                    f"[{len(images)}]: one value for each image"
                )
            found[info.name] = value.float().cpu()
    return found


def metric_names(metrics: Sequence[Metric]) -> list[str]:
    """Return the names of all figures of `metrics`, in order."""
    return [info.name for metric in metrics for info in metric.infos]


class ScoreMetric(Metric):
    """Measures by scorers, which are rewards or of their kind; each scores once, whatever number of figures it has."""

    def __init__(self, scorers: Mapping[str, Reward]) -> None:
        """Take the `scorers` by the name of the figure."""
        self._scorers = scorers
        self.infos = [metric_info(name) for name in scorers]

    @classmethod
    def of_rewards(cls, rewards: Mapping[str, Reward]) -> "ScoreMetric":
        """Return the metric of `rewards`: `reward/NAME` is the score of the reward with that name."""
        return cls({f"{REWARD_PREFIX}{name}": reward for name, reward in rewards.items()})

    def measure(self, images: Tensor, batch: PromptBatch) -> Mapping[str, Tensor]:
        """Score `images` [N, 3, H, W]."""
        groups = images.unsqueeze(1)  # one tensor for all: a judge of several is asked once, an encoder runs once
        each = {id(scorer): scorer for scorer in self._scorers.values()}
        found = {key: scorer.score(groups, batch) for key, scorer in each.items()}
        self.reasons = [scores.reason for scores in found.values()]
        return {name: known(found[id(scorer)]) for name, scorer in self._scorers.items()}


class PromptMetric(Metric):
    """Measures by one reward that reads the prompt alone."""

    def __init__(self, name: str, reward: Reward, *, first_character: bool = False) -> None:
        """Score each prompt by `first_character` alone where published figures were made that way."""
        self.infos = [metric_info(name)]
        self._name, self._reward, self._first_character = name, reward, first_character

    def measure(self, images: Tensor, batch: PromptBatch) -> Mapping[str, Tensor]:
        """Score `images` [N, 3, H, W]."""
        prompts = [prompt[:1] for prompt in batch.prompts] if self._first_character else batch.prompts
        scored = self._reward.score(images.unsqueeze(1), PromptBatch(prompts, [[] for _ in prompts], None))
        return {self._name: known(scored)}


class IdentityMetric(Metric):
    """Measures the mean cosine to pictures of the subject, in [-1, 1]."""

    def __init__(self, name: str, encoder: Callable[[Tensor], Tensor]) -> None:
        """Compare what `encoder` makes of images [B, 3, H, W]: unit features [B, D]."""
        self.infos = [metric_info(name)]
        self._name, self._encoder = name, encoder
        self._last: tuple[Sequence[Tensor], Tensor] | None = None

    def measure(self, images: Tensor, batch: PromptBatch) -> Mapping[str, Tensor]:
        """Compare `images` [N, 3, H, W] with `batch.pictures`."""
        pictures = batch.references if batch.pictures is None else batch.pictures
        parts = []
        for rows, shared in shared_rows(pictures):
            features = self._features(shared)
            parts.append((self._encoder(images[rows]) @ features.T).mean(1))
        return {self._name: torch.cat(parts)}

    def _features(self, pictures: Sequence[Tensor]) -> Tensor:
        """Return the features [K, D] of `pictures`; those of the last call are kept."""
        if self._last is None or not _same(self._last[0], pictures):
            self._last = (pictures, torch.cat([self._encoder(picture[None]) for picture in pictures]))
        return self._last[1]


class CopyMetric(Metric):
    """Measures copy-paste: how far an image is from other subjects' pictures (0) towards being its reference (1).

    Closeness is the correlation of two pictures' 8 x 8 layouts. The closeness to expect of an image that is no copy is
    how close the reference is to the pictures of all other subjects; without other subjects, 0. A subject is another
    one if it has another name and does not have the reference among its pictures.
    """

    def __init__(self, layouts: Mapping[str, Tensor]) -> None:
        """Take the `layouts` [K, ...] of all pictures of each subject, by subject; see `reference_layouts`."""
        self.infos = [metric_info(COPY)]
        self._layouts = torch.cat(list(layouts.values())) if layouts else torch.zeros(0)
        self._numbers = {subject: number for number, subject in enumerate(layouts)}
        counts = torch.tensor([len(each) for each in layouts.values()], dtype=torch.long)
        self._owners = torch.arange(len(layouts)).repeat_interleave(counts)

    def measure(self, images: Tensor, batch: PromptBatch) -> Mapping[str, Tensor]:
        """Hold `images` [N, 3, H, W] against the references of `batch`, which names its subjects if it knows them."""
        subjects = batch.subjects or [None] * len(images)
        parts = [
            self._towards(images[rows], references, subjects[rows.start])
            for rows, references in shared_rows(batch.references)
        ]
        return {COPY: torch.cat(parts)}

    def _towards(self, images: Tensor, references: Sequence[Tensor], subject: str | None) -> Tensor:
        targets = torch.cat([layout(reference[None]) for reference in references])
        expected = self._expected(targets, subject)
        towards = (layout(images.cpu()) @ targets.T - expected) / (1 - expected).clamp(min=1e-3)
        return towards.amax(1)

    def _expected(self, targets: Tensor, subject: str | None) -> Tensor:
        """Return the mean closeness [K] of the references' layouts `targets` [K, ...] to other subjects' pictures."""
        if not self._numbers:
            return torch.zeros(len(targets))
        closeness = targets @ self._layouts.T
        own = self._owners[(closeness > SAME).any(0)]
        if subject in self._numbers:
            own = torch.cat([own, torch.tensor([self._numbers[subject]])])
        others = ~torch.isin(self._owners, own)
        return closeness[:, others].mean(1) if bool(others.any()) else torch.zeros(len(targets))


def known(found: Scores) -> Tensor:
    """Return scores [N, 1] as values [N], NaN where they are invalid."""
    return torch.where(found.valid, found.values, torch.nan).squeeze(1).float().cpu()


def shared_rows(pictures: Sequence[Sequence[Tensor]]) -> Iterator[tuple[slice, Sequence[Tensor]]]:
    """Yield consecutive rows that have the very same pictures, and these pictures."""
    start, shared = 0, None
    for row, own in enumerate(pictures):
        if shared is not None and not _same(shared, own):
            yield slice(start, row), shared
            start = row
        shared = own
    if shared is not None:
        yield slice(start, len(pictures)), shared


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))
