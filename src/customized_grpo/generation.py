"""Draw pictures of one subject for one prompt."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.config.run import flatten
from customized_grpo.data import Sample, image_grid, load_image, save_image
from customized_grpo.errors import UserError
from customized_grpo.factory.data import encode_rows
from customized_grpo.factory.policy import build_policy, policy_with
from customized_grpo.io.files import check_folder, writing
from customized_grpo.policies.sampling import sample_ode
from customized_grpo.randomness import batched_normal
from customized_grpo.runtime.device import configure
from customized_grpo.tracking.console import Display
from customized_grpo.training.checkpoint import load_weights, read_manifest
from customized_grpo.training.run_dir import finished_adapter, load_run_config

MIN_SIDE = 256
"""Smaller pictures are written enlarged by a whole factor."""


@dataclass(frozen=True)
class Options:
    """What to draw, and with which generator of the folder `run`.

    The generator is the tuned one, or the untuned `base`, or the one of the `best` validation, or the tuned one at a
    `checkpoint`; `ema` takes the averaged weights of the end or of the checkpoint. `reference` are pictures of one
    subject. `height` and `width` are in pixels. None means the run's own value.
    """

    run: Path
    reference: Sequence[Path]
    prompt: str
    out: Path = Path("out.png")
    base: bool = False
    ema: bool = False
    best: bool = False
    checkpoint: Path | None = None
    seed: int = 0
    count: int = 1
    num_steps: int | None = None
    device: str | None = None
    precision: str | None = None
    height: int | None = None
    width: int | None = None


def write_pictures(options: Options) -> Path:
    """Draw pictures, write them side by side to `options.out` (PNG), and return that path.

    Raises `UserError` on bad input, if possible before the generator is loaded.
    """
    _check_out(options.out)
    images = draw(options)
    scale = max(1, -(-MIN_SIDE // max(images.shape[-2:])))
    with writing(options.out.parent):
        save_image(image_grid(images, columns=options.count, scale=scale), options.out)
    return options.out


def draw(options: Options) -> Tensor:
    """Return `options.count` pictures [N, 3, H, W], with values of about [0, 1]; `options.out` is not used.

    Equal seeds give all generators of a run the same noise. Raises `UserError` on bad input, if possible before the
    generator is loaded.
    """
    _check(options)
    config = load_run_config(options.run)
    settings = policy_with(
        config.policy, device=options.device, precision=options.precision, height=options.height, width=options.width
    )
    adapter = None
    if not (options.base or options.checkpoint):
        adapter = finished_adapter(
            options.run, "--run", "draw from its newest checkpoint with --checkpoint", ema=options.ema,
            best=options.best,
        )  # fmt: skip
    pictures = [load_image(path, config.data.max_pixels) for path in options.reference]
    configure(config.threads)
    policy = build_policy(settings, config.seed)
    policy.check(options.prompt, len(pictures))
    if adapter is not None:
        policy.load_adapter(adapter)
    if options.checkpoint is not None:
        run = flatten(config.model_dump(mode="json"))
        load_weights(options.checkpoint, run, policy.trainable_parameters(), average=options.ema)
    references = [policy.prepare_reference(picture, len(pictures)) for picture in pictures]
    asked = Sample("", options.prompt, tuple(options.reference))
    with Display.silent().stages() as stages:
        encode_rows(policy, [asked], lambda index: references, stages)
    count = options.count
    with policy.base_weights() if options.base else nullcontext(), torch.no_grad():
        condition = policy.encode([options.prompt], [references]).take(torch.zeros(count, dtype=torch.long))
        noise = batched_normal(options.seed, 0, [0] * count, range(count), "generate", policy.latent_shape)
        sigmas = policy.sigmas(options.num_steps or config.rollout.num_steps, config.rollout.shift)
        return sample_ode(policy, condition, noise.to(policy.device), sigmas, config.rollout.micro_batch)


def _check_out(out: Path) -> None:
    """Raise `UserError` if pictures cannot be written to `out`."""
    if out.suffix.lower() != ".png":
        raise UserError(f"--out: images are written as PNG; give a name that ends in .png, not {out}")
    if out.exists() and not (out.is_file() and os.access(out, os.W_OK)):
        raise UserError(f"--out: {out} is a folder, or cannot be written over; name another file")
    check_folder(out.parent, "--out")


def _check(options: Options) -> None:
    """Raise `UserError` for options that are wrong for every run."""
    if options.count < 1:
        raise UserError(f"--count: {options.count} pictures cannot be drawn; give 1 or more")
    if options.num_steps is not None and options.num_steps < 1:
        raise UserError(f"--num_steps: pictures cannot be drawn in {options.num_steps} steps; give 1 or more")
    if options.base and (options.ema or options.checkpoint or options.best):
        raise UserError(
            "--base is the generator before training, --ema the one after it, --best and --checkpoint the one on the "
            "way; leave --base out, or the others"
        )
    if options.best and options.checkpoint:
        raise UserError("--best and --checkpoint name two generators on the way; leave one of them out")
    if options.checkpoint is not None:
        read_manifest(options.checkpoint)
