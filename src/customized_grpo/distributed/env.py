"""Rank and world size of this process, as launchers put them into the environment."""

import os
from collections.abc import Sequence

from customized_grpo.errors import UserError

_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
"""Where torchrun and its like, Open MPI and Slurm write which process of its machine one is. In this order: what Open
MPI starts within Slurm inherits Slurm's."""
_LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


def world_size() -> int:
    """Return the number of processes launched together. Raises `UserError` if the launcher's number is not one."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) < 1:
        raise UserError(f"WORLD_SIZE: the environment variable is {said!r}, expected a number of processes; unset it")
    return int(said)


def local_world() -> int:
    """Return how many processes of this run are on this machine; 1 if the launcher does not say."""
    return int(_told(_LOCAL_WORLD) or 1)


def local_rank() -> int:
    """Return the rank of this process on its machine."""
    return int(_told(_LOCAL_RANK) or 0)


def processes_here() -> int:
    """Return at least how many processes run on this machine; without a launcher's number, the ranks before this one
    count."""
    return max(local_world(), local_rank() + 1)


def _told(names: Sequence[str]) -> str | None:
    """Return the first of these environment variables that is set; None in a single-process run."""
    if world_size() == 1:
        return None
    return next((os.environ[name] for name in names if name in os.environ), None)
