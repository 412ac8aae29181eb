"""Live progress on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from customized_grpo.tracking.metric_info import (
    HEADLINE,
    REWARD_PREFIX,
    MetricInfo,
    in_order,
    metric_info,
    overview,
)
from customized_grpo.tracking.time_left import duration

NOT_METRICS = ("iteration", "pairs", "intervals", "gains", "over_optimized")
"""Fields of a validation's row that are no metrics."""


class TrainingProgress:
    """What is shown while a run trains."""

    def __init__(self, console: Console, progress: Progress, task: TaskID) -> None:
        self._console, self._progress, self._task = console, progress, task
        self._phase, self._began = "", 0.0

    def phase(self, name: str, share: float) -> None:
        """Show which phase of the iteration runs, how far it is, and how long it will take still."""
        now = time.monotonic()
        if name != self._phase:
            self._phase, self._began = name, now
        left = f" {duration((now - self._began) * (1 - share) / share)} left" if 0 < share < 1 else ""
        self._progress.update(self._task, phase=f"{name} {share:.0%}{left}")

    def iteration(self, metrics: Mapping[str, Any], left: float | None) -> None:
        """Show an iteration's figures, and the seconds that are `left` of the run where that is known: on the bar of a
        terminal, else as a line."""
        conflict, silent = metrics.get("conflict_rate"), metrics["silent_groups"]
        parts = [f"{name} {mean:.3f}" for name, mean in _reward_means(metrics)]
        if conflict is not None:
            parts.append(f"conflict {'-' if math.isnan(conflict) else f'{conflict:.0%}'}")
        figures = "  ".join(parts)
        if silent > 0:
            figures += f"  silent groups {silent:.0%}"
        speed = f"{metrics['samples_per_second']:.3g} images/s"
        if (peak := metrics.get("peak_memory_gib")) is not None:
            speed += f"  {peak:.1f} GiB"
        told = "" if left is None else f"  {duration(left)} left"
        self._progress.update(
            self._task, completed=metrics["iteration"], figures=f"{figures}  {speed}", left=told.strip()
        )
        if not self._console.is_terminal:
            place = f"iteration {metrics['iteration']}/{self._progress.tasks[0].total:.0f}"
            cost = f"grad {metrics['grad_norm']:.1e}  {metrics['seconds/total']:.1f} s  {speed}{told}"
            self._console.print(f"{place}  {figures}  {cost}", highlight=False, soft_wrap=True)


@dataclass
class RunState:
    """One run of a grid: its status is waiting, running, done or failed."""

    label: str
    status: str
    iterations: int
    iteration: int = 0
    joint: float | None = None
    note: str = ""

    @property
    def figures(self) -> str:
        """What is known of it, in a line."""
        joint = "" if self.joint is None else f"  {metric_info(HEADLINE).label} {self.joint:.1%} on the last validation"
        return f"{self.status}  {self.iteration}/{self.iterations}{joint}" + (f"  {self.note}" if self.note else "")


