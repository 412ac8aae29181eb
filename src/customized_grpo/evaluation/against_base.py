"""An evaluation against the evaluation of the base, on equal pairs and noise: gains, texture, over-optimization."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customized_grpo.evaluation.evaluator import Evaluation, json_number
from customized_grpo.evaluation.held_out import fell, gains, held_out_gain, relative_texture
from customized_grpo.evaluation.selection import OVER_OPTIMIZED, Row, best_row
from customized_grpo.evaluation.statistics import Interval, paired_difference
from customized_grpo.tracking.metric_info import metric_info

TEXTURE, DIVERSITY, HELD_OUT_GAIN, REWARD_GAIN = "texture", "diversity", "held_out_gain", "reward_gain"
GAINS, INTERVALS = "gains", "intervals"
"""Fields of a validation's row: what each pair gained on held-out metrics, and intervals by metric."""
COPY_FIGURES = ("copied", "copy")


@dataclass(frozen=True)
class AgainstBase:
    """Holds evaluations against the `base` one. `held_out` and `trained` are figures: not trained on, and trained on.

    Both may be empty; then the gain on them is unknown.
    """

    base: Evaluation
    held_out: Sequence[str]
    trained: Sequence[str]

    def gains(self, evaluation: Evaluation, names: Sequence[str]) -> Tensor:
        """Return what each pair gained on the figures `names`, [N] float64; NaN for all without figures."""
        if not names:
            return torch.full((len(evaluation.samples),), torch.nan, dtype=torch.float64)
        return gains(self.base.metrics, evaluation.metrics, [metric_info(name) for name in names])

    def intervals(self, evaluation: Evaluation) -> dict[str, Interval]:
        """Return mean, low and high of the figures that need the base: gains, texture."""
        found: dict[str, Interval] = {}
        if self.base.roughness is not None and evaluation.roughness is not None:
            found[TEXTURE] = relative_texture(self.base.roughness, evaluation.roughness)
        for name, figures in ((HELD_OUT_GAIN, self.held_out), (REWARD_GAIN, self.trained)):
            if figures:
                found[name] = held_out_gain(self.gains(evaluation, figures))
        return found

    def row(self, iteration: int, evaluation: Evaluation, before: Sequence[Row]) -> dict[str, Any]:
        """Return a validation's row: means by figure, those against the base with intervals, and flags.

        `before`: the rows of earlier validations.
        """
        intervals = self.intervals(evaluation)
        row: dict[str, Any] = {"iteration": iteration, "pairs": len(evaluation.samples), **evaluation.means()}
        row |= {name: _number(mean) for name, (mean, _, _) in intervals.items()}
        row[INTERVALS] = {name: [_number(low), _number(high)] for name, (_, low, high) in intervals.items()}
        if self.held_out:
            row[GAINS] = [_short(gain) for gain in self.gains(evaluation, self.held_out).tolist()]
            row[OVER_OPTIMIZED] = is_over_optimized(row, before)
        return row

    def copies_more(self, evaluation: Evaluation) -> str | None:
        """Return the figure of copy-paste that is significantly above the base's; None if there is none."""
        for name in COPY_FIGURES:
            if name in evaluation.metrics:
                base, now = (side.metrics[name].double().numpy() for side in (self.base, evaluation))
                return name if paired_difference(base, now)[1] > 0 else None
        return None


def is_over_optimized(row: Row, before: Sequence[Row]) -> bool:
    """Return whether rewards rose since the best held-out gain `before`, while that gain fell significantly."""
    best = best_row(before, HELD_OUT_GAIN)
    if best is None or best.get(GAINS) is None or best.get(REWARD_GAIN) is None or row.get(REWARD_GAIN) is None:
        return False
    return row[REWARD_GAIN] > best[REWARD_GAIN] and fell(_tensor(best[GAINS]), _tensor(row[GAINS]))


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([torch.nan if value is None else value for value in values], dtype=torch.float64)


def _short(gain: float) -> float | None:
    """Return a gain to six digits: a row holds as many as there are pairs."""
    return float(f"{gain:.6g}") if math.isfinite(gain) else None


def _number(value: float) -> float | None:
    return json_number(torch.tensor(value, dtype=torch.float64))
