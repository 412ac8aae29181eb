"""Settings of the process: threads and the allocator."""

import ctypes
import os
import sys
from typing import Literal

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP = 1 << 30


def resolve_precision(precision: Literal["auto", "fp32", "bf16"]) -> Literal["fp32", "bf16"]:
    """`precision`, or for "auto" bf16 where the processor multiplies it natively: emulated, it is 20 times slower."""
    if precision != "auto":
        return precision
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def configure(threads: int | None) -> None:
    """Use `threads` CPU threads (all cores if None), and keep freed memory in the process.

    glibc hands large blocks back to the system on every free, so the pages of each tensor are faulted in anew; on a
    small model that can take as long as the arithmetic.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or cores or 1)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _KEEP)
            mallopt(_M_TRIM_THRESHOLD, _KEEP)
