"""The evaluation before and after training, as files."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from customized_grpo.data import save_image
from customized_grpo.data.images import within
from customized_grpo.evaluation.against_base import AgainstBase
from customized_grpo.evaluation.evaluator import Evaluation, Evaluator, ignore_progress
from customized_grpo.io.files import write_whole, writing
from customized_grpo.tracking.timer import OnProgress

REPORTED_IMAGES = 24
BASE = "base"


@dataclass(frozen=True)
class Side:
    """A tuned generator: `iteration` after which its weights stand, and what puts them in for a while."""

    iteration: int
    weights: Callable[[], AbstractContextManager[None]]


def write_evaluation(
    evaluator: Evaluator,
    num_samples: int,
    sides: Mapping[str, Side],
    folder: Path,
    *,
    held_out: Sequence[str] = (),
    on_progress: OnProgress = ignore_progress,
) -> dict[str, dict[str, Any]]:
    """Evaluate the base and the tuned `sides` on equal samples and noise, and write `folder`; return all results.

    Results go by the name of the side, the base first; sides of one iteration are evaluated once. `held_out`: the
    figures whose mean gain is the held-out gain. The first process writes.
    """
    with evaluator.policy.base_weights():
        base = evaluator.evaluate(num_samples, on_progress)
    against = AgainstBase(base, held_out, ())
    evaluations, results = {BASE: base}, {BASE: _result(evaluator, base, 0, {})}
    drawn: dict[int, Evaluation] = {}
    for name, side in sides.items():
        if side.iteration not in drawn:
            with side.weights():
                drawn[side.iteration] = evaluator.evaluate(num_samples, on_progress)
        evaluations[name] = drawn[side.iteration]
        intervals = {
            figure: {"mean": mean, "low": low, "high": high}
            for figure, (mean, low, high) in against.intervals(evaluations[name]).items()
        }
        results[name] = _result(evaluator, evaluations[name], side.iteration, intervals)
    if evaluator.ranks.is_main_process:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for stale in {"best", "tuned"} - results.keys():  # of another evaluation
                (folder / f"{stale}.json").unlink(missing_ok=True)
            for name, result in results.items():
                write_whole(folder / f"{name}.json", json.dumps(result, indent=1))
            _save_images(evaluations, folder / "images")
    return results


def _result(evaluator: Evaluator, evaluation: Evaluation, iteration: int, against: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "split": evaluator.dataset.folder.name,
        "pairs": len(evaluation.samples),
        "seed": evaluator.sampling.seed,
        "chance": evaluator.chance_levels(evaluation),
        "ceiling": evaluator.ceiling,
        "records": evaluation.records(),
        "summary": {**evaluation.summary(), **against},
    }


def _save_images(evaluations: Mapping[str, Evaluation], folder: Path) -> None:
    """Save the first images of all generators, and their references no larger than them."""
    for name, evaluation in evaluations.items():
        for sample, image in list(zip(evaluation.samples, evaluation.images, strict=True))[:REPORTED_IMAGES]:
            save_image(image, folder / f"{sample.id}_{name}.png")
    base = evaluations[BASE]
    for sample, reference in list(zip(base.samples, base.references, strict=True))[:REPORTED_IMAGES]:
        save_image(within(reference[0], max(base.images.shape[-2:])), folder / f"{sample.id}_reference.png")
