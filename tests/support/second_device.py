"""A second device for tests, which torch calls `hpu`: what would fail on a GPU fails on it, and what waits is counted.

Its tensors meet none of the CPU's, as CUDA's do not. Its arithmetic is the CPU's, so results are the CPU's. It is
compiled once, from `second_device.cpp`, into `build/` of the checkout. The name is one that torch treats as it does
`cuda` (a parameter moved there stays the same object, which it does not on the device that torch keeps for extensions),
and of which its usual builds have no code of their own.

torch looks for devices once in a process, so tests of the device run by themselves: `make test-device`.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.backend_registration import _DummyBackendModule

NAME = "hpu"
MODULE = "second_device_native"
SOURCE = Path(__file__).with_suffix(".cpp")
BUILD = Path(__file__).parents[2] / "build" / "second_device"
COMPILER = shutil.which("c++")
HEADERS = Path(sysconfig.get_path("include"))
CAN_BE = COMPILER is not None and (HEADERS / "Python.h").is_file()
ASKED_FOR = CAN_BE and "SECOND_DEVICE" in os.environ
NEEDS_DEVICE = [
    pytest.mark.skipif(not CAN_BE, reason="the second device takes a C++ compiler and the headers of Python"),
    pytest.mark.skipif(not ASKED_FOR, reason="tests of the second device run by themselves: make test-device"),
]
"""Marks of tests of the device."""


class _Module(_DummyBackendModule):
    """What `torch.cuda` is for CUDA."""

    def _lazy_init(self) -> None:
        pass

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def synchronize(self, device: object = None) -> None:
        pass


@cache
def second_device() -> ModuleType:
    """Add the device to this process, and return its native module: `live` and `peak` bytes, `reset_peak`, `listen`."""
    torch._register_device_module(NAME, _Module())
    spec = importlib.util.spec_from_file_location(MODULE, _compiled())
    assert spec is not None and spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    assert torch.accelerator.is_available(), "torch looked for devices before: run these tests by themselves"
    return native


def _compiled() -> Path:
    """Return the library, built where no process did it before."""
    digest = hashlib.sha256(
        SOURCE.read_bytes() + f"{torch.__version__} {sysconfig.get_config_var('SOABI')}".encode()
    ).hexdigest()[:12]
    library = BUILD / digest / f"{MODULE}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            torch_folder = Path(torch.__file__).parent
            include = torch_folder / "include"
            unfinished = library.with_suffix(".unfinished")
            subprocess.run(
                [
                    str(COMPILER), "-O1", "-w", "-shared", "-fPIC", "-std=c++20", f"-I{HEADERS}", f"-I{include}",
                    f"-I{include / 'torch/csrc/api/include'}", str(SOURCE), "-o", str(unfinished),
                    f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu",
                ],
                check=True,
            )  # fmt: skip
            unfinished.rename(library)
    return library


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count what happens within, by "event file:line": a "wait" where the host needs a result, an "upload" where it
    hands data over. The line is the package's own that came to it."""
    events: Counter[str] = Counter()

    def hear(event: str, what: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if "/customized_grpo/" in frame.filename]
        line = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else what
        events[f"{event} {line}"] += 1

    native = second_device()
    native.listen(hear)
    try:
        yield events
    finally:
        native.listen(None)
