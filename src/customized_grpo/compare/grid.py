"""Runs the grid: each training run is a process, finished ones are not repeated, a failed one does not stop the
others."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from customized_grpo.compare.config import CompareConfig, run_settings
from customized_grpo.compare.runs import Cell
from customized_grpo.config.presets import CALIBRATED
from customized_grpo.config.run import Config, flatten
from customized_grpo.errors import UserError
from customized_grpo.factory.config import resolve_config
from customized_grpo.io.files import LOCK, UNFINISHED, check_folder, locked, write_whole, writing
from customized_grpo.io.jsonl import last_row
from customized_grpo.tracking.console import Display, RunState
from customized_grpo.training.run_dir import LOGS, load_run_config

POLL_SECONDS = 1.0
RECORD = "grid.yaml"
RECORDED = {"train", "settings", "hinge_thresholds"}
"""What all runs of a grid rest on: written down when it begins, and held to when it goes on."""
FREE = ("output", "threads", "train.threads")
"""Fields that do not decide what a run comes to."""
Table = dict[str, list[float]]


def cells_of(config: CompareConfig) -> list[Cell]:
    """Return all runs of the grid, seed by seed, so that the first seeds are complete early."""
    return [
        Cell(setting, preset, seed, config.output / "runs" / _slug(setting, preset, seed))
        for seed in range(max(config.trained.values()))
        for setting in config.settings
        for preset, seeds in config.trained.items()
        if seed < seeds
    ]


def label(cell: Cell) -> str:
    """Return the name of a run for people."""
    return f"{cell.setting + ': ' if cell.setting else ''}{cell.preset} seed {cell.seed}"


def check_grid(config: CompareConfig, cells: Sequence[Cell], *, data: bool = True) -> None:
    """Refuse, before any work, settings that make no valid run, a folder with another grid or with other things, and
    missing `data`. Raises `UserError`."""
    twice = [folder.name for folder, count in Counter(cell.folder for cell in cells).items() if count > 1]
    if twice:
        raise UserError(f"settings: the names of some are alike as names of folders ({twice[0]}); rename one")
    _check_output(config.output)
    _check_record(config)
    for setting in dict.fromkeys(cell.setting for cell in cells if cell.preset == CALIBRATED):
        _check_calibration(config, _calibration(config, setting))
    for cell in cells:
        wanted = run_settings(config, cell.setting, cell.preset, cell.seed)
        for field in ("path", "validation", "test") if data else ():
            folder = wanted["data"][field]
            if folder is not None and not (Path(folder) / "metadata.jsonl").is_file():
                raise UserError(f"train.data.{field}: {folder} is not a data folder: it has no metadata.jsonl")
        if (cell.folder / "config.yaml").is_file():
            _check_run(cell, wanted)


def run_grid(
    config: CompareConfig, cells: Sequence[Cell], display: Display, done: Collection[Cell],
    on_end: Callable[[Cell], object],
) -> dict[Cell, str]:  # fmt: skip
    """Run what is not `done`, `config.jobs` at a time; returns the failed runs with their reasons.

    `on_end` is called with each run that has come to its end. Raises `UserError` where another process works on this
    grid.
    """
    with writing(config.output):
        config.output.mkdir(parents=True, exist_ok=True)
    with locked(config.output, "another compare") as lock, _stop_on_sigterm():
        for path in _records(config):
            _write_yaml(path, _record(config))
        failures = _calibrate(config, [cell for cell in cells if cell not in done], display, lock)
        left = [cell for cell in cells if cell not in failures]
        return failures | _run_all(config, left, display, done, on_end, lock)


def _run_all(
    config: CompareConfig, cells: Sequence[Cell], display: Display, done: Collection[Cell],
    on_end: Callable[[Cell], object], lock: int | None,
) -> dict[Cell, str]:  # fmt: skip
    waiting = [cell for cell in cells if cell not in done]
    states = {cell: _observed(config, cell, cell in done) for cell in cells}
    failures: dict[Cell, str] = {}
    running: dict[int, _Job] = {}
    with display.grid(list(states.values())) as show:
        try:
            while waiting or running:
                for slot in range(config.jobs):
                    if waiting and slot not in running:
                        cell = waiting.pop(0)
                        running[slot] = _start(config, cell, slot, lock)
                        states[cell].status = "running"
                for slot, job in list(running.items()):
                    state, code = states[job.cell], job.process.poll()
                    state.iteration, state.joint = _progress(job.cell)
                    if code is None:
                        continue
                    del running[slot]
                    reason = job.reason(code) if code or not job.cell.finished else ""
                    state.status = "failed" if reason else "done"
                    if reason:
                        failures[job.cell] = state.note = reason
                    else:
                        on_end(job.cell)
                    job.log.close()
                show()
                time.sleep(POLL_SECONDS)
        finally:
            for job in running.values():
                job.process.terminate()
            for job in running.values():
                job.process.wait()
                job.log.close()
    return failures


@dataclass(frozen=True)
class _Job:
    cell: Cell
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    before: int
    """Bytes that the log held before this process."""

    def reason(self, code: int) -> str:
        """Return why the process ended without a result."""
        return _reason(Path(self.log.name), self.before, code)


def _start(config: CompareConfig, cell: Cell, slot: int, lock: int | None) -> _Job:
    cores = _cores(config.jobs, slot)
    settings = run_settings(config, cell.setting, cell.preset, cell.seed, _table(config, cell))
    settings |= {"output": str(cell.folder), "threads": settings["threads"] or len(cores)}
    path = config.output / "configs" / f"{cell.folder.name}.yaml"
    _write_yaml(path, settings)
    command = ["train", "--config", str(path), "--resume"]
    process, log, before = _launch(command, _log_of(config, cell.folder.name), settings["threads"], lock)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, cores)
    return _Job(cell, process, log, before)


def _launch(
    command: Sequence[str], log_path: Path, threads: int, lock: int | None
) -> tuple[subprocess.Popen[bytes], IO[bytes], int]:
    with writing(log_path.parent):
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = log_path.open("ab")
    before = log.seek(0, os.SEEK_END)
    process = subprocess.Popen(
        [sys.executable, "-m", "customized_grpo", *command], stdin=subprocess.DEVNULL, stdout=log,
        stderr=subprocess.STDOUT, pass_fds=() if lock is None else (lock,),
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    return process, log, before


def _calibrate(config: CompareConfig, cells: Sequence[Cell], display: Display, lock: int | None) -> dict[Cell, str]:
    """Measure the time weights that preset 'customized-calibrated' needs, once for each setting; returns the runs that
    cannot be made because it failed."""
    failures: dict[Cell, str] = {}
    for setting in dict.fromkeys(cell.setting for cell in cells if cell.preset == CALIBRATED):
        folder = _calibration(config, setting)
        if (folder / "weights.yaml").is_file():
            continue
        display.note(f"measuring time weights{f' of {setting}' if setting else ''} for {CALIBRATED} ...")
        name = f"calibration{_slug(setting)}"
        path = config.output / "configs" / f"{name}.yaml"
        _write_yaml(path, run_settings(config, setting, None, 0))
        options = ["--out", str(folder), "--prompts", str(config.calibration_prompts)]
        command = ["diagnose", "--config", str(path), *options]
        process, log, before = _launch(command, _log_of(config, name), len(_cores(1, 0)), lock)
        try:
            code = process.wait()
        finally:
            process.terminate()
            log.close()
        if code:
            reason = f"its time weights could not be measured: {_reason(Path(log.name), before, code)}"
            failures |= {cell: reason for cell in cells if (cell.preset, cell.setting) == (CALIBRATED, setting)}
    return failures


def _table(config: CompareConfig, cell: Cell) -> Table | None:
    if cell.preset != CALIBRATED:
        return None
    path = _calibration(config, cell.setting) / "weights.yaml"
    table: Table = yaml.safe_load(path.read_text(encoding="utf-8"))["advantages"]["table"]
    return table


def _calibration(config: CompareConfig, setting: str) -> Path:
    return config.output / "calibration" / (_slug(setting) or "weights")


def _log_of(config: CompareConfig, name: str) -> Path:
    return config.output / "logs" / f"{name}.log"


def _observed(config: CompareConfig, cell: Cell, done: bool) -> RunState:
    total = run_settings(config, cell.setting, cell.preset, cell.seed)["iterations"]
    return RunState(label(cell), "done" if done else "waiting", total, *_progress(cell))


def _progress(cell: Cell) -> tuple[int, float | None]:
    """Return the last iteration of a run, and joint success on its last validation."""
    metrics, checks = (last_row(cell.folder / name) or {} for name in LOGS)
    return metrics.get("iteration", 0), checks.get("joint_success")


def _reason(log_path: Path, before: int, code: int) -> str:
    """Return the error that the process printed, if any, and its exit status."""
    said = log_path.read_bytes()[before:].decode("utf-8", errors="replace").splitlines()
    errors = [line.partition("error: ")[2] for line in said if line.startswith("customized-grpo: error: ")]
    if errors:
        return errors[-1]
    ended = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
    last = next((line.strip() for line in reversed(said) if line.strip()), "")
    return f"{ended}{f' after: {last}' if last else ''}; see {log_path}"


def _record(config: CompareConfig) -> dict[str, Any]:
    record = config.model_dump(mode="json", include=RECORDED)
    return record | {"settings": {name: json.dumps(changes) for name, changes in config.settings.items()}}


def _check_output(output: Path) -> None:
    check_folder(output, "output")
    if (
        output.exists()
        and not (output / RECORD).is_file()
        and any(path.name not in (LOCK, f"{RECORD}{UNFINISHED}") for path in output.iterdir())
    ):
        raise UserError(
            f"output: the folder {output} is not empty and holds no grid (no {RECORD}); name another folder"
        )


def _check_record(config: CompareConfig) -> None:
    """Check that the settings with which a grid began are unchanged; settings may be added."""
    for path, what in _records(config).items():
        if not path.is_file():
            continue
        try:
            there = flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, AttributeError) as error:
            raise UserError(f"{path}: not the record that compare wrote ({error}); use another output") from error
        _refuse(there, flatten(_record(config)), there, f"{what} holds another grid")
    if config.results is not None and config.results.is_file() and not record_of(config.results).is_file():
        raise UserError(
            f"results: beside {config.results} there is no {record_of(config.results).name}, which says what its runs "
            "were trained with; name a table that compare --results began"
        )


def record_of(table: Path) -> Path:
    """Return the file beside a table of results that holds the settings of its grid."""
    return table.with_suffix(".yaml")


def _records(config: CompareConfig) -> dict[Path, Path]:
    """Return the files with the settings of the grid, and what each speaks of."""
    found = {config.output / RECORD: config.output}
    return found if config.results is None else found | {record_of(config.results): config.results}


def _check_run(cell: Cell, wanted: dict[str, Any]) -> None:
    here = flatten(resolve_config(Config.model_validate(wanted)).model_dump(mode="json"))
    if cell.preset == CALIBRATED:
        here = {name: value for name, value in here.items() if not name.startswith("advantages.table")}
    there = flatten(load_run_config(cell.folder).model_dump(mode="json"))
    _refuse(there, here, here, f"{cell.folder} holds a run of another grid")


def _check_calibration(config: CompareConfig, folder: Path) -> None:
    if not (folder / "weights.yaml").is_file():
        return
    made = json.loads((folder / "diagnosis.json").read_text(encoding="utf-8"))["settings"]["prompts"]
    if made != config.calibration_prompts:
        raise UserError(
            f"calibration_prompts: {config.calibration_prompts} are asked for, but the weights in {folder} were "
            f"measured on {made}; restore the number, or give this grid an output of its own"
        )


def _refuse(there: dict[str, Any], here: dict[str, Any], names: Iterable[str], what: str) -> None:
    """Raise `UserError` where the fields `names` differ."""
    differing = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in names
        if name not in FREE and there.get(name) != here.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 5} more fields" if len(differing) > 5 else ""
        raise UserError(
            f"{what}: {'; '.join(differing[:5])}{more}. Give this grid an output of its own, or restore the settings"
        )


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Leave by an exception on SIGTERM, so that no run is orphaned."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cores(jobs: int, slot: int) -> list[int]:
    """Return the cores of each of `jobs` processes: disjoint sets, since two processes on one core slow each other
    down."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    share = max(1, len(cores) // jobs)
    first = slot * share % len(cores)
    return cores[first : first + share]


def _slug(setting: str, preset: str = "", seed: int | None = None) -> str:
    parts = [part for part in (setting, preset) if part] + ([] if seed is None else [f"seed{seed}"])
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip(".")


def _write_yaml(path: Path, tree: dict[str, Any]) -> None:
    write_whole(path, yaml.safe_dump(tree, sort_keys=False))
