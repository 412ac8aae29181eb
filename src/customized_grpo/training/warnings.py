"""What is wrong with the figures of an iteration or a validation, in words."""

from collections.abc import Iterator, Sequence

from customized_grpo.evaluation.against_base import DIVERSITY, TEXTURE
from customized_grpo.evaluation.evaluator import Evaluation
from customized_grpo.evaluation.selection import OVER_OPTIMIZED, Row
from customized_grpo.io.jsonl import Metrics
from customized_grpo.rewards.reward import in_brackets
from customized_grpo.tracking.metric_info import metric_info
from customized_grpo.training.trainer import RATIO_TOLERANCE

STEADY = 50
"""Iterations in a row."""
TEXTURES = (0.8, 1.25)
"""Texture in units of the base's: beyond these two there is a warning."""
OFTEN_BROKEN = 0.1
"""Share of images before the first update that may break a constraint's bound without a warning."""


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
            "equal rollout.micro_batch and optimizer.micro_batch, or objective.old_log_probs=recomputed"
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
    if iteration == 1:
        yield from _tight_bounds(metrics)


def _tight_bounds(metrics: Metrics) -> Iterator[str]:
    """Yield a warning for each constraint that many images break before anything was learned."""
    for figure, share in metrics.items():
        if figure.startswith("violated/") and share > OFTEN_BROKEN:
            name = figure.removeprefix("violated/")
            mean, std = (metrics[f"reward/{name}/{which}"] for which in ("mean", "std"))
            yield (
                f"iteration 1: {share:.0%} of the images break the bound of rewards.{name} before anything was learned "
                f"(mean {mean:.3g}, {std:.2g} apart within a group). It will push against them in every iteration, and "
                "can outweigh the objectives; loosen the bound until it holds for most"
            )


def validation_warnings(evaluation: Evaluation, iteration: int) -> Iterator[str]:
    """Yield a warning if scores of a validation are missing."""
    if (share := evaluation.missing_share()) > 0:
        yield (
            f"validation after iteration {iteration}: {share:.1%} of the scores could not be computed"
            f"{in_brackets(evaluation.reasons)}; its means are of the others"
        )


class ClippingWatch:
    """Watches how many ratios are clipped, and warns of all, or of none for `STEADY` iterations in a row."""

    def __init__(self, minibatches: int) -> None:
        """Count iterations of so many `minibatches`; in a single one the ratio is 1, and nothing can be clipped."""
        self._minibatches, self._none = minibatches, 0

    def see(self, metrics: Metrics) -> Iterator[tuple[str, str]]:
        """Yield what is wrong after an iteration with these `metrics`, as (what it is about, warning)."""
        iteration, share = metrics["iteration"], metrics.get("clip_fraction")
        learned = share is not None and metrics["silent_groups"] < 1
        self._none = self._none + 1 if learned and share == 0 and self._minibatches > 1 else 0
        if learned and share == 1:
            yield (
                "all clipped",
                f"iteration {iteration}: every ratio is outside of the clip range, so nothing more is learned in the "
                "iteration. Lower optimizer.learning_rate, or raise objective.clip_range",
            )
        if self._none >= STEADY:
            yield (
                "none clipped",
                f"iteration {iteration}: for {STEADY} iterations no ratio left the clip range, so updates are very "
                "small. Raise optimizer.learning_rate, or lower objective.clip_range, if rewards do not rise",
            )


def held_out_warnings(row: Row, rows: Sequence[Row], copies: str | None) -> Iterator[tuple[str, str]]:
    """Yield what the validation `row` shows that rewards do not, as (what it is about, warning).

    `rows`: all of the run so far, the base's first. `copies`: the figure of copy-paste that is above the base's.
    """
    iteration, texture = row["iteration"], row.get(TEXTURE)
    if texture is not None and not TEXTURES[0] <= texture <= TEXTURES[1]:
        how = "rougher: dots, noise or ringing" if texture > 1 else "smoother: blur"
        yield (
            "texture",
            f"validation after iteration {iteration}: images have {texture:.2f} times the base's texture, {how}. Look "
            "at the gallery; a constraint of kind texture holds it (docs/rewards.md)",
        )
    base = rows[0].get(DIVERSITY) if rows and rows[0]["iteration"] == 0 else None
    if base and row.get(DIVERSITY) is not None and row[DIVERSITY] < base / 2:
        yield (
            "diversity",
            f"validation after iteration {iteration}: images of one prompt differ half as much as the base's "
            f"({row[DIVERSITY]:.3f} and {base:.3f}): the generator collapses. Keep an earlier adapter, or raise "
            "objective.kl_weight",
        )
    if copies is not None:
        yield (
            "copies",
            f"validation after iteration {iteration}: the {metric_info(copies).label} is above the base's "
            f"({row[copies]:.3f}): the reference is copied. Use segmented references, or weigh the prompt more",
        )
    if row.get(OVER_OPTIMIZED):
        yield (
            "over-optimized",
            f"validation after iteration {iteration}: rewards rose and the held-out gain fell since its best: what is "
            "learned now pleases the rewards alone. best/ has the adapter before; evaluation.patience ends a run there",
        )
