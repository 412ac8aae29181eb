"""`customized-grpo toybox pretrain`: every network in turn, and a table of what was measured of them."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from customized_grpo.errors import UserError
from customized_grpo.io.files import check_folder, write_whole
from customized_grpo.runtime.device import configure, keep_freed_memory
from customized_grpo.toybox.network import Generator
from customized_grpo.toybox.quality import measure_quality
from customized_grpo.toybox.recipes import (
    IDENTITY_RECIPES,
    JUDGE_RECIPE,
    PROMPT_RECIPE,
    GeneratorRecipe,
    train_clean_generator,
    train_identity_encoder,
    train_judge,
    train_noisy_generator,
    train_prompt_encoder,
)
from customized_grpo.toybox.weights import IDENTITY_ENCODERS, QUALITY, load_network, save_network
from customized_grpo.tracking.console import Display, StageProgress

CLEAN_GENERATOR = "clean_generator"
STAGES = {
    CLEAN_GENERATOR: 0, **dict.fromkeys(IDENTITY_ENCODERS, 1), "prompt_encoder": 2, "judge": 3, "generator": 4,
}  # fmt: skip
"""What is made, in this order, and each one's seed of ten: the identity encoders differ in their leak alone."""


def pretrain(output: Path, seed: int, only: Sequence[str] | None, threads: int | None, display: Display) -> None:
    """Train the networks named in `only` (default: all of `STAGES`, each from its own seed) into `output`, print the
    quality table.

    `generator` starts from the `clean_generator` in `output`. Raises `UserError` on unknown names.
    """
    unknown = set(only or ()) - set(STAGES)
    if unknown:
        raise UserError(f"--only: unknown {', '.join(sorted(unknown))}; choose among {', '.join(STAGES)}")
    if threads is not None and threads < 1:
        raise UserError(f"--threads: {threads} threads cannot work; give 1 or more")
    made = set(STAGES if only is None else only)
    missing = [name for name in STAGES if name not in made and not (output / f"{name}.safetensors").is_file()]
    if missing and (set(missing) - {CLEAN_GENERATOR} or "generator" in made):
        raise UserError(f"--only: {output} lacks {', '.join(missing)}; make these too")
    if only is None and output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output: {output} is not empty; name a new folder, or name with --only what to make again")
    check_folder(output, "--output")
    configure(threads)
    keep_freed_memory()
    with display.stages() as stages:
        for name, offset in STAGES.items():
            if name in made:
                save_network(_train(name, output, 10 * seed + offset, stages), output, name)
    quality = measure_quality(output)
    write_whole(output / QUALITY, json.dumps(quality, indent=1))
    for title, rows in quality.items():
        display.table(title.replace("_", " "), {name: f"{value:.3f}" for name, value in rows.items()})


def _train(name: str, output: Path, seed: int, stages: StageProgress) -> nn.Module:
    recipe = GeneratorRecipe()
    makers: dict[str, Callable[[], nn.Module]] = {
        CLEAN_GENERATOR: lambda: train_clean_generator(recipe, seed, stages.update),
        "generator": lambda: train_noisy_generator(
            load_network(Generator(), CLEAN_GENERATOR, output).requires_grad_(True), recipe, seed, stages.update
        ),
        "prompt_encoder": lambda: train_prompt_encoder(PROMPT_RECIPE, seed, stages.update),
        "judge": lambda: train_judge(JUDGE_RECIPE, seed, stages.update),
    }
    for leak, settings in IDENTITY_RECIPES.items():
        makers[f"identity_encoder_{leak}"] = partial(
            train_identity_encoder, settings, seed, stages.update, f"identity encoder, {leak} leak"
        )
    return makers[name]()
