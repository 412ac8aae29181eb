"""Settings of the process: threads and the allocator."""

import ctypes
import os
import sys
from typing import Literal

import torch

from customized_grpo.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP = 1 << 30


CPU = torch.device("cpu")


def resolve_device(name: str, prefix: str = "policy.") -> torch.device:
    """The device named, or for "auto" the first CUDA device, the CPU without one. Raises `UserError` where it is none,
    or not here; `prefix` and "device" make the name of the field."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.device_count():
        # A device for each process; one that sees only its own takes that.
        name = f"cuda:{local_rank() % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{prefix}device: '{name}' is no device; give cpu, cuda, cuda:1 or mps") from error
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(device.type, False) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"{prefix}device: there is no '{name}' here; leave it out, or use cpu")
    return device


def resolve_precision(
    precision: Literal["auto", "fp32", "bf16"], device: torch.device = CPU
) -> Literal["fp32", "bf16"]:
    """`precision`, or for "auto" bf16 where `device` multiplies it natively: emulated, it is 20 times slower."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    native = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if native else "fp32"


def check_precision(precision: str, device: torch.device, prefix: str = "policy.") -> None:
    """Raise `UserError` where bf16 is asked of a processor that has to emulate it; `prefix` and "precision" make the
    name of the field."""
    if precision == "bf16" and resolve_precision("auto", device) != "bf16":
        raise UserError(
            f"{prefix}precision: bf16 is asked for, but the {device.type.upper()} here emulates it, some 20 times "
            f"slower; use auto or fp32, or {prefix}device=cuda on a machine that has it"
        )


def local_world() -> int:
    """How many processes of this run are on this machine, by what launched them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of them this process is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def configure(threads: int | None) -> None:
    """Use `threads` CPU threads (if None all cores, shared among the processes of a run), and keep freed memory in the
    process.

    glibc hands large blocks back to the system on every free, so the pages of each tensor are faulted in anew; on a
    small model that can take as long as the arithmetic.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(1, (cores or 1) // local_world()))
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _KEEP)
            mallopt(_M_TRIM_THRESHOLD, _KEEP)
