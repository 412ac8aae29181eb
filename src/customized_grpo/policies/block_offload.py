"""Frozen blocks that wait on the host: the weights of a block come to the device shortly before it runs, and go after.

The device then holds the weights of two blocks instead of all. LoRA factors, their gradients and moments stay there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class BlockOffload:
    """Brings the frozen weights of a transformer's repeated blocks to the device, one block ahead of its use.

    A block's weights are put in its place as new parameters while it runs, so autograd keeps those that a backward pass
    needs until that pass is done; with gradient checkpointing, these are the weights of the block being recomputed. In
    a backward pass blocks run from last to first, and the one ahead is the one before.
    """

    def __init__(self, transformer: Any, trainable: Iterable[nn.Parameter], device: torch.device) -> None:
        """Leave the weights of the blocks of `transformer`, which is on the CPU, there, and hook the blocks.

        The `trainable` ones, and what is outside of blocks, move to `device`.
        """
        kept, blocks = set(trainable), repeated_blocks(transformer)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks = [_Block(module, device, _take_out(module, kept, device), stream) for module in blocks]
        self._last = -1
        transformer.to(device)  # all but the blocks' weights, which these have taken out
        for number, block in enumerate(self._blocks):
            block.put_host()
            block.module.register_forward_pre_hook(partial(self._before, number))
            block.module.register_forward_hook(partial(self._after, number), always_call=True)

    def _before(self, number: int, module: nn.Module, args: Any) -> None:
        ahead = self._ahead(number)
        self._last = number
        for other, block in enumerate(self._blocks):
            if other not in (number, ahead):
                block.drop()
        self._blocks[number].put_device()
        self._blocks[ahead].fetch()

    def _after(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        self._blocks[number].put_host()

    def _ahead(self, number: int) -> int:
        """Return the block that is likely to run after block `number`, by the direction from the block before."""
        new_pass = number == 0  # forwards; a backward pass ends there, and has no block ahead
        backwards = number <= self._last and not new_pass
        return number - 1 if backwards else (number + 1) % len(self._blocks)


def repeated_blocks(transformer: Any) -> list[nn.Module]:
    """Return the blocks of a diffusers transformer that are alike, in the order in which they run."""
    return [module for module in transformer.modules() if type(module).__name__ in transformer._repeated_blocks]


@dataclass
class _Slot:
    """A frozen parameter or buffer `name` of a `module`: where it waits, and its copy on the device while it has one.

    `held`: the module's own dictionary of it.
    """

    held: dict[str, Any]
    name: str
    host: Tensor
    copy: Tensor | None = None


@dataclass
class _Block:
    """A block, and its frozen weights on the host."""

    module: nn.Module
    device: torch.device
    slots: list[_Slot]
    stream: Any
    """On CUDA, of all blocks: copies run on it beside the computation. Memory is taken and given back on the computing
    stream, so a copy waits for what used its memory before, and the device never holds more than is in use."""
    ready: Any = None
    """On CUDA: when the copies are there."""

    def fetch(self) -> None:
        """Begin to copy the weights to the device, unless they are there."""
        if not self.slots or self.slots[0].copy is not None:
            return
        with torch.no_grad():
            copies = [self._begin(slot.host) for slot in self.slots]
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self.stream):
                    for slot, copy in zip(self.slots, copies, strict=True):
                        if _is_plain(slot.host):
                            copy.copy_(slot.host, non_blocking=True)
                    self.ready = self.stream.record_event()
        for slot, copy in zip(self.slots, copies, strict=True):
            slot.copy = _like(slot.host, copy)

    def _begin(self, host: Tensor) -> Tensor:
        """Return room for `host` on the device where a stream fills it, else a copy."""
        empty = self.stream is not None and _is_plain(host)
        return torch.empty_like(host, device=self.device) if empty else host.to(self.device)

    def put_device(self) -> None:
        """Put the copies on the device in the module's place."""
        self.fetch()
        self._wait()
        for slot in self.slots:
            slot.held[slot.name] = slot.copy

    def put_host(self) -> None:
        """Put the weights on the host in the module's place; the copies stay until `drop`."""
        for slot in self.slots:
            slot.held[slot.name] = slot.host

    def drop(self) -> None:
        """Let the copies on the device go, but for what autograd keeps of them."""
        self._wait()
        for slot in self.slots:
            slot.copy = None

    def _wait(self) -> None:
        """Let the device's computation wait for the copies."""
        if self.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready)
            self.ready = None


def _take_out(block: nn.Module, kept: set[nn.Parameter], device: torch.device) -> list[_Slot]:
    """Take weights and buffers out of `block`, but for those `kept`, and return them in the host's memory."""
    slots = []
    for module in block.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor not in kept:
                    slots.append(_Slot(held, name, _pinned(tensor) if device.type == "cuda" else tensor))
                    held[name] = None
    return slots


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _pinned(tensor: Tensor) -> Tensor:
    """Return `tensor` in memory that a device copies from while it computes; a quantized one is returned as given."""
    return _like(tensor, tensor.data.pin_memory()) if _is_plain(tensor) else tensor


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor.data) is Tensor
