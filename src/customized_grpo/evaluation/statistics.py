"""Intervals for the numbers of a report: one sample, and the difference of two samples of the same pairs."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Interval = tuple[float, float, float]
"""A mean with its lower and upper bound."""

NORMAL_975 = 1.959963984540054

Values = Sequence[float] | Sequence[bool] | npt.NDArray[np.floating] | npt.NDArray[np.bool_]


@cache
def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Return the quantile of Student's t with `freedom` >= 1 degrees of freedom, to about six digits.

    With t = sqrt(freedom) tan(angle) the density is proportional to cos(angle)^(freedom - 1) on a bounded range, where
    a plain trapezoid sum is accurate for every `freedom`.
    """
    widest = min(math.pi / 2, 40 / math.sqrt(freedom))
    angles = np.linspace(-widest, widest, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return math.sqrt(freedom) * math.tan(float(np.interp(probability * mass[-1], mass, angles)))


def mean_interval(values: Values) -> tuple[float, float, float]:
    """Return mean and 95 % interval (mean, low, high) of independent values; NaNs are left out.

    Values that are all 0 or 1 (booleans too) are a share: Wilson's score interval (Wilson 1927), which stays
    inside [0, 1] and does not collapse at 0 and 1. Others: Student's t. No values give three NaNs, a single
    value that is not 0 or 1 gives NaN bounds.
    """
    sample = _finite(values)
    count = len(sample)
    if count == 0:
        return math.nan, math.nan, math.nan
    mean = float(sample.mean())
    if not np.isin(sample, (0.0, 1.0)).all():
        return t_interval(sample)
    z2 = NORMAL_975**2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_975 * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return mean, max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(before: Values, after: Values) -> tuple[float, float, float]:
    """Return mean and 95 % Student's t interval (mean, low, high) of `after - before` over the same pairs, in order.

    Pairing takes out the spread between easy and hard pairs, so it is narrower than the interval of a
    difference of two means. A pair with a NaN on either side is left out. Raises ValueError if the
    lengths differ.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired samples differ in shape: {first.shape} before, {second.shape} after")
    return t_interval(second - first)


def t_interval(values: Values) -> tuple[float, float, float]:
    """Return mean and 95 % Student's t interval (mean, low, high) of independent values; NaNs are left out.

    No values give three NaNs, a single value NaN bounds.
    """
    sample = _finite(values)
    count = len(sample)
    if count < 2:
        return (float(sample[0]) if count else math.nan), math.nan, math.nan
    mean = float(sample.mean())
    half = t_quantile(count - 1) * float(sample.std(ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half


def bootstrap_interval(values: Values, clusters: Sequence[str], draws: int = 10_000) -> tuple[float, float, float]:
    """Return the mean and 95 % percentile bootstrap interval (mean, low, high) of `values` in `clusters`.

    Whole clusters are drawn again, since the pictures of one subject are alike (Efron and Tibshirani 1993, section 8).
    NaNs are left out. Equal input gives equal intervals. No values give three NaNs, a single cluster NaN bounds. Raises
    ValueError if the lengths differ.
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) != len(clusters):
        raise ValueError(f"{len(sample)} values, but {len(clusters)} clusters")
    known = np.isfinite(sample)
    names, place = np.unique(np.asarray(clusters, dtype=str)[known], return_inverse=True)
    if len(names) == 0:
        return math.nan, math.nan, math.nan
    mean = float(sample[known].mean())
    if len(names) == 1:
        return mean, math.nan, math.nan
    sums, counts = np.bincount(place, sample[known]), np.bincount(place)
    drawn = np.random.default_rng(0).integers(len(names), size=(draws, len(names)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return mean, float(low), float(high)


def _finite(values: Values) -> npt.NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64).reshape(-1)
    return sample[np.isfinite(sample)]
