"""The frozen weights of a transformer, spread over the processes of a run (FSDP2)."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


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
    blocks = [module for module in transformer.modules() if type(module).__name__ in transformer._repeated_blocks]
    # It warns of views that something may be written into. Nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    for part in (*blocks, transformer):
        # What of it is not sharded yet comes to the device whole, and all but this process's rows is let go: the device
        # never holds more than its share and one block, or what is outside of blocks.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
