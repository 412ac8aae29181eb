"""What training gained on metrics that it never saw, over equal pairs and noise of the base and the tuned generator.

Shape legend: N pairs of a prompt and its references. Every interval is a paired one, at 95 %.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from customized_grpo.evaluation.statistics import Array, Interval, paired_difference, t_interval
from customized_grpo.tracking.metric_info import MetricInfo

RESOLUTION = 1e-6
"""A range below this share of the largest value is rounding of float32, and no spread."""


def gains(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], infos: Sequence[MetricInfo]) -> Tensor:
    """Return what each pair gained on average over the metrics of `infos`, [N] float64; positive is better.

    `base` and `tuned`: values [N] by metric, on the same pairs in the same order. A metric's gain is tuned - base in
    its better direction, in units of the standard deviation of `base` over pairs. A base without spread (all values
    equal, or one) has none; its unit is the deviation of base and tuned values together, and the gain 0 if these are
    all equal. A pair in which a value is not finite has no gain in that metric, and NaN if it has none in any. Raises
    ValueError without metrics, and for values of different shapes.
    """
    if not infos:
        raise ValueError("no held-out metrics; a gain needs at least one")
    return torch.stack([_gain(base[info.name], tuned[info.name], info) for info in infos]).nanmean(0)


def _gain(base: Tensor, tuned: Tensor, info: MetricInfo) -> Tensor:
    if base.shape != tuned.shape:
        raise ValueError(f"{info.name}: {list(base.shape)} values of the base, {list(tuned.shape)} of the tuned one")
    base, tuned = base.double().cpu(), tuned.double().cpu()
    difference = tuned - base if info.higher_is_better else base - tuned
    difference = difference.where(difference.isfinite(), torch.nan)
    unit = _spread(base) or _spread(torch.cat([base, tuned]))
    return difference / unit if unit else difference * 0


def _spread(values: Tensor) -> float:
    """Return the standard deviation of the finite `values`; 0 where they are fewer than two, or equal."""
    finite = values[values.isfinite()]
    if len(finite) < 2 or float(finite.max() - finite.min()) <= RESOLUTION * float(finite.abs().max()):
        return 0.0
    return float(finite.std())


def held_out_gain(per_pair: Tensor) -> Interval:
    """Return the mean of the `gains` [N] and its interval: each is a difference of one pair, so it is a paired one."""
    return t_interval(_array(per_pair))


def relative_texture(base: Tensor, tuned: Tensor) -> Interval:
    """Return the texture of tuned over base images: the ratio of their mean Laplacians, with its interval.

    `base`, `tuned`: `laplacian` [N] of images from the same noise. 1: as the base; above it grids and noise, below it
    blur. It is the ratio of sums, not the mean of ratios: one smooth image of the base would rule that mean, and has
    its true, small weight in the sum. The interval is the linearized one (Cochran 1977, section 6.3). Pairs with a
    value that is not finite are left out. Three NaNs if the base has no texture. Raises ValueError for values of
    different shapes.
    """
    if base.shape != tuned.shape:
        raise ValueError(f"texture: {list(base.shape)} values of the base, {list(tuned.shape)} of the tuned one")
    before, after = _array(base), _array(tuned)
    both = np.isfinite(before + after)
    before, after = before[both], after[both]
    total = float(before.sum())
    if total <= 0:
        return float("nan"), float("nan"), float("nan")
    ratio = float(after.sum()) / total
    _, low, high = t_interval((after - ratio * before) * len(before) / total)
    return ratio, ratio + low, ratio + high


def fell(best: Tensor, now: Tensor) -> bool:
    """Return whether gains [N] are lower `now` than at the `best` validation, over the same pairs, significantly.

    That is: the whole 95 % interval of the paired difference lies below 0.
    """
    _, _, high = paired_difference(_array(best), _array(now))
    return high < 0


def _array(values: Tensor) -> Array:
    return values.double().cpu().numpy()