class Display:
    """Says what happens on `console`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    @classmethod
    def silent(cls) -> "Display":
        """Return a display that shows nothing."""
        return cls(Console(quiet=True))

    def note(self, text: str) -> None:
        """Show a line of information."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Show a line that asks for attention."""
        self.console.print(f"WARNING: {text}", style="bold yellow", highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def training(self, iterations: int, done: int) -> Iterator[TrainingProgress]:
        """Show a run of `iterations`; `done` of them are behind it."""
        progress = self._bar(
            TextColumn("{task.fields[phase]:<13}"), TextColumn("{task.fields[figures]}"),
            TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        with progress:
            task = progress.add_task("training", total=iterations, completed=done, phase="", figures="", left="")
            yield TrainingProgress(self.console, progress, task)

    @contextmanager
    def stages(self) -> Iterator["StageProgress"]:
        """Show a sequence of named stages, each with its own bar."""
        with self._bar(TextColumn("{task.fields[figures]}"), TimeRemainingColumn()) as progress:
            yield StageProgress(self.console, progress)

    @contextmanager
    def grid(self, states: Sequence[RunState]) -> Iterator[Callable[[], None]]:
        """Show the runs of a grid: one live table on a terminal, elsewhere a line when the status of a run changes.

        Yields what is called after `states` have changed.
        """
        if self.console.is_terminal:
            with Live(_grid_table(states), console=self.console, refresh_per_second=2) as live:
                yield lambda: live.update(_grid_table(states))
            return
        said = [state.status for state in states]

        def say_changes() -> None:
            for index, state in enumerate(states):
                if state.status != said[index]:
                    said[index] = state.status
                    finished = sum(state.status in ("done", "failed") for state in states)
                    self.note(f"[{finished}/{len(states)}] {state.label}: {state.figures}")

        yield say_changes

    def validation(self, row: Mapping[str, Any]) -> None:
        """Show a validation's figures."""
        infos = overview(name for name in row if name not in NOT_METRICS)
        figures = "  ".join(f"{info.label} {_figure(info, row[info.name])}" for info in infos)
        self.note(f"validation at iteration {row['iteration']} ({row['pairs']} pairs): {figures}")

    def comparison(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Show the results of an evaluation before and after as a table, with chance levels and ceilings if known."""
        table = Table(title="before and after, with 95 % intervals", title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("", *results, "chance", "ceiling"):
            table.add_column(column)
        last = list(results.values())[-1]
        for info in overview(dict.fromkeys(name for side in results.values() for name in side["summary"])):
            found = (side["summary"].get(info.name) for side in results.values())
            intervals = ("" if value is None else _interval(info, value) for value in found)
            levels = (last[level].get(info.name) for level in ("chance", "ceiling"))
            table.add_row(info.label, *intervals, *("" if level is None else _figure(info, level) for level in levels))
        self.console.print(table)

    def intervals(self, title: str, summary: Mapping[str, Mapping[str, float | None]]) -> None:
        """Show means and their intervals, by metric."""
        rows = {}
        for info in in_order(summary):
            mean, low, high = (
                "\u2013" if number is None else _figure(info, number) for number in summary[info.name].values()
            )
            rows[info.label] = f"{mean} ({low} to {high})"
        self.table(title, rows)

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """Show names and values."""
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        self.console.print(table)

    def _bar(self, *columns: ProgressColumn) -> Progress:
        return Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=14), MofNCompleteColumn(), *columns,
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip


class StageProgress:
    """A bar for each stage on a terminal, a line every tenth of a stage elsewhere."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._tasks: dict[str, TaskID] = {}

    def update(self, stage: str, step: int, steps: int, loss: float | None = None) -> None:
        """Show that `stage` has done `step` of `steps`."""
        figures = "" if loss is None else f"loss {loss:.3f}"
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=steps, figures="")
        self._progress.update(self._tasks[stage], completed=step, figures=figures)
        if not self._console.is_terminal and step % max(1, steps // 10) == 0:
            self._console.print(f"{stage}: step {step}/{steps}  {figures}".rstrip(), highlight=False)


def _grid_table(states: Sequence[RunState]) -> Table:
    """Return the table of all runs; those to watch come first, since a small terminal shows the first ones."""
    order = ("running", "failed", "done", "waiting")
    title = ", ".join(f"{sum(state.status == status for state in states)} {status}" for status in order)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("run", "status", "iteration", metric_info(HEADLINE).label, ""):
        table.add_column(column)
    for state in sorted(states, key=lambda state: order.index(state.status)):
        joint = "" if state.joint is None else f"{state.joint:.1%}"
        table.add_row(state.label, state.status, f"{state.iteration}/{state.iterations}", joint, state.note)
    return table


def _reward_means(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the name and the mean of each reward of an iteration."""
    for name, value in metrics.items():
        if name.startswith(REWARD_PREFIX) and name.endswith("/mean"):
            yield name.removeprefix(REWARD_PREFIX).removesuffix("/mean"), value


def _figure(info: MetricInfo, value: float) -> str:
    return f"{value:.1%}" if info.is_share else f"{value:.{3 if info.digits is None else info.digits}f}"


def _interval(info: MetricInfo, value: Mapping[str, float]) -> str:
    mean, low, high = (_figure(info, value[key]) for key in ("mean", "low", "high"))
    if math.isnan(value["low"]):  # a single value
        return mean
    return f"{mean} ({low.rstrip('%')}–{high.rstrip('%')})"
