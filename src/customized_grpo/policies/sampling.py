"""Deterministic images from a policy."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from customized_grpo.algorithm import ode_step
from customized_grpo.errors import NotFinite
from customized_grpo.policies.policy import ConditionT, Policy


@torch.no_grad()
def sample_ode(
    policy: Policy[ConditionT], condition: ConditionT, noise: Tensor, sigmas: Tensor, micro_batch: int,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Tensor:  # fmt: skip
    """Draw deterministic images [B, 3, H, W], one per row of `condition`, from `noise` [B, *] down `sigmas` [T + 1].

    Raises `NotFinite` if an image is not finite.
    """
    images = []
    for rows in torch.arange(len(noise)).split(micro_batch):
        latents, part = noise[rows], condition.take(rows)
        for sigma, sigma_next in pairwise(sigmas):
            velocity = policy.velocity(latents, sigma.expand(len(rows)), part)
            latents = ode_step(latents, velocity, sigma, sigma_next)
        images.append(decode_checked(policy, latents))
        on_progress((int(rows[-1]) + 1) / len(noise))
    return torch.cat(images)


def decode_checked(policy: Policy[ConditionT], latents: Tensor) -> Tensor:
    """Decode `latents` [B, *] to images [B, 3, H, W]. Raises `NotFinite` where some of them are not finite."""
    images = policy.decode(latents)
    # The latents too: clamped to [0, 1], an infinite pixel is a white one.
    finite = latents.flatten(1).isfinite().all(1) & images.flatten(1).isfinite().all(1).to(latents.device)
    if not finite.all():
        raise NotFinite(
            f"{int((~finite).sum())} of {len(finite)} pictures that the generator drew are not finite. Likely causes: "
            "a precision that does not hold its numbers (try policy.precision=fp32); weights that grew without bound "
            "(take an earlier checkpoint, and lower optimizer.learning_rate); damaged weights of the model or adapter"
        )
    return images
