"""Benchmarks run: that of a full-size FLUX.1 on a tiny one, that of a save on one iteration, a soak of one episode."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_gpu_step_on_a_tiny_transformer() -> None:
    options = ["--tiny", "--device", "cpu", "--rank", "4", "--group_size", "2", "--steps", "3", "--micro_batch", "2"]
    options += ["--updates", "2"]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py"), *options, "--iterations", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["first ratio - 1, equal micro-batches"] == 0
    assert figures["peak memory, GiB"] is None
    numbers = [value for value in figures.values() if isinstance(value, float)]
    assert len(numbers) > 10 and all(math.isfinite(value) and value >= 0 for value in numbers)
    assert figures["seconds: total"] > 0 and figures["operations an iteration, none counted twice, PFLOP"] > 0


@pytest.mark.slow
def test_checkpoint_cost_of_one_iteration(tmp_path: Path) -> None:
    options = ["--folder", str(tmp_path), "--iterations", "1", "--threads", "1", "--json"]
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint_cost.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert len(figures) == 6 and all(value > 0 for value in figures.values())
    assert list(tmp_path.iterdir()) == []


def test_a_save_of_a_given_size(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint_cost.py"), "--gigabytes", "0.01", "--json"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert 0.0095 < figures["size of a checkpoint, GB"] < 0.0105 and figures["seconds of a save"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_soak_of_one_episode(tmp_path: Path) -> None:
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
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["episodes"] == figures["equal to the bit"] == 1
    assert list(tmp_path.iterdir()) == []
