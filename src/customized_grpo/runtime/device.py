"""Settings of the process: threads and the allocator."""

import ctypes
import os
import sys
from typing import Literal

import torch

from customized_grpo.distributed.env import _LOCAL_RANK, _told, local_rank, local_world, processes_here, world_size
from customized_grpo.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP = 1 << 30


CPU = torch.device("cpu")


def resolve_device(name: str, prefix: str = "policy.") -> torch.device:
    """Return the device named, or for "auto" CUDA's, the CPU without one.

    In a run of several processes "cuda" is this one's own GPU. Raises `UserError` where it is none, or not here;
    `prefix` and "device" make the name of the field.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1 and torch.cuda.is_available():
        name = f"cuda:{_own_gpu(prefix)}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{prefix}device: '{name}' is no device; give cpu, cuda, cuda:1 or mps") from error
    if not _is_here(device):
        raise UserError(f"{prefix}device: there is no '{name}' here; leave it out, or use cpu")
    return device


def _is_here(device: torch.device) -> bool:
    """Return whether torch can put tensors on `device`, of whatever make."""
    if device.type == "cpu":
        return True
    module = getattr(torch, device.type, None)  # as torch.cuda
    return module is not None and module.is_available() and (device.index or 0) < module.device_count()


def _own_gpu(prefix: str) -> int:
    """Return the index of this process's GPU. Two processes on one GPU would fail only when NCCL first connects
    them."""
    gpus, processes = torch.cuda.device_count(), processes_here()
    if gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0  # what launched the process shows it its own alone
    if gpus > 1 and _told(_LOCAL_RANK) is None:
        raise UserError(
            f"{prefix}device: this is one of {world_size()} processes, and nothing tells which of {gpus} GPUs is its "
            "own; set LOCAL_RANK, from 0 on each machine, or start by --num_processes or torchrun"
        )
    if processes > gpus:
        raise UserError(
            f"{prefix}device: {processes} processes of this machine want a GPU each, and see {gpus}; start at most so "
            "many"
        )
    return local_rank()


def resolve_precision(
    precision: Literal["auto", "fp32", "bf16"], device: torch.device = CPU
) -> Literal["fp32", "bf16"]:
    """Return `precision`, or for "auto" bf16 where `device` multiplies it natively: emulated, it is 20 times slower."""
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


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of memory that a GPU has, in use or not; None of what is no GPU, or shares the host's."""
    return torch.accelerator.get_memory_info(device)[1] if device.type in ("cuda", "xpu") else None


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes of a GPU that tensors held since the last call; None of what is no GPU."""
    if device.type not in ("cuda", "xpu"):
        return None
    peak = torch.accelerator.max_memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    return peak


def configure(threads: int | None) -> None:
    """Use `threads` CPU threads; if None all cores, shared among the processes of a run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(1, (cores or 1) // local_world()))


def keep_freed_memory() -> None:
    """Keep up to a gigabyte of freed memory in the process. For ToyBox alone.

    glibc returns large blocks to the system when they are freed, so every tensor of a small model is paged in again,
    which takes as long as its arithmetic. A large model would hold back gigabytes of host memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP)
        mallopt(_M_TRIM_THRESHOLD, _KEEP)
