"""Train, evaluate and draw from Python; `customized_grpo` offers these functions by name."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from customized_grpo.config.run import Config
from customized_grpo.data.images import to_pil
from customized_grpo.generation import Options, draw
from customized_grpo.tracking.console import Display
from customized_grpo.training.run import evaluate_run
from customized_grpo.training.run import train as run_training

Summary = dict[str, dict[str, float]]
"""The mean of each metric, and the bounds of its 95 % interval: {metric: {"mean": ..., "low": ..., "high": ...}}."""
PathLike = str | Path


def train(
    config: Config,
    *,
    resume: bool = False,
    resume_from: PathLike | None = None,
    overwrite: bool = False,
    display: Display | None = None,
) -> Path:
    """Train as `config` says, and return the folder of the run.

    `resume` continues the run in `config.output` from its newest checkpoint, `resume_from` from the checkpoint that it
    names; `overwrite` deletes that run first. Progress goes to `display`, by default the terminal. Raises `UserError`
    on bad input, before any work, and `TrainingError` when training cannot go on.
    """
    checkpoint = None if resume_from is None else Path(resume_from)
    run_training(config, display or Display(), resume=resume, resume_from=checkpoint, overwrite=overwrite)
    return config.output


def evaluate(
    run: PathLike,
    data: PathLike | None = None,
    *,
    num_samples: int | None = None,
    ema: bool = False,
    display: Display | None = None,
) -> dict[str, Summary]:
    """Evaluate the base and the tuned generator of a finished run, and return the metrics of both.

    The result is {"base": summary, "tuned": summary}, empty in all processes but the main one. `data` is a data folder,
    by default the run's test, validation or training data; the first `num_samples` count, by default as many as
    the run says. With `ema` the tuned generator has the averaged weights. Raises `UserError` on bad input.
    """
    folder = Path(run)
    path = None if data is None else Path(data)
    if evaluate_run(folder, path, num_samples, display or Display(), ema=ema) is None:
        return {}
    results = {name: folder / "evaluation" / f"{name}.json" for name in ("base", "tuned")}
    return {name: json.loads(result.read_text(encoding="utf-8"))["summary"] for name, result in results.items()}


def generate(
    run: PathLike,
    prompt: str,
    reference: PathLike | Sequence[PathLike],
    *,
    count: int = 1,
    seed: int = 0,
    base: bool = False,
    ema: bool = False,
    checkpoint: PathLike | None = None,
    num_steps: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    height: int | None = None,
    width: int | None = None,
) -> list[Image.Image]:
    """Draw `count` pictures of the subject of `reference`, one picture or several, with the tuned generator of `run`.

    Equal seeds draw from equal noise. `base` takes the generator before training, `ema` the averaged weights,
    `checkpoint` (RUN/checkpoints/000020) the generator as it was there. `height` and `width` are in pixels; None means
    the run's own value. Raises `UserError` on bad input, if possible before the generator is loaded.
    """
    references = [reference] if isinstance(reference, str | Path) else reference
    images = draw(
        Options(
            run=Path(run), reference=[Path(path) for path in references], prompt=prompt, base=base, ema=ema,
            checkpoint=None if checkpoint is None else Path(checkpoint), seed=seed, count=count, num_steps=num_steps,
            device=device, precision=precision, height=height, width=width,
        )
    )  # fmt: skip
    return [to_pil(image) for image in images.cpu()]
