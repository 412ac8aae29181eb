"""Does the guard work? The adapter of the best validation against the last one, and what stopping early would miss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from customized_grpo.compare.results import BEST_ITERATION, BEST_PREFIX, Result, presets_in, select, settings_in
from customized_grpo.evaluation.against_base import HELD_OUT_GAIN, TEXTURE
from customized_grpo.evaluation.selection import best_row, should_stop
from customized_grpo.evaluation.statistics import Interval, t_interval

PATIENCES = (1, 2, 3, 5)
"""Validations without a better one after which a run is imagined to stop."""
OF_THE_BASE = {HELD_OUT_GAIN: 0.0, TEXTURE: 1.0}
"""What is measured against the base, for a run whose best is the base itself."""


@dataclass(frozen=True)
class Guard:
    """A preset in one setting, over the seeds whose runs kept a best adapter. Intervals are over seeds.

    `iterations`: of the best validation, by seed. `best`, `last`, `differences`: means on the test pairs by metric, of
    the best adapter, of the last one, and of best minus last, seed by seed.
    """

    setting: str
    preset: str
    iterations: tuple[int, ...]
    best: Mapping[str, Interval]
    last: Mapping[str, Interval]
    differences: Mapping[str, Interval]


@dataclass(frozen=True)
class Stopping:
    """What one patience would do to runs: `runs` stop before their end, `missed` of these before their best validation.

    `regret`: what the missed validations were better by, in held-out gain, over all runs that stop; 0 where none was.
    """

    patience: int
    runs: int
    missed: int
    regret: float


def guards(results: Sequence[Result], metrics: Sequence[str]) -> list[Guard]:
    """Return a row per setting and preset that kept best adapters; metrics that a run lacks are left out."""
    rows = []
    for setting in settings_in(results):
        for preset in presets_in(results):
            runs = [run for run in select(results, setting, preset).values() if BEST_ITERATION in run.values]
            if not runs:
                continue
            kept = [_kept(run) for run in runs]
            known = [name for name in metrics if all(name in side for side in (*kept, *(run.values for run in runs)))]
            best = {name: [side[name] for side in kept] for name in known}
            last = {name: [run.values[name] for run in runs] for name in known}
            gaps = {name: [a - b for a, b in zip(best[name], last[name], strict=True)] for name in known}
            means = [{name: t_interval(side[name]) for name in known} for side in (best, last, gaps)]
            rows.append(Guard(setting, preset, tuple(int(run.values[BEST_ITERATION]) for run in runs), *means))
    return rows


def _kept(run: Result) -> Mapping[str, float]:
    """Return what was measured of a run's kept adapter, by metric."""
    own = OF_THE_BASE if run.values[BEST_ITERATION] == 0 else {}
    kept = [name for name in run.values if name.startswith(BEST_PREFIX)]
    return own | {name.removeprefix(BEST_PREFIX): run.values[name] for name in kept}


def stoppings(results: Sequence[Result], metric: str = HELD_OUT_GAIN) -> list[Stopping]:
    """Return for each of `PATIENCES` what stopping early would have missed, by the validations of all runs."""
    curves = [run.curve[metric] for run in results if len(run.curve.get(metric, {})) > 1]
    found = []
    for patience in PATIENCES:
        losses = [loss for curve in curves if (loss := missed_gain(curve, patience, metric)) is not None]
        if losses:
            missed = sum(loss > 0 for loss in losses)
            found.append(Stopping(patience, len(losses), missed, sum(losses) / len(losses)))
    return found


def missed_gain(curve: Mapping[int, float], patience: int, metric: str = HELD_OUT_GAIN) -> float | None:
    """Return by how much the best validation beats the best one before a stop; None if the run would not stop early.

    `curve`: values of `metric` by iteration. A stop at the last validation is not early.
    """
    rows = [{"iteration": step, metric: value} for step, value in sorted(curve.items())]
    for count in range(1, len(rows)):
        if should_stop(rows[:count], metric, patience):
            before, best = best_row(rows[:count], metric), best_row(rows, metric)
            assert before is not None and best is not None
            return abs(float(best[metric]) - float(before[metric]))
    return None
