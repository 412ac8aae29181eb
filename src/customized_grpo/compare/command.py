"""`customized-grpo compare` and `customized-grpo figures`: the grid, then the table, the figures and the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from customized_grpo.compare.config import CompareConfig
from customized_grpo.compare.figures import write_figures
from customized_grpo.compare.grid import RECORD, cells_of, check_grid, label, run_grid
from customized_grpo.compare.page import write_page
from customized_grpo.compare.results import Result, presets_in
from customized_grpo.compare.runs import Cell, read_results
from customized_grpo.compare.table import merged, read_csv, run_of, write_csv
from customized_grpo.config.presets import BASE
from customized_grpo.errors import UserError
from customized_grpo.io.files import check_folder
from customized_grpo.tracking.console import Display

CSV = "comparison.csv"


class GridError(Exception):
    """Some runs of a grid failed; the others are done and the page is written."""


def compare(config: CompareConfig, display: Display, *, report_only: bool = False) -> Path:
    """Run the unfinished runs of the grid, and write comparison.html, comparison.csv and the figures.

    `report_only` runs nothing and writes the page of the finished runs. Returns the page's path. Raises `UserError` on
    bad input, before any work, and `GridError` at the end if runs failed.
    """
    kept = _kept(config)
    if report_only and not kept and not (config.output / RECORD).is_file():
        raise UserError(f"output: {config.output} holds no grid (no {RECORD}), so there is nothing to report")
    cells = cells_of(config)
    check_grid(config, cells, data=not report_only)
    runs = {run_of(result) for result in kept}
    done = {cell for cell in cells if cell.finished or run_of(cell) in runs}
    failures = {} if report_only else run_grid(config, cells, display, done, lambda cell: _add(config, [cell]))
    if not any(run_of(cell) in runs or cell.finished for cell in cells):
        if failures:
            raise GridError(_told(failures))
        where = config.output if config.results is None else f"{config.output} and {config.results}"
        raise UserError(f"output: no run in {where} is finished, so there is nothing to report")
    page = write_results(config, cells, failures)
    if failures:
        raise GridError(f"{_told(failures)}\nThe page shows what is done: {page}")
    return page


def write_results(config: CompareConfig, cells: list[Cell], failures: Mapping[Cell, str]) -> Path:
    """Write the table, the figures and the page of the finished runs; returns the page's path."""
    table = config.output / CSV
    write_csv(table, _add(config, cells))
    # From the table, not from the runs: what is drawn is what `figures` draws again from it.
    results = read_csv(table)
    write_figures(results, config.output / "figures", list(config.presets))
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return write_page(
        results, cells, config.output, title=config.title, settings_text=settings,
        failures={label(cell): reason for cell, reason in failures.items()},
    )  # fmt: skip


def _kept(config: CompareConfig) -> list[Result]:
    """Return the results that the table `results` holds, none if that table does not exist yet."""
    return [] if config.results is None or not config.results.exists() else read_csv(config.results)


def _add(config: CompareConfig, cells: Sequence[Cell]) -> list[Result]:
    """Return the results of the finished ones of `cells` and of the table `results`, and write them to that table."""
    # The base is evaluated by every run; it is shown for as many seeds as were asked for.
    base = config.presets.get(BASE, 0)
    found = [result for result in read_results(cells) if result.preset != BASE or result.seed < base]
    results = merged(_kept(config), found, list(config.settings), list(config.presets))
    if config.results is not None:
        write_csv(config.results, results)
    return results


def figures(csv: Path, output: Path) -> Path:
    """Draw the figures of a comparison.csv into the folder `output`. Raises `UserError` where it cannot be read."""
    check_folder(output, "--output")
    results = read_csv(csv)
    write_figures(results, output, presets_in(results))
    return output


def _told(failures: Mapping[Cell, str]) -> str:
    reasons = "\n".join(f"  {label(cell)}: {reason}" for cell, reason in failures.items())
    return f"{len(failures)} runs failed:\n{reasons}\nMend the cause and run compare again: finished runs are kept"
