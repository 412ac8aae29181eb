"""Where the frozen weights of a pipeline lie: its encoders until prompts are encoded, then its transformer.

The transformer comes to the device when the encoders have had it: whole, spread over the processes of a run (FSDP2), or
without its blocks, which come as they run.
"""

import gc
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from customized_grpo.errors import UserError
from customized_grpo.policies.block_offload import BlockOffload, repeated_blocks
from customized_grpo.runtime.device import CPU

How = Literal["whole", "fsdp", "offload"]
"""How the transformer lies on the device: whole, spread over processes, or its blocks on the CPU while they wait."""


class Placement:
    """Moves the parts of a pipeline, which starts on the CPU, between the CPU and a device."""

    def __init__(
        self,
        pipe: Any,
        text_encoders: Sequence[str],
        trainable: Sequence[nn.Parameter],
        device: torch.device,
        *,
        how: How,
        keep_encoders: bool,
    ) -> None:
        """Freeze text encoders and VAE. `text_encoders`: names of parts of `pipe`. `trainable`: parameters that lie
        whole in every process. `keep_encoders`: on the CPU, after `release_encoders`."""
        self._pipe, self._names, self._trainable, self._device = pipe, text_encoders, trainable, device
        self._how, self._keep_encoders = how, keep_encoders
        self._placed = False
        for part in (*self._encoders(), pipe.vae):
            if part is not None:
                part.requires_grad_(False).eval()

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Hold text encoders and VAE on the device. Raises `UserError` if the encoders were freed."""
        self._move_encoders(self._device)
        self._pipe.vae.to(self._device)
        yield
        if self._placed and self._keep_encoders:
            self._move_encoders(CPU)

    def release_encoders(self) -> None:
        """Free the text encoders and the VAE's encoder, or move the former to the CPU, and bring the transformer."""
        if self._keep_encoders:
            self._move_encoders(CPU)
        else:
            self._pipe.register_modules(**dict.fromkeys(self._names))
            # Not None: a VAE that counts the layers of both its halves wants to find a module.
            self._pipe.vae.encoder = nn.Identity()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.bring_transformer()

    def bring_transformer(self) -> None:
        """Move transformer and VAE to the device, unless they are there."""
        if not self._placed:
            place(self._pipe.transformer, self._trainable, self._device, self._how)
            self._pipe.vae.to(self._device)
            self._placed = True

    def _encoders(self) -> list[Any]:
        return [getattr(self._pipe, name) for name in self._names]

    def _move_encoders(self, device: torch.device) -> None:
        encoders = self._encoders()
        if None in encoders:
            raise UserError(
                "policy.pipeline.cache: a prompt that was encoded before training is not there any more, and the "
                "encoders have gone; leave the folder alone while a run goes on, and go on with --resume"
            )
        for encoder in encoders:
            encoder.to(device)


def place(transformer: Any, trainable: Iterable[nn.Parameter], device: torch.device, how: How) -> None:
    """Move the weights of `transformer` from the CPU to `device`; `trainable` ones lie whole in every process."""
    if how == "fsdp":
        shard(transformer, trainable, device)
    elif how == "offload":
        BlockOffload(transformer, trainable, device)  # the blocks' hooks keep it
    else:
        transformer.to(device)


def shard(transformer: Any, kept: Iterable[nn.Parameter], device: torch.device) -> None:
    """Leave each process its share of the weights of `transformer`, which is on the CPU, on `device`; the parameters
    `kept` come there whole.

    A repeated block's weights are whole in a process only while it runs, and so are those outside of blocks while the
    transformer does.
    """
    world = dist.group.WORLD
    assert world is not None, "the processes are not connected"
    mesh = DeviceMesh.from_group(world, device.type)
    ignored = set(kept)
    for parameter in ignored:
        parameter.data = parameter.data.to(device)
    blocks = repeated_blocks(transformer)
    # It warns of views that something may be written into. Nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    for part in (*blocks, transformer):
        # What of it is not sharded yet comes to the device whole, and all but this process's rows is let go: the device
        # never holds more than its share and one block, or what is outside of blocks.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
