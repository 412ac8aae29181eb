"""Several processes: what they exchange, that they train as one does, and what happens when one of them is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from fork_server import Process
from named_rewards import named
from safetensors.torch import load_file

from customized_grpo.config.run import flatten
from customized_grpo.data import Sample, save_image, write_metadata
from customized_grpo.distributed import heartbeat
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.distributed.launch import is_launched
from customized_grpo.distributed.termination import SignalHandler
from customized_grpo.errors import UserError
from customized_grpo.testing.tiny_pipelines import save_tiny

WORKER = Path(__file__).with_name("ranks_worker.py")
MakeSettings = Callable[..., dict[str, Any]]
Together = Callable[..., list[int]]
ADAPTER = "adapter_model.safetensors"
GROUP = 4
FIVE: dict[str, Any] = {"iterations": 5, "checkpoint.every": 100}
SHARED: dict[str, Any] = {
    "iterations": 3, "threads": 1, "rollout.prompts_per_iteration": 3, "rollout.group_size": GROUP,
    "rollout.micro_batch": GROUP, "optimizer.micro_batch": GROUP, "optimizer.num_minibatches": 2,
    "advantages.normalize": "group_then_batch", "objective.kl_weight": 0.01, "ema.decay": 0.9,
    "distributed.check_weights_every": 1,
    "checkpoint.every": 1, "evaluation.every": 1, "evaluation.num_samples": 3, "optimizer.learning_rate": 2e-5,
}  # fmt: skip
"""Uneven shares, statistics over the batch, and the paper's learning rate. AdamW divides a gradient by its own size:
where it all but cancels, rounding decides, and weights differ by up to a hundredth of a step."""


PORTS = iter(range(20000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), 32000))
"""Below those that a system hands out: between choosing a port and using it, no other connection takes it."""


def free_port() -> int:
    for port in PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("all ports are taken")


def environment(rank: int, world: int, port: int, address: str = "127.0.0.1") -> dict[str, str]:
    """The variables that tell a process which one of how many it is."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": address}


@pytest.fixture
def ranks(python: Callable[..., Process]) -> Callable[..., list[Process]]:
    """Starts what `python` with some arguments would as the processes of one run."""

    def ranks(*arguments: object, world: int = 2) -> list[Process]:
        port = free_port()
        return [python(*arguments, env=environment(rank, world, port)) for rank in range(world)]

    return ranks


@pytest.fixture
def together(ranks: Callable[..., list[Process]], tmp_path: Path) -> Callable[..., list[int]]:
    """Runs `check` of the worker in several processes; answers their statuses."""

    def together(check: str, settings: dict[str, Any], world: int = 2) -> list[int]:
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(settings))
        processes = ranks(WORKER, check, file, world=world)
        told = [process.communicate()[1] for process in processes]
        assert all("Traceback" not in text for text in told), "\n".join(told)
        return [process.wait() for process in processes]

    return together


@pytest.fixture
def written(make_settings: MakeSettings, tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration file of a small run into a folder."""

    def written(name: str, **changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(make_settings(SHARED | {"output": tmp_path / name} | changes)))
        return path

    return written


@pytest.fixture
def train(ranks: Callable[..., list[Process]]) -> Callable[..., str]:
    """Runs `train` in one or several processes to its end; answers what the first one said."""

    def train(config: Path, *options: object, world: int = 1) -> str:
        arguments = ["-m", "customized_grpo", "train", "--config", config, *options]
        processes = ranks(*arguments, world=world)
        said = [process.communicate() for process in processes]
        assert [process.wait() for process in processes] == [0] * world, said
        return said[0][0]

    return train


def same(one: Path, other: Path, rows: Callable[..., list[dict[str, Any]]], adapter: str = ADAPTER) -> None:
    """Logs, weights and averages of two runs are equal up to the order of sums."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        for first, second in zip(rows(one / name), rows(other / name), strict=True):
            found, expected = flatten(second), flatten(first)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                # Gains are differences in units of a spread, which is small in an untrained world.
                close = 1e-4 if "gain" in key else 1e-6
                assert found[key] == pytest.approx(value, rel=1e-5, abs=close), (name, key)
    for name in (adapter, f"ema/{adapter}"):
        weights, others = load_file(one / name), load_file(other / name)
        assert max(float((weights[key] - others[key]).abs().max()) for key in weights) <= 1e-6
        assert max(float(weights[key].abs().max()) for key in weights if "lora_B" in key) > 1e-5  # they did move


# what they exchange


def test_alone_nothing_is_exchanged() -> None:
    ranks, tensor = DistributedGroup(), torch.arange(3.0)
    ranks.all_reduce_([tensor])
    assert tensor.tolist() == [0, 1, 2] and ranks.gather(tensor) is tensor and ranks.is_main_process
    assert ranks.mismatched_ranks(tensor) == [] and list(ranks.local_range(4)) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="as it is"), ranks.synchronized():
        raise UserError("as it is")


