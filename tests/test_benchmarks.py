"""Benchmarks run: that of a full-size FLUX.1 on a tiny one, that of a save on one iteration, a soak of one episode."""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[1]


def test_gpu_step_on_a_tiny_transformer(run_python: Run) -> None:
    options = ["--tiny", "--device", "cpu", "--rank", "4", "--group_size", "2", "--steps", "3", "--micro_batch", "2"]
    options += ["--updates", "2"]
    command = [str(ROOT / "benchmarks" / "gpu_step.py"), *options, "--iterations", "1", "--json"]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["first ratio - 1, equal micro-batches"] == 0
    assert figures["peak memory, GiB"] is None
    numbers = [value for value in figures.values() if isinstance(value, float)]
    assert len(numbers) > 10 and all(math.isfinite(value) and value >= 0 for value in numbers)
    assert figures["seconds: total"] > 0 and figures["operations an iteration, none counted twice, PFLOP"] > 0


@pytest.mark.slow
def test_checkpoint_cost_of_one_iteration(tmp_path: Path, run_python: Run) -> None:
    options = ["--folder", str(tmp_path), "--iterations", "1", "--threads", "1", "--json"]
    command = [str(ROOT / "benchmarks" / "checkpoint_cost.py"), *options]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert len(figures) == 6 and all(value > 0 for value in figures.values())
    assert list(tmp_path.iterdir()) == []


def test_a_save_of_a_given_size(tmp_path: Path, run_python: Run) -> None:
    command = [str(ROOT / "benchmarks" / "checkpoint_cost.py"), "--gigabytes", "0.01", "--json"]
    done = run_python(*command, "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert 0.0095 < figures["size of a checkpoint, GB"] < 0.0105 and figures["seconds of a save"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_soak_of_one_episode(tmp_path: Path, run_python: Run) -> None:
    options = [
        "--folder",
        str(tmp_path),
        "--minutes",
        "0.01",
        "--iterations",
        "4",
        "--processes",
        "1",
        "--seed",
        "1",
        "--json",
    ]
    done = run_python(ROOT / "benchmarks" / "soak.py", *options, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["episodes"] == figures["equal to the bit"] == 1
    assert list(tmp_path.iterdir()) == []
