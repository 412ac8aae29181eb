"""The copy that checkpoints are written from."""

import pytest
import torch
from torch import nn

from customized_grpo.training.checkpoint import State
from customized_grpo.training.ema import EMA
from customized_grpo.training.snapshot import Snapshot


def trained() -> State:
    parameters = [("a", nn.Parameter(torch.ones(2, 3))), ("b", nn.Parameter(torch.ones(4)))]
    return State(parameters, torch.optim.AdamW([p for _, p in parameters], lr=0.1), EMA(parameters, 0.9))


def step(state: State) -> None:
    for _, parameter in state.parameters:
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    assert state.average is not None
    state.average.update(1)


def test_a_snapshot_stays_what_the_state_was() -> None:
    state = trained()
    snapshot = Snapshot(state)
    assert snapshot.iteration is None and snapshot.tensors() == {}
    for iteration in (0, 1, 2):
        snapshot.take(iteration)
        before = {name: tensor.clone() for name, tensor in state.tensors().items()}
        step(state)
        assert snapshot.iteration == iteration and snapshot.tensors().keys() == before.keys()
        assert all(torch.equal(snapshot.tensors()[name], tensor) for name, tensor in before.items())
        assert not torch.equal(snapshot.tensors()["parameter/a"], state.tensors()["parameter/a"])


def test_memory_that_runs_out_leaves_the_former_copy_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments come with the first step, and their memory is all there before anything is copied."""
    state = trained()
    snapshot = Snapshot(state)
    snapshot.take(0)
    before = {name: tensor.clone() for name, tensor in snapshot.tensors().items()}
    step(state)

    def full(tensor: torch.Tensor, **where: object) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(MemoryError):
        snapshot.take(1)
    assert snapshot.iteration == 0
    assert all(torch.equal(snapshot.tensors()[name], tensor) for name, tensor in before.items())


class Copy:
    """A copy under way on a device, as an event of CUDA tells of it."""

    def __init__(self) -> None:
        self.done = self.broken = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_copy_that_is_complete_outlives_the_device() -> None:
    """After some errors of CUDA every call fails, waiting too."""
    snapshot = Snapshot(trained())
    snapshot.take(3)
    snapshot._copied = copy = Copy()  # type: ignore[assignment]
    snapshot.poll()
    copy.broken = True
    with pytest.raises(RuntimeError, match="illegal memory access"):
        snapshot.tensors()
    copy.done = True
    snapshot.poll()
    assert snapshot.iteration == 3 and "parameter/a" in snapshot.tensors()


def test_a_copy_that_fails_half_way_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained()
    snapshot = Snapshot(state)
    snapshot.take(0)
    found = state.tensors() | {"parameter/b": torch.ones(5)}  # of another shape than its copy
    monkeypatch.setattr(State, "tensors", lambda state: found)
    with pytest.raises(RuntimeError, match="size of tensor"):
        snapshot.take(1)
    assert snapshot.iteration is None
