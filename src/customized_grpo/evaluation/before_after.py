"""The evaluation before and after training, as files."""

import json
from pathlib import Path
from typing import Any

from customized_grpo.data import save_image
from customized_grpo.data.images import within
from customized_grpo.evaluation.evaluator import Evaluation, Evaluator, ignore_progress
from customized_grpo.io.files import write_whole, writing
from customized_grpo.tracking.timer import OnProgress

REPORTED_IMAGES = 24


def write_evaluation(
    evaluator: Evaluator, num_samples: int, iteration: int, folder: Path, on_progress: OnProgress = ignore_progress
) -> dict[str, dict[str, Any]]:
    """Evaluate the base and the tuned generator on equal samples and noise, and write `folder`; return both results.

    `iteration`: after which the tuned weights stand. The first process writes.
    """
    with evaluator.policy.base_weights():
        base = evaluator.evaluate(num_samples, on_progress)
    tuned = evaluator.evaluate(num_samples, on_progress)
    evaluations = {"base": base, "tuned": tuned}
    results = {name: _result(evaluator, evaluation, iteration) for name, evaluation in evaluations.items()}
    if evaluator.ranks.is_main_process:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, result in results.items():
                write_whole(folder / f"{name}.json", json.dumps(result, indent=1))
            _save_images(evaluations, folder / "images")
    return results


def _result(evaluator: Evaluator, evaluation: Evaluation, iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "split": evaluator.dataset.folder.name,
        "pairs": len(evaluation.samples),
        "seed": evaluator.sampling.seed,
        "chance": evaluator.chance_levels(evaluation),
        "ceiling": evaluator.ceiling,
        "records": evaluation.records(),
        "summary": evaluation.summary(),
    }


def _save_images(evaluations: dict[str, Evaluation], folder: Path) -> None:
    """Save the first images of both generators, and their references no larger than them."""
    for name, evaluation in evaluations.items():
        for sample, image in list(zip(evaluation.samples, evaluation.images, strict=True))[:REPORTED_IMAGES]:
            save_image(image, folder / f"{sample.id}_{name}.png")
    base = evaluations["base"]
    for sample, reference in list(zip(base.samples, base.references, strict=True))[:REPORTED_IMAGES]:
        save_image(within(reference[0], max(base.images.shape[-2:])), folder / f"{sample.id}_reference.png")
