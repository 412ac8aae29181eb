"""Schedules of flow-matching pipelines, and times as their transformers take them."""

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from torch import Tensor


def pipeline_sigmas(pipe: Any, num_steps: int, image_tokens: int) -> Tensor:
    """Return the pipeline's schedule [num_steps + 1]: linear, shifted the more the more tokens the image has."""
    scheduler = pipe.scheduler
    settings = [
        scheduler.config.get(name, default)
        for name, default in (
            ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15)
        )
    ]  # fmt: skip
    return scheduler_sigmas(scheduler, num_steps, calculate_shift(image_tokens, *settings))


def scheduler_sigmas(scheduler: Any, num_steps: int, mu: float) -> Tensor:
    """Return the sigmas [num_steps + 1] of a flow-matching scheduler shifted by `mu`."""
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu, device="cpu")
    sigmas: Tensor = scheduler.sigmas.float().cpu()
    return sigmas


def timestep(sigma: Tensor, like: Tensor) -> Tensor:
    """Return `sigma` [b] as pipelines pass it to transformers: through units of 1000, in the precision of `like`."""
    return (sigma.to(like.device) * 1000).to(like.dtype) / 1000


def embedded_guidance(guidance: float, latents: Tensor) -> Tensor:
    """Return `guidance` for each of the `latents` [b, ...], as the transformer embeds it: [b] float32."""
    return torch.full([len(latents)], guidance, device=latents.device, dtype=torch.float32)
