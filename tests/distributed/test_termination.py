"""Runs that are stopped: SIGTERM in every phase, SIGKILL at any moment; what goes on is the run that never stopped."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fork_server import Process

from customized_grpo.distributed.termination import SignalHandler, Terminated

MakeSettings = Callable[..., dict[str, Any]]
Run = Callable[..., subprocess.CompletedProcess[str]]
ADAPTER = "adapter_model.safetensors"
SIX = {
    "iterations": 6, "checkpoint.every": 1, "evaluation.every": 2, "optimizer.num_minibatches": 2,
    "ema.decay": 0.9,
}  # fmt: skip
PROGRAM = """
import os, signal, sys
from customized_grpo.training.loop import TrainingLoop
from customized_grpo.training.saving import CheckpointSaver
from customized_grpo.training.trainer import Trainer
from customized_grpo.cli.main import main

place, iteration, number = sys.argv.pop(1), int(sys.argv.pop(1)), signal.Signals[sys.argv.pop(1)]

signal.signal(number, signal.SIG_DFL)  # a shell ignores some in the background

def strike(owner, name, when):
    original = getattr(owner, name)
    def struck(self, *arguments, **settings):
        if when(self):
            os.kill(os.getpid(), number)
        return original(self, *arguments, **settings)
    setattr(owner, name, struck)

def due(trainer):
    return trainer.iteration == iteration

if place == "sampling":
    strike(Trainer, "batch", due)
elif place == "scoring":
    strike(Trainer, "score", due)
elif place == "update":
    strike(Trainer, "_backward", due)
elif place == "between updates":
    steps = []
    def second(trainer):
        steps.append(1)
        return due(trainer) and len(steps) % 2 == 0
    strike(Trainer, "_optimizer_step", second)
elif place == "validation":
    strike(TrainingLoop, "_validate", lambda run: due(run.trainer))
elif place == "averaged weights":
    strike(TrainingLoop, "_poll", lambda run: due(run.trainer))
elif place == "saving":
    strike(CheckpointSaver, "save", lambda saver: saver.snapshot.iteration == iteration)
main()
"""
"""Trains as the command does, and sends itself a signal at a place of an iteration."""


@pytest.fixture
def settings(make_settings: MakeSettings, tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration file for a run into a folder."""

    def settings(output: Path, **changes: Any) -> Path:
        path = tmp_path / f"{output.name}.yaml"
        path.write_text(yaml.safe_dump(make_settings(SIX | {"output": str(output)} | changes)))
        return path

    return settings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def straight(place: Path, settings: Callable[..., Path], run_python: Run) -> Path:
    """The run that never stopped."""
    if not place.exists():
        assert run_python("-m", "customized_grpo", *train(settings(place))).returncode == 0
    return place


def train(path: Path) -> list[str]:
    return ["train", "--config", str(path), "--resume"]


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in lines]


def same(first: Path, second: Path) -> None:
    for name in (ADAPTER, f"ema/{ADAPTER}"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert rows(first, name) == rows(second, name)
    galleries = [sorted(path.name for path in (run / "galleries").iterdir()) for run in (first, second)]
    assert galleries[0] == galleries[1]


@pytest.mark.parametrize(
    ("where", "iteration", "kept"),
    [
        ("scoring", 3, 3), ("update", 2, 2), ("between updates", 4, 4), ("validation", 4, 4),
        ("averaged weights", 4, 4), ("saving", 3, 3), ("sampling", 0, None),
        pytest.param("sampling", 2, 2, marks=pytest.mark.slow),
        pytest.param("validation", 0, None, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_signal_leaves_a_checkpoint_of_the_last_whole_iteration(
    where: str, iteration: int, kept: int | None, straight: Path, settings: Callable[..., Path], tmp_path: Path,
    run_python: Run,
) -> None:  # fmt: skip
    output = tmp_path / "stopped"
    path = settings(output, **{"checkpoint.every": 3 if where == "saving" else 6})
    start = time.monotonic()
    number = signal.SIGINT if where == "between updates" else signal.SIGTERM  # Ctrl-C is no other case
    done = run_python("-c", PROGRAM, where, iteration, number.name, *train(path))
    assert done.returncode == 128 + number, done.stderr
    assert f"stopped by {number.name} after iteration {kept or 0}" in done.stdout and "Traceback" not in done.stderr
    assert time.monotonic() - start < 60
    checkpoints = sorted(each.name for each in (output / "checkpoints").glob("*"))
    assert checkpoints == ([] if kept is None else [f"{kept:06d}"])
    again = run_python("-m", "customized_grpo", *train(path))
    assert again.returncode == 0, again.stderr
    same(output, straight)


def test_sigterm_before_training_ends_at_once(settings: Callable[..., Path], tmp_path: Path, run_python: Run) -> None:
    program = PROGRAM.replace(
        "main()\n",
        "from customized_grpo.training import run\n"
        "run.build_start = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\n"
        "main()\n",
    )
    done = run_python("-c", program, "nowhere", 0, "SIGTERM", *train(settings(tmp_path / "run")))
    assert done.returncode == 143 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_a_run_killed_at_any_moments_comes_to_the_same_end(
    seed: int, straight: Path, settings: Callable[..., Path], tmp_path: Path, python: Callable[..., Process]
) -> None:
    """SIGKILL, three times, each once an iteration more was logged and before the last one was."""
    output, draw = tmp_path / "killed", random.Random(seed)
    log = output / "metrics.jsonl"
    command = ["-m", "customized_grpo", *train(settings(output))]
    for number in range(1, 4):
        child = python(*command)
        while not log.is_file() or log.read_bytes().count(b"\n") < number:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    last = python(*command)
    assert last.wait() == 0, last.written()
    same(output, straight)


def test_what_is_whole_is_not_torn() -> None:
    termination, done = SignalHandler(), []

    def work() -> None:
        with termination.critical_section():
            with termination.critical_section():
                signal.raise_signal(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("never")

    with termination.listening():
        with pytest.raises(Terminated):
            work()
        assert done == ["inner", "outer"]
        signal.raise_signal(signal.SIGTERM)  # a second one asks for nothing new


def test_deferred_it_waits_for_a_poll_unless_nothing_else_waits() -> None:
    termination = SignalHandler()
    with termination.listening():
        termination.defer()
        with pytest.raises(Terminated), termination.immediate():
            signal.raise_signal(signal.SIGTERM)
        termination.check()
        with pytest.raises(Terminated):
            termination.poll()
        with pytest.raises(Terminated), termination.immediate():
            pytest.fail("it had come before")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_schedulers_keyboards_and_closed_terminals_are_heard(number: signal.Signals) -> None:
    termination, before = SignalHandler(), signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Terminated), termination.listening():
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert (termination.status, termination.name) == (128 + number, number.name)


def test_what_is_ignored_stays_ignored() -> None:
    """Under nohup a closed terminal ends nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (termination := SignalHandler()).listening():
            signal.raise_signal(signal.SIGHUP)
        assert not termination.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_elsewhere_it_comes_at_once_and_the_handler_is_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), SignalHandler().listening():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
