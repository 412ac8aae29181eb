import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from customized_grpo.checkpoint import (
    MANIFEST,
    TENSORS,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from customized_grpo.errors import UserError

CONFIG = {"seed": 0, "rollout.eta": 0.5}


class Part:
    """A small network with an optimiser, some steps into training."""

    def __init__(self, seed: int, steps: int = 0) -> None:
        torch.manual_seed(seed)
        self.network = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1)
        self.train(steps)

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.optimizer.zero_grad()
            self.network(torch.full((1, 3), float(step + 1))).square().sum().backward()
            self.optimizer.step()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])

    def save(self, folder: Path, iteration: int, keep: int = 2) -> Path:
        return save_checkpoint(folder, iteration, CONFIG, self.network.named_parameters(), self.optimizer, keep)

    def load(self, path: Path, config: dict[str, Any] = CONFIG) -> int:
        return load_checkpoint(path, config, self.network.named_parameters(), self.optimizer)


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_training_goes_on_bitwise_from_a_checkpoint(tmp_path: Path) -> None:
    first, second = Part(0, steps=3), Part(1)
    assert second.load(first.save(tmp_path, 3)) == 3
    assert torch.equal(second.weights(), first.weights())
    first.train(2)
    second.train(2)
    assert torch.equal(second.weights(), first.weights())


def test_a_checkpoint_before_the_first_step_holds_no_moments(tmp_path: Path) -> None:
    first, second = Part(0), Part(1)
    second.load(first.save(tmp_path, 0))
    assert second.optimizer.state_dict()["state"] == {}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for iteration in (2, 4, 10, 12):
        Part(0).save(tmp_path, iteration, keep=2)
    assert names(tmp_path) == ["000010", "000012"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000010", "000012"]


def test_saving_the_same_iteration_again_replaces_it(tmp_path: Path) -> None:
    Part(0).save(tmp_path, 2)
    path, part = Part(1).save(tmp_path, 2), Part(2)
    part.load(path)
    assert torch.equal(part.weights(), Part(1).weights())


def test_what_a_killed_save_left_behind_is_no_checkpoint(tmp_path: Path) -> None:
    Part(0).save(tmp_path, 2)
    left = tmp_path / ".000004.partial"
    left.mkdir()
    (left / TENSORS).write_bytes(b"half")
    (tmp_path / "000006").mkdir()
    assert names(tmp_path) == ["000002"]
    Part(0).save(tmp_path, 4)
    assert names(tmp_path) == ["000002", "000004"] and not left.exists()


def test_no_folder_holds_no_checkpoints(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []


def test_a_damaged_tensor_file_is_named(tmp_path: Path) -> None:
    path, part = Part(0, steps=1).save(tmp_path, 1), Part(1)
    before = part.weights()
    content = bytearray((path / TENSORS).read_bytes())
    content[-1] ^= 1
    (path / TENSORS).write_bytes(content)
    with pytest.raises(UserError, match=f"{path / TENSORS}: damaged"):
        part.load(path)
    assert torch.equal(part.weights(), before)


def test_a_missing_tensor_file_is_named(tmp_path: Path) -> None:
    path = Part(0).save(tmp_path, 1)
    (path / TENSORS).unlink()
    with pytest.raises(UserError, match=TENSORS):
        Part(1).load(path)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    path = Part(0).save(tmp_path, 1)
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:40])
    with pytest.raises(UserError, match=MANIFEST):
        Part(1).load(path)


def test_another_configuration_is_refused_field_by_field(tmp_path: Path) -> None:
    path, part = Part(0).save(tmp_path, 1), Part(1)
    before = part.weights()
    with pytest.raises(UserError, match=r"rollout.eta: 0.5 -> 0.7"):
        part.load(path, CONFIG | {"rollout.eta": 0.7})
    with pytest.raises(UserError, match=r"new.field: None -> 1"):
        part.load(path, CONFIG | {"new.field": 1})
    assert torch.equal(part.weights(), before)


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = Part(0, steps=1).save(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == [MANIFEST, TENSORS]
    assert json.loads((path / MANIFEST).read_text())["iteration"] == 1
