"""Rank and world size of this process, as launchers put them into the environment."""

import os
from collections.abc import Sequence

from customized_grpo.errors import UserError

_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
"""Where torchrun and its like, Open MPI and Slurm write which process of its machine one is. In this order: what Open
MPI starts within Slurm inherits Slurm's."""
_LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


def world_size() -> int:
    """How many processes were launched together. Raises `UserError` where what launched them says no number."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) < 1:
        raise UserError(f"WORLD_SIZE: the environment variable is {said!r}, expected a number of processes; unset it")
    return int(said)


def local_world() -> int:
    """How many processes of this run are on this machine, by what launched them; 1 where that does not say."""
    return int(_told(_LOCAL_WORLD) or 1)


def local_rank() -> int:
    """Which of them this process is."""
    return int(_told(_LOCAL_RANK) or 0)


def processes_here() -> int:
    """How many there are at least: where nothing says how many, those before this one are known."""
    return max(local_world(), local_rank() + 1)


def _told(names: Sequence[str]) -> str | None:
    """What the first of these variables says that is set; a process that runs alone is told nothing."""
    if world_size() == 1:
        return None
    return next((os.environ[name] for name in names if name in os.environ), None)
