"""The numbers of a grid of runs, and their means and differences over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from customized_grpo.config.presets import BASE, BASELINE
from customized_grpo.evaluation.statistics import Interval, t_interval
from customized_grpo.tracking.metric_info import is_metric, overview

METRICS = (
    "prompt_satisfied", "identity_kept", "joint_success", "copied", "reward/prompt", "reward/identity", "conflict_rate",
    "seconds",
)  # fmt: skip
"""Metrics with a column in every comparison.csv; another metric of `metric_info` has one where a run measured it."""
SIGNALS = ("both_good", "only_prompt", "only_identity", "both_bad")
PERIODS = ("early", "late", "overall")
"""The first and the last fifth of the iterations, and all of them."""
PERIOD_SHARE = 0.2
VALUES = (
    "pairs",
    *METRICS,
    *(f"{period}/{name}" for period in PERIODS for name in (*SIGNALS, "conflict_rate")),
    "iterations",
)
BEST_ITERATION, BEST_PREFIX = "best_iteration", "best/"
"""Values of a run that kept its best adapter: the iteration of that, and metrics of it on the test pairs."""


@dataclass(frozen=True)
class Result:
    """What one run came to. A value that the run does not have is absent.

    `values`: by name in `VALUES`; metrics are means over the pairs of the final evaluation. `curve`: validation
    metrics by name and iteration.
    """

    setting: str
    preset: str
    seed: int
    values: Mapping[str, float]
    curve: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Row:
    """A preset in one setting, over its `seeds`. Intervals are (mean, low, high), bounds NaN for a single seed.

    `differences`: to the reference preset over the `shared` seeds, seed by seed; a metric that fewer than two seeds
    of both have is absent.
    """

    setting: str
    preset: str
    seeds: tuple[int, ...]
    means: Mapping[str, Interval]
    shared: tuple[int, ...]
    differences: Mapping[str, Interval]


def presets_in(results: Sequence[Result], order: Sequence[str] | None = None) -> list[str]:
    """Return the presets that have results: base, then as in `order`, then the others as they come."""
    known = dict.fromkeys(result.preset for result in results)
    return [name for name in dict.fromkeys((BASE, *(order or ()), *known)) if name in known]


def settings_in(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.setting for result in results))


def measured(results: Iterable[Result]) -> list[str]:
    """Return the metrics that any of the results has a value of, in the order in which they are shown."""
    return [info.name for info in overview(name for result in results for name in result.values if is_metric(name))]


def select(results: Sequence[Result], setting: str, preset: str) -> dict[int, Result]:
    """Return the results of a preset in a setting, by seed."""
    return {r.seed: r for r in sorted(results, key=lambda r: r.seed) if (r.setting, r.preset) == (setting, preset)}


def summarise(results: Sequence[Result], reference: str = BASELINE, order: Sequence[str] | None = None) -> list[Row]:
    """Return a row per setting and preset that has results; presets as in `presets_in`.

    A seed is one observation: means and 95 % Student's t intervals are over seeds, those of the differences over
    the seeds that preset and reference share.
    """
    rows, metrics = [], measured(results)
    for setting in settings_in(results):
        against = select(results, setting, reference)
        for preset in presets_in(results, order):
            own = select(results, setting, preset)
            if not own:
                continue
            means = {name: t_interval(values) for name in metrics if (values := _of(own.values(), name))}
            shared = tuple(seed for seed in own if seed in against and preset != reference)
            differences = {}
            for name in metrics:
                both = [(own[seed].values.get(name), against[seed].values.get(name)) for seed in shared]
                gaps = [a - b for a, b in both if a is not None and b is not None]
                if len(gaps) >= 2:
                    differences[name] = t_interval(gaps)
            rows.append(Row(setting, preset, tuple(own), means, shared, differences))
    return rows


def _of(results: Iterable[Result], name: str) -> list[float]:
    return [result.values[name] for result in results if name in result.values]
