"""The device itself: what it refuses, what it counts, and that it computes what the CPU does."""

import pytest
import torch
from second_device import NAME, NEEDS_DEVICE, counting, second_device
from torch import nn

pytestmark = NEEDS_DEVICE


def test_tensors_of_two_devices_do_not_meet() -> None:
    here, there = torch.ones(4, 4), torch.ones(4, 4, device=NAME)
    for call in (torch.add, torch.matmul, lambda a, b: torch.cat([a, b]), lambda a, b: a.mul_(b)):
        with pytest.raises(RuntimeError, match=r"same device|one device"):
            call(there, here)
    with pytest.raises(RuntimeError, match="one device"):
        nn.Conv2d(1, 1, 3)(torch.ones(1, 1, 4, 4, device=NAME))
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_indices_and_numbers_may_come_from_the_cpu() -> None:
    there = torch.arange(6.0, device=NAME)
    assert (there[torch.tensor([1, 3])] * torch.tensor(2.0)).tolist() == [2, 6]
    there[torch.tensor([0])] = torch.tensor(7.0)
    assert there[0].item() == 7


def test_values_that_are_assigned_may_not() -> None:
    here, there, two = torch.zeros(4), torch.zeros(4, device=NAME), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match=r"same device|one device"):
        there[two] = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"same device|one device"):
        here[two] = torch.ones(2, device=NAME)


def test_waits_are_counted() -> None:
    there = torch.ones(4, device=NAME)
    for waits in (lambda: there.sum().item(), there.tolist, there.cpu, there.nonzero, lambda: bool(there.all())):
        with counting() as events:
            waits()
        assert sum(count for event, count in events.items() if event.startswith("wait")) == 1
    with counting() as events:
        (there * 2 + there[1:].sum()).softmax(0)
    assert not events
    with counting() as events:
        torch.ones(4).to(NAME)
    assert list(events) == ["upload 16 bytes"]


def test_memory_is_counted() -> None:
    native = second_device()
    before = native.live()
    native.reset_peak()
    kept = torch.ones(1000, device=NAME)
    view = kept[10:]
    assert native.live() - before == 4000
    del kept
    assert native.live() - before == 4000
    scratch = view * 2
    del scratch, view
    assert (native.live() - before, native.peak() - before) == (0, 4000 + 3960)


def test_a_parameter_that_moves_stays_the_same() -> None:
    layer = nn.Linear(4, 4)
    weight = layer.weight
    layer.to(NAME)
    assert layer.weight is weight and weight.device.type == NAME
    weight.data = weight.data.cpu()
    assert layer.weight.device.type == "cpu"


def test_training_is_equal_to_the_cpus() -> None:
    def trained(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(144), nn.Linear(144, 6)]
        network = nn.Sequential(*layers).to(device)
        optimizer = torch.optim.AdamW(network.parameters())
        pictures = torch.randn(2, 3, 8, 8).to(device)
        for _ in range(3):
            torch.view_as_complex(network(pictures).unflatten(1, (3, 2))).abs().sum().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().cpu() for parameter in network.parameters()]

    for expected, found in zip(trained("cpu"), trained(NAME), strict=True):
        assert torch.equal(found, expected)
