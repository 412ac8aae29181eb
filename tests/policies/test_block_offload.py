"""In which order blocks come from the host; tests/second_device holds that no number changes."""

from typing import Any

import pytest
import torch
from torch import nn

from customized_grpo.policies.block_offload import BlockOffload


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Transformer(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))


def test_the_block_ahead_is_the_next_one_in_either_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer: Any = Transformer()
    offload = BlockOffload(transformer, [], torch.device("cpu"))
    ahead: list[int] = []
    for number, block in enumerate(offload._blocks):
        monkeypatch.setattr(block, "put_device", lambda: None)
        monkeypatch.setattr(block, "fetch", lambda number=number: ahead.append(number))
    forwards, backwards = [0, 1, 2], [2, 1, 0]
    for number in [*forwards, *forwards, *backwards, *forwards]:
        offload._before(number, transformer.blocks[number], ())
    assert ahead == [1, 2, 0, 1, 2, 0, 1, 0, 1, 1, 2, 0]


def test_weights_are_in_place_whether_a_block_runs_or_fails() -> None:
    transformer = Transformer()
    weights = [block.layer.weight for block in transformer.blocks]
    BlockOffload(transformer, [], torch.device("cpu"))
    expected = nn.functional.linear(torch.ones(1, 2), weights[0], transformer.blocks[0].layer.bias)
    assert torch.equal(transformer.blocks[0](torch.ones(1, 2)), expected)
    with pytest.raises(RuntimeError):
        transformer.blocks[1](torch.ones(1, 3))
    assert [block.layer.weight for block in transformer.blocks] == weights
