"""What is wrong with the figures of an iteration or a validation, in words."""

from collections.abc import Iterator, Sequence

from customized_grpo.evaluation.evaluator import Evaluation
from customized_grpo.io.jsonl import Metrics
from customized_grpo.rewards.reward import in_brackets
from customized_grpo.training.trainer import RATIO_TOLERANCE


def iteration_warnings(metrics: Metrics, reasons: Sequence[str | None]) -> Iterator[str]:
    """Yield a warning for each figure of an iteration that shows a fault.

    `reasons`: why each reward could not be computed, None if it could.
    """
    iteration = metrics["iteration"]
    off = max(abs(metrics["first_ratio/min"] - 1), abs(metrics["first_ratio/max"] - 1))
    if off > RATIO_TOLERANCE:
        yield (
            f"iteration {iteration}: the first-pass ratio is {off:.1e} away from 1 (more than "
            f"{RATIO_TOLERANCE:.0e}): rollout and update do not compute the same thing. Use policy.precision=fp32, "
            "or equal rollout.micro_batch and optimizer.micro_batch"
        )
    if (share := metrics["invalid_share"]) > 0:
        yield (
            f"iteration {iteration}: {share:.1%} of the rewards could not be computed{in_brackets(reasons)}; "
            "they count in no group's statistics"
        )
    if metrics["silent_groups"] == 1:
        yield (
            f"iteration {iteration}: no group taught anything: within each all images have equal rewards, or fewer "
            "than two have any. Check the rewards, or raise rollout.eta or rollout.group_size"
        )


def validation_warnings(evaluation: Evaluation, iteration: int) -> Iterator[str]:
    """Yield a warning if rewards of a validation are missing."""
    if (share := evaluation.missing_share()) > 0:
        yield (
            f"validation after iteration {iteration}: {share:.1%} of the rewards could not be computed"
            f"{in_brackets(evaluation.reasons)}; its means are of the others"
        )
