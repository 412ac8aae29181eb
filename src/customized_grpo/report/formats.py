"""Numbers as a reader wants them: real minus signs, spaces that do not break, a dash for what is unknown."""

import math

from customized_grpo.tracking.metric_info import MetricInfo


def power_of_ten(power: int) -> str:
    """Return 10 with `power` as superscript."""
    return "10" + str(power).translate(
        str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
    )


def percent(value: float) -> str:
    if not math.isfinite(value):
        return "\u2013"
    # What is nearer to 0 is a rounding error of a bound at 0.
    return f"{100 * value:.2g}\u202f%" if 1e-9 < value < 0.0005 else f"{100 * value:.1f}\u202f%"


def points(value: float) -> str:
    """Return a signed difference of shares in percentage points, without unit."""
    return "\u2013" if not math.isfinite(value) else f"{100 * value:+.1f}".replace("-", "\u2212")


def metric_value(info: MetricInfo, value: float) -> str:
    """Return a value of a metric as text."""
    if info.is_share:
        return percent(value)
    return duration(value) if info.unit == "seconds" and math.isfinite(value) else reward(value, digits=info.digits)


def metric_change(info: MetricInfo, change: float) -> str:
    """Return a signed difference of values of a metric as text, of shares in percentage points without unit."""
    if info.is_share:
        return points(change)
    if info.unit == "seconds" and math.isfinite(change):
        return ("+" if change >= 0 else "\u2212") + duration(abs(change))
    return reward(change, signed=True, digits=info.digits)


def reward(value: float | None, signed: bool = False, digits: int | None = None) -> str:
    """Return a number as text; `digits`: its decimals, None for as many as its size wants."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if digits is None:
        digits = 3 if abs(value) < 10 else 1
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "\u2212")


def scientific(value: float) -> str:
    """Return two digits and a power of ten, such as 2.4 x 10^-6."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}\u00a0\u00d7\u00a0{power_of_ten(int(power))}"


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}\u00a0s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}\u00a0h {minutes}\u00a0min" if hours else f"{minutes}\u00a0min {whole % 60}\u00a0s"
