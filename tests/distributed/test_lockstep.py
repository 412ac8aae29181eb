"""A sharded transformer in one process; `tests/policies/test_shard.py` runs it in two."""

from unittest.mock import Mock

import pytest
import torch

from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.distributed.lockstep import LockstepForward
from customized_grpo.errors import UserError


def test_alone_nothing_runs_idly() -> None:
    idle = Mock()
    lockstep = LockstepForward(idle)
    with lockstep.phase(DistributedGroup()):
        assert lockstep.forward(3, lambda: torch.tensor(2.0)) == 2
    idle.assert_not_called()


def test_a_forward_outside_of_a_phase_is_a_mistake() -> None:
    lockstep = LockstepForward(Mock())
    with pytest.raises(AssertionError, match="within `lockstep`"):
        lockstep.forward(1, lambda: torch.zeros(()))
    with lockstep.phase(DistributedGroup()):
        pass
    with pytest.raises(AssertionError, match="within `lockstep`"):
        lockstep.forward(1, lambda: torch.zeros(()))


def test_a_failed_phase_can_be_followed_by_another() -> None:
    lockstep = LockstepForward(Mock())
    with pytest.raises(UserError, match="damaged"), lockstep.phase(DistributedGroup()):
        raise UserError("a file is damaged")
    with lockstep.phase(DistributedGroup()):
        assert lockstep.forward(1, lambda: torch.tensor(1.0)) == 1
