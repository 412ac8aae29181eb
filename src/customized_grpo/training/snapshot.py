"""A copy of the training state on the host: whatever ends a run, its last whole iteration can be saved."""

import threading

import torch
from torch import Tensor

from customized_grpo.training.checkpoint import State

CHUNK = 1 << 28
"""Bytes of pinned memory that are allocated at once. A power of two: torch rounds up to the next one."""


class Snapshot:
    """A copy of a `State` after its last whole iteration; checkpoints are written from it.

    On a GPU the copy goes into pinned memory on a stream of its own, beside the work of the device. The state must not
    change until `wait` returns.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._copies: dict[str, Tensor] = {}
        self._free: dict[torch.dtype, Tensor] = {}
        self._copied: torch.cuda.Event | None = None
        self.lock = threading.Lock()
        """Held while a copy is made; hold it to read one from another thread."""
        self.iteration: int | None = None
        """Iterations done at the time of the copy; None before the first `take`, and while one is made."""

    @torch.no_grad()
    def take(self, iteration: int) -> None:
        """Copy the state after `iteration`. On a GPU, return before the copy is complete."""
        with self.lock:
            self._take(iteration)

    def _take(self, iteration: int) -> None:
        self.wait()
        found = self._state.tensors()
        # All memory first: an allocation that fails leaves the former copy whole.
        copies = {
            name: self._copies[name] if name in self._copies else self._empty_like(tensor)
            for name, tensor in found.items()
        }
        self.iteration = None  # a copy that fails half way is none
        device = next((tensor.device for tensor in found.values() if tensor.is_cuda), None)
        stream = None if device is None else torch.cuda.Stream(device)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for name, tensor in found.items():
                copies[name].copy_(tensor, non_blocking=tensor.is_cuda)
        if stream is not None:
            self._copied = stream.record_event()
        self._copies, self.iteration = copies, iteration

    def wait(self) -> None:
        """Wait until the copy is complete; from then on the state may change."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def poll(self) -> None:
        """Note a copy that is complete, without waiting: it then outlives an error of the device."""
        if self._copied is not None and self._copied.query():
            self._copied = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the copies by name, as `State.tensors` names them."""
        self.wait()
        return self._copies

    def _empty_like(self, tensor: Tensor) -> Tensor:
        return self._pinned(tensor) if tensor.is_cuda else torch.empty_like(tensor, device="cpu")

    def _pinned(self, like: Tensor) -> Tensor:
        """Allocate pinned memory for a tensor, as a part of a chunk."""
        free = self._free.get(like.dtype)
        if free is None or len(free) < like.numel():
            size = max(CHUNK // like.itemsize, like.numel())
            free = torch.empty(size, dtype=like.dtype, pin_memory=True)
        own, self._free[like.dtype] = free[: like.numel()], free[like.numel() :]
        return own.view(like.shape)
