"""Deterministic images from a policy."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from customized_grpo.algorithm import ode_step
from customized_grpo.policies.policy import ConditionT, Policy
from customized_grpo.training.rollout import _decoded


@torch.no_grad()
def sample_ode(
    policy: Policy[ConditionT], condition: ConditionT, noise: Tensor, sigmas: Tensor, micro_batch: int,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Tensor:  # fmt: skip
    """Deterministic images [B, 3, H, W], one for each row of `condition`, from `noise` [B, *] down `sigmas` [T + 1].

    Raises `NotFinite` where a picture is not finite.
    """
    images = []
    for rows in torch.arange(len(noise)).split(micro_batch):
        latents, part = noise[rows], condition.take(rows)
        for sigma, sigma_next in pairwise(sigmas):
            velocity = policy.velocity(latents, sigma.expand(len(rows)), part)
            latents = ode_step(latents, velocity, sigma, sigma_next)
        images.append(_decoded(policy, latents))
        on_progress((int(rows[-1]) + 1) / len(noise))
    return torch.cat(images)
