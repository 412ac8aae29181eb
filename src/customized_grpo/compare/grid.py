"""Runs the grid: each training run is a process, finished ones are not repeated, a failed one does not stop the
others."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from customized_grpo.compare.config import CompareConfig, run_settings
from customized_grpo.compare.presets import CALIBRATED
from customized_grpo.compare.results import Cell
from customized_grpo.display import Display, RunState
from customized_grpo.errors import UserError

POLL_SECONDS = 1.0
FREE = ("output", "threads", "policy.precision")
"""Fields in which a run found in the folder may differ from the one that is asked for."""


def cells_of(config: CompareConfig) -> list[Cell]:
    """All runs of the grid, seed by seed: what is done early is complete for the first seeds."""
    return [
        Cell(setting, preset, seed, config.output / "runs" / _slug(setting, preset, seed))
        for seed in range(max(config.trained.values()))
        for setting in config.settings
        for preset, seeds in config.trained.items()
        if seed < seeds
    ]


def label(cell: Cell) -> str:
    """What a run is called where people read it."""
    return f"{cell.setting + ': ' if cell.setting else ''}{cell.preset} seed {cell.seed}"


def check_grid(config: CompareConfig, cells: Sequence[Cell]) -> None:
    """Refuse, before any work, settings that make no valid run, missing data, and a folder with runs of another grid.

    Raises `UserError`.
    """
    for cell in cells:
        wanted = run_settings(config, cell.setting, cell.preset, cell.seed)
        for field in ("path", "validation", "test"):
            folder = wanted["data"][field]
            if folder is not None and not (Path(folder) / "metadata.jsonl").is_file():
                raise UserError(f"train.data.{field}: {folder} is not a data folder: it has no metadata.jsonl")
        path = cell.folder / "config.yaml"
        if path.is_file():
            _check_run(path, cell, wanted)


def _check_run(path: Path, cell: Cell, wanted: dict[str, Any]) -> None:
    found = _flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    calibrated = ("advantages.table",) if cell.preset == CALIBRATED else ()
    differing = [
        f"{name} is {found.get(name)!r} there and {value!r} here"
        for name, value in _flatten(wanted).items()
        if name not in (*FREE, *calibrated) and found.get(name) != value
    ]
    if differing:
        more = f" and {len(differing) - 5} more fields" if len(differing) > 5 else ""
        raise UserError(
            f"{cell.folder} holds a run of another grid: {'; '.join(differing[:5])}{more}. "
            "Give this grid an output of its own, or restore the settings"
        )


def run_grid(config: CompareConfig, cells: Sequence[Cell], display: Display) -> dict[Cell, str]:
    """Run what is not finished, `config.jobs` at a time; returns the failed runs with their reasons."""
    _calibrate(config, cells, display)
    waiting = [cell for cell in cells if not cell.finished]
    total = config.train.iterations
    states = {cell: RunState(label(cell), "done" if cell.finished else "waiting", total) for cell in cells}
    failures: dict[Cell, str] = {}
    running: dict[int, _Job] = {}
    for cell in cells:
        _observe(cell, states[cell])
    with display.grid(list(states.values())) as show, _stop_on_sigterm():
        try:
            while waiting or running:
                for slot in range(config.jobs):
                    if waiting and slot not in running:
                        cell = waiting.pop(0)
                        running[slot] = _start(config, cell, slot)
                        states[cell].status = "running"
                for slot, job in list(running.items()):
                    _observe(job.cell, states[job.cell])
                    code = job.process.poll()
                    if code is None:
                        continue
                    job.log.close()
                    del running[slot]
                    states[job.cell].status = "done" if code == 0 else "failed"
                    if code:
                        failures[job.cell] = states[job.cell].note = _reason(job.log_path, code)
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
    log_path: Path


def _start(config: CompareConfig, cell: Cell, slot: int) -> _Job:
    cores = _cores(config.jobs, slot)
    settings = run_settings(config, cell.setting, cell.preset, cell.seed, _table(config, cell))
    settings |= {"output": str(cell.folder), "threads": config.train.threads or len(cores)}
    path = config.output / "configs" / f"{cell.folder.name}.yaml"
    _write_yaml(path, settings)
    log_path = config.output / "logs" / f"{cell.folder.name}.log"
    command = ["train", "--config", str(path), "--resume"]
    process, log = _launch(command, log_path, settings["threads"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, cores)
    return _Job(cell, process, log, log_path)


def _launch(command: Sequence[str], log_path: Path, threads: int) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log = log_path.open("ab")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, "-m", "customized_grpo", *command]
    return subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
    ), log


def _calibrate(config: CompareConfig, cells: Sequence[Cell], display: Display) -> None:
    """Measure the time weights that preset 'customized-calibrated' needs, once for each setting."""
    for setting in dict.fromkeys(cell.setting for cell in cells if cell.preset == CALIBRATED):
        folder = _calibration(config, setting)
        if (folder / "weights.yaml").is_file():
            continue
        display.note(f"measuring time weights{f' of {setting}' if setting else ''} for {CALIBRATED} ...")
        path = config.output / "configs" / f"calibration{_slug(setting)}.yaml"
        _write_yaml(path, run_settings(config, setting, None, 0))
        log_path = config.output / "logs" / f"calibration{_slug(setting)}.log"
        options = ["--out", str(folder), "--prompts", str(config.calibration_prompts)]
        cores = _cores(1, 0)
        process, log = _launch(["diagnose", "--config", str(path), *options], log_path, len(cores))
        with log, _stop_on_sigterm():
            try:
                code = process.wait()
            finally:
                process.terminate()
        if code:
            raise UserError(f"the time weights could not be measured: {_reason(log_path, code)}; see {log_path}")


def _table(config: CompareConfig, cell: Cell) -> list[list[float]] | None:
    if cell.preset != CALIBRATED:
        return None
    path = _calibration(config, cell.setting) / "weights.yaml"
    table: list[list[float]] = yaml.safe_load(path.read_text(encoding="utf-8"))["advantages"]["table"]
    return table


def _calibration(config: CompareConfig, setting: str) -> Path:
    return config.output / "calibration" / (_slug(setting) or "weights")


def _observe(cell: Cell, state: RunState) -> None:
    """How far the run is, and its last validation."""
    metrics, checks = (_last_row(cell.folder / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    state.iteration = metrics.get("iteration", 0)
    state.joint = checks.get("joint_success")


def _last_row(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 8192))
        lines = log.read().split(b"\n")[:-1]
    row: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return row


def _reason(log_path: Path, code: int) -> str:
    lines = [line.strip() for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = [line for line in lines if line]
    errors = [line.partition("error: ")[2] for line in said if line.startswith("customized-grpo: error: ")]
    return (errors or said or [f"exit status {code}, without a word"])[-1]


def _cores(jobs: int, slot: int) -> list[int]:
    """The cores of one of `jobs` processes: disjoint shares, as two processes on one core slow each other down."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    share = max(1, len(cores) // jobs)
    first = slot * share % len(cores)
    return cores[first : first + share]


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


def _slug(setting: str, preset: str = "", seed: int | None = None) -> str:
    parts = [part for part in (setting, preset) if part] + ([] if seed is None else [f"seed{seed}"])
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


def _write_yaml(path: Path, tree: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