def test_tensors_of_three_processes(together: Together) -> None:
    assert together("exchange", {}, world=3) == [0, 0, 0]


def test_an_error_in_one_process_is_told_by_the_first(together: Together) -> None:
    assert together("failing", {}) == [5, 1]


def test_sigterm_to_one_process_ends_all(together: Together) -> None:
    assert together("told_to_end", {}) == [143, 143]


@pytest.mark.parametrize("late", [None, 0], ids=["connected", "while another connects"])
def test_sigterm_to_one_process_ends_what_another_waits_for(late: int | None, together: Together) -> None:
    assert together("hung", {"late_rank": late}) == [143, 143]


@pytest.mark.parametrize(
    ("interval", "silence", "stopped"),
    [(0.25, 1.0, 2.5), pytest.param(1.0, 3.0, 8.0, marks=pytest.mark.slow)],
    ids=["small", "as shipped"],
)
def test_processes_that_were_stopped_together_go_on_together(
    interval: float, silence: float, stopped: float, together: Together
) -> None:
    assert together("frozen", {"interval": interval, "silence": silence, "stopped": stopped}) == [5, 5]


@pytest.mark.parametrize("what", ["loss", "gradient", "memory"])
def test_what_is_not_finite_or_too_large_in_one_process_stops_all(
    make_settings: MakeSettings, together: Together, what: str
) -> None:
    assert together("not_finite", {"config": make_settings(SHARED), "poison": what}) == [5, 5]


def test_rewards_that_fail_in_one_process_count_among_all(make_settings: MakeSettings, together: Together) -> None:
    assert together("failed_rewards", {"config": make_settings(SHARED)}) == [5, 5]


def test_the_loss_of_another_process_does_not_end_one_in_the_middle_of_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended by force only when the save is done, if it does not end by itself."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_INTERVAL", 0.05)
    monkeypatch.setattr(heartbeat, "GRACE", 0.05)
    store, termination, ended = dist.HashStore(), SignalHandler(), threading.Event()
    store.set("name/1", "another")
    store.set("beat/1", "0")

    def leave(status: int) -> None:
        ended.set()
        raise SystemExit  # of the thread alone

    monkeypatch.setattr(heartbeat.os, "_exit", leave)
    watch, acts = heartbeat.HeartbeatMonitor(store, 0, 2, termination, silence=0.2), []
    watch.last_act = lambda: acts.append(ended.is_set())
    try:
        with termination.critical_section():
            watch.start()
            assert watch._found.wait(30)
            assert not ended.wait(1.0) and acts == []
        assert ended.wait(30) and acts == [False]
    finally:
        watch.close()


