"""Named rewards of groups of images: scored, checked, and as metrics.

Shape legend: P prompts, G samples of a group, R rewards.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from customized_grpo.algorithm import conflict_rate, group_advantages, quadrants, violations
from customized_grpo.config.rewards import Rewards, constraints, objectives, wants_masks
from customized_grpo.data import Sample, SubjectDataset
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import TrainingError, UserError
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

    def select(self, names: Iterable[str]) -> "GroupRewards":
        """Return the columns of the rewards `names`, in their order."""
        names = tuple(names)
        places = [self.names.index(name) for name in names]
        return GroupRewards(names, self.values[..., places], self.valid[..., places])

    def metrics(self) -> Metrics:
        """Return each reward's mean and spread within a group, and the share of scores that are missing."""
        metrics: Metrics = {}
        known = torch.where(self.valid, self.values, torch.nan)
        centered = known - known.nanmean(1, keepdim=True)
        freedom = self.valid.sum(1) - 1
        std = torch.where(freedom > 0, (centered.square().nansum(1) / freedom.clamp(min=1)).sqrt(), torch.nan)
        for index, name in enumerate(self.names):
            metrics[f"reward/{name}/mean"] = float(known[..., index].nanmean())
            metrics[f"reward/{name}/std"] = float(std[:, index].nanmean())
        metrics["invalid_share"] = 1 - float(self.valid.float().mean())
        return metrics

    def agreement(self) -> Metrics:
        """Return the signs of the rewards' advantages by pair, and how often they conflict; nothing for one reward."""
        if len(self.names) < 2:
            return {}
        scored = self.valid.all(-1, keepdim=True).expand_as(self.valid)
        advantages = group_advantages(self.values, scored)
        shares = quadrants(advantages, self.valid, self.names)
        return {f"quadrant/{name}": share for name, share in shares.items()} | {
            "conflict_rate": conflict_rate(advantages, self.valid)
        }


def violated(rewards: GroupRewards, held: Rewards) -> Tensor:
    """Return how far the scores of constraints are outside of the bounds that `held` gives them, [P, G, C] >= 0."""
    bounds = [held[name] for name in rewards.names]
    values = torch.where(rewards.valid, rewards.values, 0.0)  # those that are invalid count nowhere
    return violations(values, [each.at_least for each in bounds], [each.at_most for each in bounds])


@dataclass(frozen=True, eq=False)
class Scorer:
    """Any number of `rewards` by name, scored together. Columns follow the order of the names."""

    rewards: Mapping[str, Reward]
    settings: Rewards

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names, in the order of the columns."""
        return tuple(self.rewards)

    def batch(self, dataset: SubjectDataset, samples: Sequence[Sample]) -> PromptBatch:
        """Return what the rewards read of `samples`: prompts, references as the files have them, masks if wanted."""
        return PromptBatch.of(dataset, samples, masks=wants_masks(self.settings) is not None)

    def score(self, images: Tensor, batch: PromptBatch) -> GroupRewards:
        """Score `images` [P, G, 3, H, W]. A reward counts as valid if it says so and is finite."""
        scores = [reward.score(images, batch) for reward in self.rewards.values()]
        values = torch.stack([score.values.float().cpu() for score in scores], dim=-1)
        valid = torch.stack([score.valid.cpu() for score in scores], dim=-1) & values.isfinite()
        return GroupRewards(self.names, values, valid, tuple(score.reason for score in scores))

    def metrics(self, rewards: GroupRewards) -> Metrics:
        """Return what is logged of an iteration's `rewards`: of each, of pairs of objectives, and of constraints."""
        held = constraints(self.settings)
        scores = rewards.select(held)
        broken = torch.where(scores.valid, (violated(scores, held) > 0).float(), torch.nan).flatten(0, 1)
        shares = {f"violated/{name}": float(column.nanmean()) for name, column in zip(held, broken.T, strict=True)}
        return rewards.metrics() | rewards.select(objectives(self.settings)).agreement() | shares

    def check(self, rewards: GroupRewards, where: str) -> None:
        """Raise `TrainingError`, which begins with `where`, if too many scores of one of the `rewards` are missing."""
        for name, failed in zip(rewards.names, (1 - rewards.valid.float().mean((0, 1))).tolist(), strict=True):
            limit = self.settings[name].max_invalid_share
            if failed > limit:
                raise TrainingError(
                    f"{where}: {failed:.0%} of the {name} rewards could not be computed, more than "
                    f"rewards.{name}.max_invalid_share={limit:.0%}{in_brackets(rewards.reasons)}. Mend the reward; a "
                    "run goes on with train --resume"
                )

    def check_bounds(self, rewards: GroupRewards) -> None:
        """Raise `UserError` for a constraint that no score of an untuned generator comes near.

        Its bound is then farther from all scores than these are from each other: most likely it has another unit.
        """
        for name, reward in constraints(self.settings).items():
            scores = rewards.select([name])
            known = scores.values[scores.valid]
            if not len(known):
                continue
            low, high = float(known.min()), float(known.max())
            for field, bound, near in (
                ("at_least", reward.at_least, 2 * high - low),
                ("at_most", reward.at_most, 2 * low - high),
            ):
                if bound is not None and (bound > near if field == "at_least" else bound < near):
                    raise UserError(
                        f"rewards.{name}.{field}={bound:g} is out of reach: the first iteration's images score "
                        f"{low:.4g} to {high:.4g}. Give the bound in the reward's own units; nothing was trained"
                    )
