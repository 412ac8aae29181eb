"""From an iteration's rewards to one advantage per sample and trained step, as the configuration says.

Shape legend: P prompts, G samples of a group, R rewards that are objectives, C constraints, T denoising steps, S
trained steps.
"""

import math

import torch
from torch import Tensor

from customized_grpo.algorithm import combine_advantages, schedule_weights, table_weights, time_curve
from customized_grpo.config.rewards import constraints, objectives
from customized_grpo.config.run import Config
from customized_grpo.randomness import generator
from customized_grpo.rewards.scoring import GroupRewards, violated
from customized_grpo.training.rollout import Plan


def step_weights(config: Config) -> Tensor:
    """Return the weights [T, R] of the objectives of `config`, in their order, at every true denoising step."""
    settings, followed = config.advantages, objectives(config.rewards)
    if settings.weights == "table" and settings.table is not None:
        columns = [settings.table[name] for name in followed]
        return table_weights(list(zip(*columns, strict=True)))
    curve = time_curve(config.rollout.num_steps, **settings.tdw.model_dump())
    return schedule_weights(
        curve, [reward.schedule for reward in followed.values()], [reward.weight for reward in followed.values()]
    )


def compute_advantages(config: Config, rewards: GroupRewards, weights: Tensor, plan: Plan, iteration: int) -> Tensor:
    """Return advantages [P, G, S], with the `weights` [T, R] of each true step, whatever the order of training.

    Rewards that are no objectives and no constraints take no part. `lookup: counter` reproduces the published code
    instead: each sample's steps are shuffled, and the k-th of them takes the weights of step k.
    """
    settings, followed, held = config.advantages, objectives(config.rewards), constraints(config.rewards)
    rows = torch.tensor(plan.trained)
    if settings.lookup == "counter":
        noise = generator(config.seed, iteration, "shuffled steps")
        rows = torch.rand(*rewards.values.shape[:2], len(rows), generator=noise).argsort(-1)
    limits = [reward.up_to for reward in followed.values()]
    objective, constraint = rewards.select(followed), rewards.select(held)
    return combine_advantages(
        objective.values,
        objective.valid & constraint.valid.all(-1, keepdim=True),
        weights=weights[rows],
        normalise=settings.normalize,
        shape=settings.shape,
        gamma=settings.sars.gamma,
        gamma_penalty=settings.sars.gamma_penalty,
        thresholds=None if limits == [None] * len(limits) else [math.inf if each is None else each for each in limits],
        violations=violated(constraint, held) if held else None,
        strict=config.advantages.constraints == "strict",
        clamp=settings.clip,
    )
