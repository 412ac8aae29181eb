"""The sentence with which a report and the terminal lead: when a run was best, and how good."""

from collections.abc import Sequence

from customized_grpo.evaluation.selection import Row, best_row
from customized_grpo.io.jsonl import is_number
from customized_grpo.report.formats import metric_change, metric_value
from customized_grpo.tracking.metric_info import MetricInfo, metric_info

REWARD_GAIN = "reward_gain"


def describe_best(rows: Sequence[Row], name: str) -> str | None:
    """Return a line on the best validation by the metric `name`, such as "best at iteration 150: held-out gain +0.21".

    With its interval if the row holds `intervals`: {name: [low, high]}. It goes on to say whether a run was never
    better than its base, and whether the training rewards went on rising after the best. None if no row has a value.
    """
    best = best_row(rows, name)
    if best is None:
        return None
    info = metric_info(name)
    value = metric_change(info, best[name]) if info.signed else metric_value(info, best[name])
    line = f"best at iteration {best['iteration']}: {info.label} {value}{_interval(info, best)}"
    later = [row for row in rows if row["iteration"] > best["iteration"]]
    if best["iteration"] == 0 and any(is_number(row.get(name)) for row in later):
        line += "; no validation was better than the base"
    if _rewards_rose(best, later):
        line += "; training rewards went on rising after it"
    return line


def _interval(info: MetricInfo, row: Row) -> str:
    """Return the bounds of a row's value as ' (low to high)'; '' if they are unknown, or one point."""
    bounds: Sequence[float] = (row.get("intervals") or {}).get(info.name) or ()
    if len(bounds) != 2 or not all(map(is_number, bounds)) or bounds[0] == bounds[1]:
        return ""
    low, high = bounds
    return f" ({metric_value(info, low)} to {metric_value(info, high)})"


def _rewards_rose(best: Row, later: Sequence[Row]) -> bool:
    """Return whether the last known reward gain after `best` shows as more than its own."""
    gains = [row[REWARD_GAIN] for row in (best, *later) if is_number(row.get(REWARD_GAIN))]
    digits = metric_info(REWARD_GAIN).digits
    return is_number(best.get(REWARD_GAIN)) and round(gains[-1], digits) > round(gains[0], digits)
