"""The evaluation before and after training, as files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from customized_grpo.config.run import Config
from customized_grpo.data import SubjectDataset, save_image
from customized_grpo.data.images import within
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.evaluation.evaluator import Evaluation, chance_levels, evaluate
from customized_grpo.io.files import write_whole, writing
from customized_grpo.policies.policy import Policy
from customized_grpo.rewards.reward import Reward
from customized_grpo.toybox.oracle import Oracle

REPORTED_IMAGES = 24
OnProgress = Callable[[float], None]


def write_evaluation(
    config: Config,
    policy: Policy[Any],
    dataset: SubjectDataset,
    rewards: Mapping[str, Reward],
    judge: Oracle | None,
    folder: Path,
    pairs: int,
    ranks: DistributedGroup,
    on_progress: OnProgress = lambda share: None,
) -> dict[str, dict[str, Any]]:
    """Evaluate the untuned ("base") and the tuned generator of a finished run on equal pairs and noise; return both
    results, which the first of the `ranks` writes."""
    with policy.base_weights():
        base = evaluate_pairs(config, policy, dataset, rewards, judge, pairs, ranks, on_progress)
    tuned = evaluate_pairs(config, policy, dataset, rewards, judge, pairs, ranks, on_progress)
    results = {}
    for name, evaluation in (("base", base), ("tuned", tuned)):
        results[name] = {
            "iteration": config.iterations,
            "split": dataset.folder.name,
            "pairs": len(evaluation.samples),
            "seed": config.seed,
            "chance": chance_levels(evaluation, judge) if judge else {},
            "ceiling": judge.ceiling if judge else {},
            "records": evaluation.records(),
            "summary": evaluation.summary(),
        }
    if not ranks.is_main_process:
        return results
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, evaluation in (("base", base), ("tuned", tuned)):
            write_whole(folder / f"{name}.json", json.dumps(results[name], indent=1))
            for sample, image in list(zip(evaluation.samples, evaluation.images, strict=True))[:REPORTED_IMAGES]:
                save_image(image, folder / "images" / f"{sample.id}_{name}.png")
        for sample, reference in list(zip(base.samples, base.references, strict=True))[:REPORTED_IMAGES]:
            shown = within(reference[0], max(base.images.shape[-2:]))
            save_image(shown, folder / "images" / f"{sample.id}_reference.png")
    return results


def evaluate_pairs(
    config: Config,
    policy: Policy[Any],
    dataset: SubjectDataset,
    rewards: Mapping[str, Reward],
    judge: Oracle | None,
    pairs: int,
    ranks: DistributedGroup,
    on_progress: OnProgress,
) -> Evaluation:
    """`evaluation.evaluate` with the settings of a run."""
    return evaluate(
        policy, dataset, rewards, judge, pairs=pairs, num_steps=config.rollout.num_steps, shift=config.rollout.shift,
        seed=config.seed, micro_batch=config.rollout.micro_batch,
        masks=config.rewards.identity_reference == "segmented", ranks=ranks, on_progress=on_progress,
    )  # fmt: skip
