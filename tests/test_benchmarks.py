"""Benchmarks run: that of large generators on tiny ones, that of a save on one iteration, a soak of one episode."""

import json
import math
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "options",
    [
        ["--size", "tiny", "--kind", "flux2-klein", "--rank", "4", "--block_offload"],
        pytest.param(["--size", "middle", "--rank", "16"], marks=pytest.mark.slow),
        pytest.param(["--size", "tiny", "--kind", "qwen-image-edit-plus", "--rank", "4"], marks=pytest.mark.slow),
    ],
)
def test_an_iteration_of_a_small_generator(options: list[str], run_python: Run) -> None:
    short = ["--device", "cpu", "--group_size", "2", "--steps", "3", "--micro_batch", "2", "--updates", "2"]
    command = [str(ROOT / "benchmarks" / "generator_step.py"), *options, *short, "--precision", "fp32"]
    done = run_python(*command, "--iterations", "1", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["first ratio - 1, equal micro-batches"] < 1e-6
    assert figures["peak memory, GiB"] is None
    numbers = [value for value in figures.values() if isinstance(value, float)]
    assert len(numbers) > 10 and all(math.isfinite(value) and value >= 0 for value in numbers)
    assert figures["seconds: total"] > 0 and figures["operations an iteration, none counted twice, PFLOP"] > 0


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed: no call fails")
def test_the_checklist_goes_on_after_a_call_that_fails(tmp_path: Path, run_python: Run) -> None:
    """fp8 wants a library that is not installed here; a second time, what is done is read."""
    results = tmp_path / "runs" / "list.jsonl"
    command = [str(ROOT / "benchmarks" / "gpu_checklist.py"), "flux1-fp8", "flux1-half-kept"]
    options = ["--size", "tiny", "--device", "cpu", "--results", str(results)]
    first = run_python(*command, *options)
    assert first.returncode == 1 and "flux1-fp8: " in first.stderr and "torchao, which is not installed" in first.stderr
    assert [json.loads(line)["name"] for line in results.read_text().splitlines()] == ["flux1-half-kept"]
    assert first.stdout.splitlines()[-1].startswith("| flux1-half-kept | ")
    again = run_python(*command[:1], "flux1-half-kept", *options)
    assert again.returncode == 0 and again.stdout == first.stdout


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
