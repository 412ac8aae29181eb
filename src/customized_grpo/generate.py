"""Draw pictures for one reference and one prompt."""

from contextlib import nullcontext
from pathlib import Path

import torch

from customized_grpo import build
from customized_grpo.data import image_grid, load_image, save_image
from customized_grpo.errors import UserError
from customized_grpo.policies import EncodesAhead
from customized_grpo.randomness import batched_normal
from customized_grpo.rollout import sample_ode
from customized_grpo.run import adapter_folder, load_run_config
from customized_grpo.runtime import configure

MIN_SIDE = 256
"""Smaller pictures are written enlarged by a whole factor."""


def generate(
    run: Path, reference: Path, prompt: str, out: Path, base: bool, seed: int, count: int, *, ema: bool = False
) -> Path:
    """Write to `out` (PNG) `count` pictures side by side of the subject in `reference`, as `prompt` says.

    The tuned generator of `run` draws them, its base, or with `ema` the one of the averaged weights. Equal seeds give
    all of them the same noise. Raises `UserError` on bad input.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--out: images are written as PNG; give a name that ends in .png, not {out}")
    if count < 1:
        raise UserError(f"--count: {count} pictures cannot be drawn; give 1 or more")
    if base and ema:
        raise UserError("--base is the generator before training and --ema the one after it; pass one of them")
    config = load_run_config(run)
    adapter = adapter_folder(run, ema=ema)
    configure(config.threads)
    policy = build.build_policy(config.policy, config.seed)
    policy.check(prompt, 1)
    image = policy.prepare_reference(load_image(reference, config.data.max_pixels), 1)
    if not base:
        policy.load_adapter(adapter)
    if isinstance(policy, EncodesAhead):
        policy.encode_ahead([prompt], lambda index: [image], lambda done: None)
    with policy.untuned() if base else nullcontext(), torch.no_grad():
        condition = policy.encode([prompt], [[image]]).take(torch.zeros(count, dtype=torch.long))
        noise = batched_normal(seed, 0, [0] * count, range(count), "generate", policy.latent_shape).to(policy.device)
        sigmas = policy.sigmas(config.rollout.num_steps, config.rollout.shift)
        images = sample_ode(policy, condition, noise, sigmas, config.rollout.micro_batch)
    scale = max(1, -(-MIN_SIDE // max(policy.size)))
    save_image(image_grid(images, columns=count, scale=scale), out)
    return out