# they train as one does


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of one process lies, once one test made it."""
    return tmp_path_factory.mktemp("one") / "run"


@pytest.fixture
def straight(place: Path, written: Callable[..., Path], train: Callable[..., str]) -> Path:
    """The run of two processes and five iterations without a stop."""
    found = place.with_name("straight")
    if not found.exists():
        train(written("straight", **FIVE, output=found), world=2)
    return found


@pytest.fixture
def one(place: Path, written: Callable[..., Path], train: Callable[..., str]) -> Path:
    """The run of one process."""
    if not place.exists():
        train(written("one", output=place))
    return place


LAUNCHERS = {
    "torch.distributed.run": ["--nproc_per_node", "2", "--master_port"],
    "accelerate.commands.launch": ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port"],
}


def test_two_processes_train_as_one(
    one: Path, written: Callable[..., Path], train: Callable[..., str],
    read_log: Callable[..., list[dict[str, Any]]], tmp_path: Path,
) -> None:  # fmt: skip
    said = train(written("two"), world=2)
    check_two(one, tmp_path / "two", said, read_log)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_of_a_launcher_train_as_one(
    one: Path, written: Callable[..., Path], read_log: Callable[..., list[dict[str, Any]]], tmp_path: Path,
    launcher: str,
) -> None:  # fmt: skip
    command = [sys.executable, "-m", launcher, *LAUNCHERS[launcher], str(free_port()), "-m", "customized_grpo", "train"]
    done = subprocess.run(
        [*command, "--config", str(written("two"))], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_two(one, tmp_path / "two", done.stdout, read_log)


def check_two(one: Path, two: Path, said: str, rows: Callable[..., list[dict[str, Any]]]) -> None:
    """A run of two processes said so once, left its files, and is that of one process."""
    assert "2 processes share 3 groups an iteration" in said and said.count("iteration 3/3") == 1
    same(one, two, rows)
    for name in ("galleries/000003.png", "report.html", "weights.json"):
        assert (two / name).is_file()


def test_resumed_in_two_processes_and_in_one_again(
    one: Path, written: Callable[..., Path], train: Callable[..., str],
    read_log: Callable[..., list[dict[str, Any]]], tmp_path: Path,
) -> None:  # fmt: skip
    train(written("parts", iterations=1))
    train(written("parts", iterations=2), "--resume", world=2)
    train(written("parts"), "--resume")
    same(one, tmp_path / "parts", read_log)


@pytest.mark.slow
def test_a_tiny_flux_in_two_processes_is_as_in_one(
    train: Callable[..., str], read_log: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Three groups whose references differ in size, and so in what goes through the transformer at once."""
    samples = []
    for number, size in enumerate([(64, 64), (96, 64), (64, 96)]):
        draw = torch.Generator().manual_seed(number)
        save_image(torch.rand(3, *size, generator=draw), tmp_path / "data" / f"{number}.png")
        samples.append(Sample(f"s{number}", f"a toy, number {number}", (Path(f"{number}.png"),)))
    write_metadata(tmp_path / "data", samples)
    (tmp_path / "mine.py").write_text(
        "def prompt(images, task):\n    return images[:, :, 0, :8, :8].mean((-2, -1))\n"
        "def identity(images, task):\n    return images[:, :, 1, -8:, -8:].mean((-2, -1))\n"
    )
    settings: dict[str, Any] = {
        "iterations": 2, "threads": 1, "data": {"path": str(tmp_path / "data")},
        "policy": {
            "kind": "flux1-kontext", "lora_rank": 4, "device": "cpu", "precision": "fp32",
            "pipeline": {
                "model": str(save_tiny("flux1-kontext", tmp_path / "model")), "height": 64, "width": 64,
                "reference_side": 64, "cache": str(tmp_path / "cache"),
            },
        },
        "rewards": named({"prompt": "python:mine.prompt", "identity": "python:mine.identity"}),
        # Images of their own noise: rewards that all but agree would turn rounding into advantages.
        "rollout": {
            "prompts_per_iteration": 3, "group_size": 3, "num_steps": 3, "micro_batch": 3, "same_initial_noise": False,
        },
        "optimizer": {"micro_batch": 3, "learning_rate": 2e-5},
        "evaluation": {"every": 1, "num_samples": 3, "gallery": 1},
        "distributed": {"check_weights_every": 1}, "ema": {"decay": 0.9},
    }  # fmt: skip
    for name, count in (("flux-one", 1), ("flux-two", 2)):
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings | {"output": str(tmp_path / name)}))
        train(config, world=count)
    same(tmp_path / "flux-one", tmp_path / "flux-two", read_log, "pytorch_lora_weights.safetensors")


