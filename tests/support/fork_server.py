"""Processes that start in a moment: each is forked from one that has loaded torch and the package.

Loading them takes seconds of a core, and the tests start many processes. What is forked is a process like any other,
with a number, signals, an environment and files of its own. Tests of what loading itself does start Python instead.

Run as a program, this file is the process that is forked. It reads a JSON object a line and answers one.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

LOADED = (
    "torch.distributed", "customized_grpo.cli.main", "customized_grpo.cli.options", "customized_grpo.training.run",
    "customized_grpo.toybox.policy", "customized_grpo.toybox.rewards", "customized_grpo.toybox.export",
    "customized_grpo.generation", "customized_grpo.report", "customized_grpo.diagnosis.command",
    "customized_grpo.benchmark.command", "customized_grpo.compare.command", "customized_grpo.rewards.server",
)  # fmt: skip
POLL = 0.01
"""Seconds between two questions whether a process has ended."""


class Process:
    """A forked process, with the members of `subprocess.Popen` that tests use."""

    def __init__(self, server: "ForkServer", pid: int, arguments: list[str], out: Path, err: Path) -> None:
        self.pid, self.args, self.returncode = pid, arguments, None
        self._server, self._out, self._err = server, out, err

    returncode: int | None

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.wait()

    def poll(self) -> int | None:
        """Return the status, negative for a signal, or None while the process runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"ended": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Return the status once the process has ended. Raise `TimeoutExpired`, with what it wrote, after `timeout`."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout, *self.written())
            time.sleep(POLL)
        return status

    def written(self) -> tuple[str, str]:
        """Return what the process wrote so far: its output and its errors."""
        return self._out.read_text(), self._err.read_text()

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end, and return what the process wrote."""
        self.wait(timeout)
        return self.written()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill_group(self) -> None:
        """Kill the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


class ForkServer:
    """The process to fork, and the conversation with it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )  # fmt: skip

    def ask(self, question: dict[str, Any]) -> Any:
        """Return the answer to one question."""
        assert self._server.stdin is not None and self._server.stdout is not None
        with self._lock:
            self._server.stdin.write(json.dumps(question) + "\n")
            self._server.stdin.flush()
            return json.loads(self._server.stdout.readline())

    def start(self, *arguments: object, cwd: Path, env: Mapping[str, str] | None = None) -> Process:
        """Start what `python` with these arguments would: `-m MODULE ...`, `-c CODE ...` or a script and its own."""
        words = list(map(str, arguments))
        place = Path(tempfile.mkdtemp(dir=self._folder))
        out, err = place / "out", place / "err"
        environment = dict(os.environ if env is None else env)
        environment.setdefault("OMP_NUM_THREADS", "1")
        question = {"run": words, "env": environment, "cwd": str(cwd), "out": str(out), "err": str(err)}
        return Process(self, self.ask(question), words, out, err)

    def close(self) -> None:
        """End the process that is forked."""
        self._server.communicate()


@contextlib.contextmanager
def fork_server() -> Iterator[ForkServer]:
    """Hold a process that can be forked."""
    with tempfile.TemporaryDirectory() as folder:
        server = ForkServer(Path(folder))
        try:
            yield server
        finally:
            server.close()


def serve() -> dict[str, Any] | None:
    """Answer questions until there are no more. Return the question in a process forked for it, None at the end."""
    with os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            question = json.loads(line)
            if "run" in question:
                for name in ("out", "err"):
                    Path(question[name]).touch()
                answer = os.fork()
                if answer == 0:
                    return question
            else:
                pid, status = os.waitpid(question["ended"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    return None


def become(question: dict[str, Any]) -> None:
    """Make this forked process the one that was asked for."""
    os.setsid()
    for number, (path, mode) in enumerate(((os.devnull, "r"), (question["out"], "w"), (question["err"], "w"))):
        with open(path, mode) as file:
            os.dup2(file.fileno(), number)
    os.chdir(question["cwd"])
    os.environ.clear()
    os.environ.update(question["env"])
    first, *rest = question["run"]
    if first == "-m":
        name, *rest = rest
        sys.argv, sys.path[0] = [name, *rest], question["cwd"]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *rest = rest
        sys.argv, sys.path[0] = ["-c", *rest], question["cwd"]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for module in LOADED:
        __import__(module)
    gc.freeze()
    if (asked := serve()) is not None:
        become(asked)
