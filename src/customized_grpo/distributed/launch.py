"""`--num_processes N`: the same command in N processes of this machine, ended together.

`torchrun` and `accelerate launch` do the same for one machine or several; what this adds are the words, and the status
of the run itself.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from customized_grpo.distributed.env import world_size
from customized_grpo.distributed.termination import SIGNALS
from customized_grpo.errors import UserError

PATIENCE = 60.0
"""Seconds that the others have to end by themselves when one has failed: `distributed.heartbeat_timeout` until they
find out, and some to end. One that saves has all the time it needs."""
MARKER = "CUSTOMIZED_GRPO_SAVING"
"""Environment variable with the path of a file that is there while a process saves."""


def is_launched(count: int) -> bool:
    """Return whether this process is one of `count` already. Raises `UserError` if it belongs to another number."""
    world = world_size()
    if count < 1:
        raise UserError(f"--num_processes: {count} processes cannot be started; give 1 or more")
    if world > 1 and count not in (1, world):
        raise UserError(f"--num_processes: {count} are asked for within {world} that were launched; leave it out")
    return count == 1 or world > 1


@contextmanager
def saving() -> Iterator[None]:
    """Keep the launcher, if there is one, from killing this process: it writes a checkpoint."""
    marker = os.environ.get(MARKER)
    if marker is None:
        yield
        return
    from customized_grpo.io.files import StorageError, writing  # it loads torch, which the launcher does without

    with suppress(StorageError), writing(Path(marker).parent):  # a save must not fail for want of a mark
        Path(marker).touch()
    try:
        yield
    finally:
        with suppress(OSError):
            Path(marker).unlink(missing_ok=True)


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `customized-grpo` with `arguments` in `count` processes; returns the status of the run.

    SIGTERM, SIGINT and SIGHUP go to all of them. When one fails the others stop by themselves, or after a while by
    force, but never while one saves.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _launch(arguments, count, Path(folder) / "saving")


def _launch(arguments: Sequence[str], count: int, marker: Path) -> int:
    command = [sys.executable, "-m", "customized_grpo", *arguments]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    # What torch says of a lost connection is long, and says less than we do.
    quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"), MARKER: str(marker)}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with _forwarding(processes) as forward:
            for rank in range(count):
                own = shared | {"RANK": rank, "LOCAL_RANK": rank}
                environment = os.environ | quiet | {name: str(value) for name, value in own.items()}
                processes.append(subprocess.Popen(command, env=environment))
            if forward.number is not None:
                forward(forward.number)  # to those that came after it
            _wait(processes, marker)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    statuses = [process.wait() for process in processes]
    if forward.number is not None:
        # Those that were not yet listening end by the signal itself.
        statuses = [128 - status if status == -forward.number else status for status in statuses]
    for rank, status in enumerate(statuses):
        if status < 0:
            name = signal.Signals(-status).name
            print(f"customized-grpo: process {rank} of {count} was ended by {name}", file=sys.stderr)
    # The first tells what happened; a signal's number is not a status.
    return next((status if status > 0 else 1 for status in statuses if status), 0)


def _wait(processes: Sequence["subprocess.Popen[bytes]"], marker: Path) -> None:
    failed: float | None = None
    while any(process.poll() is None for process in processes):
        if failed is None and any(process.poll() for process in processes):
            failed = time.monotonic()
        if failed is not None and time.monotonic() - failed > PATIENCE and not marker.exists():
            return
        time.sleep(0.1)


class _Forward:
    """Sends a signal on to the processes."""

    def __init__(self, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        self._processes = processes
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        self.number = number
        for process in self._processes:
            process.send_signal(number)


@contextmanager
def _forwarding(processes: Sequence["subprocess.Popen[bytes]"]) -> Iterator[_Forward]:
    """Send the signals that end a run on to the processes. A terminal sends Ctrl-C to them itself: the second one that
    they hear changes nothing."""
    forward = _Forward(processes)
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        yield forward
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