def test_a_benchmark_is_shared_out_and_each_picture_is_drawn_once(
    ranks: Callable[..., list[Process]], toybox_data: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    shared = [
        "-m", "customized_grpo", "evaluate", "--benchmark", "folder", "--data", toybox_data / "test", "--num-steps", 3,
        "--micro-batch", 1,
    ]  # fmt: skip
    shared += ["--policy.toybox.weights", tiny_weights, "--policy.precision", "fp32"]
    found = []
    for count in (1, 2):
        output = tmp_path / f"benchmark-{count}"
        processes = ranks(*shared, "--output", output, world=count)
        said = [process.communicate() for process in processes]
        assert [process.wait() for process in processes] == [0] * count, said
        assert "".join(out for out, _ in said).count("benchmark: ") == 1
        found.append(json.loads((output / "benchmark.json").read_text()))
    alone, shared_out = ([record["metrics"] for record in each["records"]] for each in found)
    assert len(shared_out) == 4 and shared_out == [pytest.approx(record, abs=1e-4) for record in alone]


def test_more_processes_than_groups_are_refused(
    written: Callable[..., Path], ranks: Callable[..., list[Process]]
) -> None:
    config = written("many", **{"rollout.prompts_per_iteration": 1})
    processes = ranks("-m", "customized_grpo", "train", "--config", config)
    errors = "".join(process.communicate()[1] for process in processes)
    assert processes[0].wait() == 2 and processes[1].wait() != 0 and errors.count("error:") == 1
    assert "rollout.prompts_per_iteration: 1 groups cannot be shared among 2 processes" in errors


@pytest.mark.slow
def test_a_refusal_is_the_launchers_status_and_said_once(
    written: Callable[..., Path], command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    config = written("many", **{"rollout.prompts_per_iteration": 1})
    done = command("train", "--config", config, "--num-processes", 2)
    assert done.returncode == 2 and done.stderr.count("error:") == 1
    assert "rollout.prompts_per_iteration: 1 groups cannot be shared among 2 processes" in done.stderr


def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_launched(1) and not is_launched(2)
    with pytest.raises(UserError, match="--num_processes: 0 processes cannot be started"):
        is_launched(0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_launched(1) and is_launched(2)
    with pytest.raises(UserError, match="3 are asked for within 2 that were launched"):
        is_launched(3)


# one of them is lost


@contextmanager
def running(config: Path, log: Path, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A run of two processes that the command launched and that has begun; whatever is left of it is killed."""
    command = [sys.executable, "-m", "customized_grpo", "train", "--config", str(config), "--num_processes", "2"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *options], stdout=out, stderr=out, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        wait_for(lambda: "iteration 1/" in log.read_text(), process, log)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes] | Process", log: Path) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def children(process: "subprocess.Popen[bytes]") -> Sequence[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("number", "lost"),
    [(signal.SIGKILL, 1), (signal.SIGSTOP, 0), pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow)],
)
def test_the_others_stop_with_the_name_of_the_lost(
    written: Callable[..., Path], ranks: Callable[..., list[Process]], tmp_path: Path, number: signal.Signals, lost: int
) -> None:
    config, log = (
        written("lost", **{"iterations": 500, "distributed.heartbeat_timeout": 2.1}),
        tmp_path / "lost" / "metrics.jsonl",
    )
    processes = ranks("-c", QUICK, "train", "--config", config)
    wait_for(lambda: log.is_file() and log.read_bytes().count(b"\n") > 0, processes[0], log)
    os.kill(processes[lost].pid, number)
    other = processes[1 - lost]
    assert other.wait(timeout=120) == 1
    text = other.written()[1]
    assert f"process {1 - lost} of 2 stops: process {lost} (host " in text
    assert f"process {processes[lost].pid}) is gone" in text and "Traceback" not in text


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the processes")
@pytest.mark.slow
@pytest.mark.parametrize(("number", "lost"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)])
def test_the_launched_stop_with_the_name_of_the_lost(
    written: Callable[..., Path], tmp_path: Path, number: signal.Signals, lost: int
) -> None:
    config, log = written("lost", **{"iterations": 500, "distributed.heartbeat_timeout": 5.0}), tmp_path / "log"
    with running(config, log) as process:
        victim = children(process)[lost]
        os.kill(victim, number)
        assert process.wait(timeout=120) == 1
    text = log.read_text()
    assert f"process {1 - lost} of 2 stops: process {lost} (host " in text and f"process {victim}) is gone" in text
    assert f"process {lost} of 2 was ended by SIGKILL" in text and "Traceback" not in text


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the processes")
def test_sigterm_to_processes_that_do_not_listen_yet(written: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "customized_grpo", "train", "--config", str(written("early"))]
    with subprocess.Popen([*command, "--num_processes", "2"], env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        while not children(process):
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=60) == 143


QUICK = """
from customized_grpo.cli.main import main
from customized_grpo.distributed import heartbeat

heartbeat.HEARTBEAT_INTERVAL, heartbeat.GRACE = 0.2, 1.0
main()
"""
"""Does as the command does, with shorter waits."""
COME_APART = """
import sys
import torch
from customized_grpo.cli.main import main
from customized_grpo.training.trainer import Trainer

step = Trainer.train_step

def flipped(self, *arguments):
    metrics = step(self, *arguments)
    if self.ranks.rank == 1 and self.iteration == 1:
        with torch.no_grad():
            next(iter(self.policy.trainable_parameters()))[1].view(torch.int32)[0, 0] ^= 1
    return metrics

Trainer.train_step = flipped
main()
"""
"""Trains as the command does; after the first iteration one bit of a weight of the second process is another."""


def test_weights_that_came_apart_are_found(
    written: Callable[..., Path], ranks: Callable[..., list[Process]], tmp_path: Path
) -> None:
    """When they are compared next, every two iterations, and before anything is saved of them."""
    settings = {"iterations": 5, "checkpoint.every": 100, "distributed.check_weights_every": 2, "ema.decay": None}
    processes = ranks("-c", COME_APART, "train", "--config", written("apart", **settings))
    told = [process.communicate()[1] for process in processes]
    assert [process.wait() for process in processes] == [1, 1], told
    assert "the weights of process 1 are not those of process 0; after iteration 2" in told[0]
    assert not list((tmp_path / "apart").glob("checkpoints/*"))


@pytest.mark.parametrize("to_all", [pytest.param(True, marks=pytest.mark.slow), False])
def test_sigterm_leaves_a_checkpoint_and_the_run_goes_on_to_the_bit(
    straight: Path, written: Callable[..., Path], ranks: Callable[..., list[Process]], train: Callable[..., str],
    tmp_path: Path, to_all: bool, read_log: Callable[..., list[dict[str, Any]]],
) -> None:  # fmt: skip
    config, log = written("stopped", **FIVE), tmp_path / "stopped" / "metrics.jsonl"
    processes = ranks("-m", "customized_grpo", "train", "--config", config)
    wait_for(lambda: log.is_file() and log.read_bytes().count(b"\n") > 0, processes[0], log)
    for process in processes if to_all else processes[1:]:
        process.terminate()
    assert [process.wait(timeout=120) for process in processes] == [143, 143]
    assert "stopped by SIGTERM after iteration" in processes[0].written()[0]
    check_stopped(config, straight, train, read_log)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the processes")
@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False])
def test_sigterm_to_the_launcher_leaves_a_checkpoint_and_the_run_goes_on_to_the_bit(
    straight: Path, written: Callable[..., Path], train: Callable[..., str], tmp_path: Path, to_all: bool,
    read_log: Callable[..., list[dict[str, Any]]],
) -> None:  # fmt: skip
    config, log = written("stopped", **FIVE), tmp_path / "log"
    with running(config, log) as process:
        os.kill(process.pid if to_all else children(process)[1], signal.SIGTERM)
        assert process.wait(timeout=120) == 143, log.read_text()
    assert "stopped by SIGTERM after iteration" in log.read_text()
    check_stopped(config, straight, train, read_log)


def check_stopped(
    config: Path, straight: Path, train: Callable[..., str], rows: Callable[..., list[dict[str, Any]]]
) -> None:
    """A run that was stopped left one checkpoint, and goes on to the bit of the run without a stop."""
    stopped = config.with_suffix("")
    assert len(list((stopped / "checkpoints").iterdir())) == 1
    train(config, "--resume", world=2)
    for name in (ADAPTER, f"ema/{ADAPTER}"):
        assert (stopped / name).read_bytes() == (straight / name).read_bytes()
    assert rows(stopped / "metrics.jsonl") == rows(straight / "metrics.jsonl")


PROGRAM = """
import os, signal, sys
from customized_grpo.cli.main import main
from customized_grpo.training.trainer import Trainer

place, calls = sys.argv.pop(1), []
original = getattr(Trainer, place)

def struck(self, *arguments, **settings):
    calls.append(1)
    if self.ranks.rank == 1 and self.iteration == 2 and len(calls) % 2 == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *arguments, **settings)

setattr(Trainer, place, struck)
main()
"""
"""Trains as the command does; the second process sends itself SIGTERM in the third iteration, at a call of `place`."""


@pytest.mark.parametrize("where", [pytest.param("_backward", marks=pytest.mark.slow), "_optimizer_step"])
def test_sigterm_in_an_update_tears_none(
    straight: Path, written: Callable[..., Path], ranks: Callable[..., list[Process]], train: Callable[..., str],
    tmp_path: Path, where: str,
) -> None:  # fmt: skip
    """Before the weights change and between the two updates: the iteration is given up at once."""
    config = written("torn", **FIVE)
    processes = ranks("-c", PROGRAM, where, "train", "--config", config)
    assert [process.wait(timeout=240) for process in processes] == [143, 143]
    assert [path.name for path in (tmp_path / "torn" / "checkpoints").iterdir()] == ["000002"]
    train(config, "--resume", world=2)
    assert (tmp_path / "torn" / ADAPTER).read_bytes() == (straight / ADAPTER).read_bytes()


# two machines


@contextmanager
def machines() -> Iterator[Sequence[tuple[str, str]]]:
    """Two hosts on one machine: network namespaces with an address each, joined by a cable. Skips where it is not
    allowed."""
    names = [f"grpo{os.getpid()}{end}" for end in "ab"]
    hosts = [(name, f"10.77.{os.getpid() % 250}.{number + 1}") for number, name in enumerate(names)]
    commands = [["ip", "netns", "add", name] for name in names]
    commands += [["ip", "link", "add", names[0][-15:], "type", "veth", "peer", "name", names[1][-15:]]]
    for name, address in hosts:
        inside, link = ["ip", "netns", "exec", name, "ip"], name[-15:]
        commands += [["ip", "link", "set", link, "netns", name], [*inside, "addr", "add", f"{address}/24", "dev", link]]
        commands += [[*inside, "link", "set", link, "up"], [*inside, "link", "set", "lo", "up"]]
    try:
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                pytest.skip(f"network namespaces cannot be made here: {error}")
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {' '.join(command)}: {done.stderr.strip()}")
        yield hosts
    finally:
        for name in names:
            try:
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            except OSError:
                break


@pytest.mark.slow
def test_two_machines(
    one: Path, written: Callable[..., Path], read_log: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    config = written("machines")
    with machines() as hosts:
        processes = []
        for rank, (name, _) in enumerate(hosts):
            # What torchrun says on either: one process here, two in all.
            own = os.environ | environment(rank, 2, 29611, hosts[0][1]) | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            own |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | {"GLOO_SOCKET_IFNAME": name[-15:]}
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "customized_grpo", "train", "--config"]
            processes.append(
                subprocess.Popen([*command, str(config)], env=own, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
            )
        told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    same(one, tmp_path / "machines", read_log)
