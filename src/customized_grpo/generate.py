"""Draw pictures of one subject for one prompt."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from customized_grpo.config.messages import format_validation_error
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.run import Config, flatten
from customized_grpo.data import Sample, image_grid, load_image, save_image
from customized_grpo.errors import UserError
from customized_grpo.factory.data import encode_rows
from customized_grpo.factory.policy import build_policy
from customized_grpo.io.files import check_folder, writing
from customized_grpo.policies.sampling import sample_ode
from customized_grpo.randomness import batched_normal
from customized_grpo.runtime.device import configure
from customized_grpo.tracking.console import Display
from customized_grpo.training.checkpoint import load_weights, read_manifest
from customized_grpo.training.run_dir import finished_adapter, load_run_config

MIN_SIDE = 256
"""Smaller pictures are written enlarged by a whole factor."""
POLICY_OPTIONS = ("device", "precision")
"""Options that replace the run's policy.device, ..."""
PIPELINE_OPTIONS = ("height", "width")
"""Options that replace the run's policy.pipeline.height, ..."""


@dataclass(frozen=True)
class Options:
    """What is drawn, and by which generator: the tuned one of `run`; its `base`; with `ema` the one of the averaged
    weights; or what it was, with `ema` its average, at a `checkpoint`. `reference`: pictures of one subject.

    None is what the run has. `height` and `width` in pixels.
    """

    run: Path
    reference: Sequence[Path]
    prompt: str
    out: Path = Path("out.png")
    base: bool = False
    ema: bool = False
    checkpoint: Path | None = None
    seed: int = 0
    count: int = 1
    num_steps: int | None = None
    device: str | None = None
    precision: str | None = None
    height: int | None = None
    width: int | None = None


def generate(options: Options) -> Path:
    """Write to `options.out` (PNG) `options.count` pictures side by side, and return it.

    Equal seeds give all generators of a run the same noise. Raises `UserError` on bad input; where it can, before the
    generator is loaded.
    """
    _check(options)
    config = load_run_config(options.run)
    settings = _policy_config(config, options)
    adapter = None
    if not (options.base or options.checkpoint):
        adapter = finished_adapter(
            options.run, "--run", "draw from its newest checkpoint with --checkpoint", ema=options.ema
        )
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
        images = sample_ode(policy, condition, noise.to(policy.device), sigmas, config.rollout.micro_batch)
    scale = max(1, -(-MIN_SIDE // max(policy.size)))
    with writing(options.out.parent):
        save_image(image_grid(images, columns=count, scale=scale), options.out)
    return options.out


def _check(options: Options) -> None:
    """Raise `UserError` for what is wrong whatever the run."""
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out: images are written as PNG; give a name that ends in .png, not {options.out}")
    if options.out.exists() and not (options.out.is_file() and os.access(options.out, os.W_OK)):
        raise UserError(f"--out: {options.out} is a folder, or cannot be written over; name another file")
    check_folder(options.out.parent, "--out")
    if options.count < 1:
        raise UserError(f"--count: {options.count} pictures cannot be drawn; give 1 or more")
    if options.num_steps is not None and options.num_steps < 1:
        raise UserError(f"--num_steps: pictures cannot be drawn in {options.num_steps} steps; give 1 or more")
    if options.base and (options.ema or options.checkpoint):
        raise UserError(
            "--base is the generator before training, --ema the one after it and --checkpoint the one on the way; "
            "leave --base out, or the others"
        )
    if options.checkpoint is not None:
        read_manifest(options.checkpoint)


def _policy_config(config: Config, options: Options) -> PolicyConfig:
    """The run's generator, where and as large as it is asked for."""

    def given(names: Sequence[str]) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names if getattr(options, name) is not None}

    settings = config.policy.model_dump()
    try:
        pipeline = settings["pipeline"] | given(PIPELINE_OPTIONS)
        return PolicyConfig.model_validate(settings | given(POLICY_OPTIONS) | {"pipeline": pipeline})
    except ValidationError as error:
        raise UserError(
            f"--{format_validation_error(error).replace('pipeline: ', '').replace('pipeline.', '')}"
        ) from error
