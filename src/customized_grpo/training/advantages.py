"""From an iteration's rewards to one advantage per sample and trained step, as the configuration says.

Shape legend: P prompts, G samples of a group, R rewards, T denoising steps, S trained steps.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from customized_grpo.algorithm import combine_advantages, constant_weights, table_weights, time_weights
from customized_grpo.config.advantages import AdvantagesConfig
from customized_grpo.errors import UserError
from customized_grpo.randomness import generator
from customized_grpo.rewards.scoring import GroupRewards
from customized_grpo.training.rollout import Plan

PAIR = ("prompt", "identity")
"""The columns of every pair in the configuration: time weights and thresholds."""


def step_weights(config: AdvantagesConfig, num_steps: int, names: Sequence[str]) -> Tensor:
    """Return the weights [T, R] of the rewards `names` at every true denoising step.

    Raises `UserError` for a reward to which the configuration gives no weight.
    """
    if config.weights == "constant":
        table = constant_weights(num_steps, config.constant)
    elif config.weights == "table":
        table = table_weights(config.table or ())
    else:
        table = time_weights(num_steps, **config.tdw.model_dump())
    return table[:, _columns(names)]


def compute_advantages(
    config: AdvantagesConfig, rewards: GroupRewards, weights: Tensor, plan: Plan, *, seed: int, iteration: int
) -> Tensor:
    """Return advantages [P, G, S], with the `weights` [T, R] of each true step, whatever the order of training.

    `lookup: counter` reproduces the published code instead: each sample's steps are shuffled, and the k-th of them
    takes the weights of step k.
    """
    rows = torch.tensor(plan.trained)
    if config.lookup == "counter":
        noise = generator(seed, iteration, "shuffled steps")
        rows = torch.rand(*rewards.values.shape[:2], len(rows), generator=noise).argsort(-1)
    thresholds = None
    if config.thresholds is not None:
        limits = [math.inf if limit is None else limit for limit in config.thresholds]
        thresholds = [limits[column] for column in _columns(rewards.names)]
    return combine_advantages(
        rewards.values,
        rewards.valid,
        weights=weights[rows],
        normalise=config.normalize,
        shape=config.shape,
        gamma=config.sars.gamma,
        gamma_penalty=config.sars.gamma_penalty,
        thresholds=thresholds,
        clamp=config.clip,
    )


def _columns(names: Sequence[str]) -> list[int]:
    unknown = [name for name in names if name not in PAIR]
    if unknown:
        raise UserError(
            f"advantages: no weight for the reward {unknown[0]!r}; weights are given to {' and '.join(PAIR)}: name the "
            "reward so, or leave it out"
        )
    return [PAIR.index(name) for name in names]
