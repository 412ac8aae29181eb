"""The clipped surrogate objective (PPO, arXiv 1707.06347, eq. 7) with an optional KL penalty."""

from typing import NamedTuple

import torch
from torch import Tensor


class ClippedObjective(NamedTuple):
    """Loss and diagnostics, all 0-d; everything but `loss` is detached.

    loss: what to minimise.
    ratio_mean, ratio_min, ratio_max: of `exp(log_prob - old_log_prob)`; all 1 on the first pass.
    clip_fraction: share of elements whose ratio lies outside `[1 - clip_range, 1 + clip_range]`.
    """

    loss: Tensor
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    clip_fraction: Tensor


def clipped_objective(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float,
    *,
    kl: Tensor | None = None,
    kl_weight: float = 0.0,
) -> ClippedObjective:
    """Return `mean(max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range))) + kl_weight mean(kl)`.

    `rho = exp(log_prob - old_log_prob)`. The three tensors share one shape, any; `kl` (for instance
    `gaussian_kl` to the frozen base) has it too. Only `log_prob` and `kl` receive gradients. Computed in
    float32 (float64 stays).

    Both terms are means over elements, so micro-batches add up to the whole when each is weighted by its
    share of the elements: `sum(n_i / n * loss_i)`.

    Raises ValueError on unequal shapes, no elements at all, `clip_range <= 0`, `kl_weight < 0`, or a
    `kl_weight` without a `kl`.
    """
    _check(log_prob, old_log_prob, advantages, clip_range, kl, kl_weight)
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    advantages = advantages.detach().to(dtype)
    ratio = torch.exp(log_prob.to(dtype) - old_log_prob.detach().to(dtype))
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    if kl is not None and kl_weight > 0:
        loss = loss + kl_weight * kl.to(dtype).mean()

    r = ratio.detach()
    outside = (r < 1 - clip_range) | (r > 1 + clip_range)
    return ClippedObjective(loss, r.mean(), r.min(), r.max(), outside.to(dtype).mean())


def _check(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float,
    kl: Tensor | None,
    kl_weight: float,
) -> None:
    named = {"old_log_prob": old_log_prob, "advantages": advantages, "kl": kl}
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != log_prob.shape:
            raise ValueError(
                f"{name} must have the shape of log_prob {list(log_prob.shape)}, found {list(tensor.shape)}"
            )
    if log_prob.numel() == 0:
        raise ValueError("log_prob holds no elements: there is nothing to optimise")
    if not clip_range > 0:
        raise ValueError(f"clip_range must be greater than 0, found {clip_range}")
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight must not be negative, found {kl_weight}")
    if kl_weight > 0 and kl is None:
        raise ValueError(f"kl_weight is {kl_weight}, but no kl was given")
