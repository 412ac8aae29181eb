"""Named rewards of groups of images: scored, checked, and as metrics.

Shape legend: P prompts, G samples of a group, R rewards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from customized_grpo.algorithm import conflict_rate, group_advantages, quadrants
from customized_grpo.config.rewards import RewardsConfig
from customized_grpo.data import Sample, SubjectDataset
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import TrainingError
from customized_grpo.io.jsonl import Metrics
from customized_grpo.rewards.reward import Reward, in_brackets
from customized_grpo.types import PromptBatch


@dataclass(frozen=True, eq=False)
class GroupRewards:
    """The rewards of P groups, one column for each of `names`.

    values: [P, G, R] float32 on the CPU.
    valid: [P, G, R] bool on the CPU, False where a reward could not be computed.
    reasons: of this process, why scores of each reward are missing; None where none is.
    """

    names: tuple[str, ...]
    values: Tensor
    valid: Tensor
    reasons: tuple[str | None, ...] = ()

    def gathered(self, group: DistributedGroup) -> "GroupRewards":
        """Return the rewards of the groups of all processes, in the order of their ranks."""
        return GroupRewards(self.names, group.gather(self.values), group.gather(self.valid), self.reasons)

    def metrics(self) -> Metrics:
        """Return each reward's mean and spread within a group, the signs of pairs, and the share that is missing."""
        metrics: Metrics = {}
        known = torch.where(self.valid, self.values, torch.nan)
        centered = known - known.nanmean(1, keepdim=True)
        freedom = self.valid.sum(1) - 1
        std = torch.where(freedom > 0, (centered.square().nansum(1) / freedom.clamp(min=1)).sqrt(), torch.nan)
        for index, name in enumerate(self.names):
            metrics[f"reward/{name}/mean"] = float(known[..., index].nanmean())
            metrics[f"reward/{name}/std"] = float(std[:, index].nanmean())
        if len(self.names) > 1:
            scored = self.valid.all(-1, keepdim=True).expand_as(self.valid)
            advantages = group_advantages(self.values, scored)
            shares = quadrants(advantages, self.valid, self.names)
            metrics |= {f"quadrant/{name}": share for name, share in shares.items()}
            metrics["conflict_rate"] = conflict_rate(advantages, self.valid)
        metrics["invalid_share"] = 1 - float(self.valid.float().mean())
        return metrics


@dataclass(frozen=True, eq=False)
class Scorer:
    """Any number of `rewards` by name, scored together. Columns follow the order of the names."""

    rewards: Mapping[str, Reward]
    settings: RewardsConfig

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names, in the order of the columns."""
        return tuple(self.rewards)

    def batch(self, dataset: SubjectDataset, samples: Sequence[Sample]) -> PromptBatch:
        """Return what the rewards read of `samples`: prompts, references as the files have them, masks if wanted."""
        return PromptBatch.of(dataset, samples, masks=self.settings.identity_reference == "segmented")

    def score(self, images: Tensor, batch: PromptBatch) -> GroupRewards:
        """Score `images` [P, G, 3, H, W]. A reward counts as valid if it says so and is finite."""
        scores = [reward.score(images, batch) for reward in self.rewards.values()]
        values = torch.stack([score.values.float().cpu() for score in scores], dim=-1)
        valid = torch.stack([score.valid.cpu() for score in scores], dim=-1) & values.isfinite()
        return GroupRewards(self.names, values, valid, tuple(score.reason for score in scores))

    def check(self, rewards: GroupRewards, where: str) -> None:
        """Raise `TrainingError`, which begins with `where`, if too many scores of one of the `rewards` are missing."""
        limit = self.settings.max_invalid_share
        for name, failed in zip(rewards.names, (1 - rewards.valid.float().mean((0, 1))).tolist(), strict=True):
            if failed > limit:
                raise TrainingError(
                    f"{where}: {failed:.0%} of the {name} rewards could not be computed, more than "
                    f"rewards.max_invalid_share={limit:.0%}{in_brackets(rewards.reasons)}. Mend the reward; a run goes "
                    "on with train --resume"
                )
