import hashlib
import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from customized_grpo.errors import UserError
from customized_grpo.training import checkpoint
from customized_grpo.training.checkpoint import (
    MANIFEST,
    TENSORS,
    CorruptCheckpointError,
    State,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    read_manifest,
    save_checkpoint,
)
from customized_grpo.training.ema import EMA

CONFIG = {"seed": 0, "rollout.eta": 0.5}


class Part:
    """A small network with an optimiser, some steps into training."""

    def __init__(self, seed: int, steps: int = 0, average: bool = False) -> None:
        torch.manual_seed(seed)
        self.network = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1)
        self.average = EMA(self.network.named_parameters(), 0.9) if average else None
        self.train(steps)

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.optimizer.zero_grad()
            self.network(torch.full((1, 3), float(step + 1))).square().sum().backward()
            self.optimizer.step()
            if self.average is not None:
                self.average.update(step + 1)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])

    @property
    def state(self) -> State:
        return State(list(self.network.named_parameters()), self.optimizer, self.average)

    def save(self, folder: Path, iteration: int, keep: int = 2, keep_every: int | None = None) -> Path:
        path = save_checkpoint(folder, iteration, CONFIG, self.state.tensors())
        prune_checkpoints(folder, iteration, keep, keep_every)
        return path

    def load(self, path: Path, config: dict[str, Any] = CONFIG) -> int:
        return load_checkpoint(path, config, self.state).iteration


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_training_goes_on_bitwise_from_a_checkpoint(tmp_path: Path) -> None:
    first, second = Part(0, steps=3), Part(1)
    assert second.load(first.save(tmp_path, 3)) == 3
    assert torch.equal(second.weights(), first.weights())
    first.train(2)
    second.train(2)
    assert torch.equal(second.weights(), first.weights())


def test_the_average_goes_on_bitwise_too(tmp_path: Path) -> None:
    first, second = Part(0, steps=3, average=True), Part(1, average=True)
    second.load(first.save(tmp_path, 3))
    for part in (first, second):
        part.train(2)
    assert first.average is not None and second.average is not None
    assert all(torch.equal(tensor, second.average.tensors[name]) for name, tensor in first.average.tensors.items())
    assert any(not torch.equal(first.average.tensors[name], p) for name, p in first.network.named_parameters())


@pytest.mark.parametrize("average", [False, True])
def test_weights_alone_are_taken_from_a_checkpoint(average: bool, tmp_path: Path) -> None:
    first, second = Part(0, steps=3, average=True), Part(1)
    path = first.save(tmp_path, 3)
    load_weights(path, CONFIG, second.network.named_parameters(), average=average)
    assert first.average is not None
    expected = first.average.tensors if average else dict(first.network.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in second.network.named_parameters())


def test_weights_that_a_checkpoint_does_not_have(tmp_path: Path) -> None:
    path, part = Part(0, steps=1).save(tmp_path, 1), Part(1)
    before = part.weights()
    with pytest.raises(UserError, match=f"--ema: {path} holds no averaged weights"):
        load_weights(path, CONFIG, part.network.named_parameters(), average=True)
    with pytest.raises(CorruptCheckpointError, match=r"not the tensors of this run: it has bias"):
        load_weights(path, CONFIG, [("weight", part.network.weight)], average=False)
    (path / TENSORS).write_bytes(b"torn")
    with pytest.raises(CorruptCheckpointError, match="not what the manifest's hash is of"):
        load_weights(path, CONFIG, part.network.named_parameters(), average=False)
    assert torch.equal(part.weights(), before)


def test_a_checkpoint_before_the_first_step_holds_no_moments(tmp_path: Path) -> None:
    first, second = Part(0), Part(1)
    second.load(first.save(tmp_path, 0))
    assert second.optimizer.state_dict()["state"] == {}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for iteration in (2, 4, 10, 12):
        Part(0).save(tmp_path, iteration, keep=2)
    assert names(tmp_path) == ["000010", "000012"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000010", "000012"]


def test_those_of_every_so_many_iterations_are_kept_for_good(tmp_path: Path) -> None:
    for iteration in range(2, 18, 2):
        Part(0).save(tmp_path, iteration, keep=1, keep_every=6)
    assert names(tmp_path) == ["000006", "000012", "000016"]


def test_what_was_passed_over_as_damaged_pushes_out_nothing_whole(tmp_path: Path) -> None:
    """The run went back from 6, which is damaged, to 2: saving 4 must not remove it as the older of the two."""
    for iteration in (2, 6):
        Part(0).save(tmp_path, iteration)
    (tmp_path / "000006" / TENSORS).write_bytes(b"torn")
    path = Part(0).save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["000004", "000006"] and Part(1).load(path) == 4


def test_checkpoints_are_listed_by_number(tmp_path: Path) -> None:
    for iteration in (999999, 1000000):
        Part(0).save(tmp_path, iteration)
    (tmp_path / "²").mkdir()
    (tmp_path / "²" / MANIFEST).write_text("{}")
    assert names(tmp_path) == ["999999", "1000000"]


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
    assert names(tmp_path) == ["000002"]
    Part(0).save(tmp_path, 4)
    assert names(tmp_path) == ["000002", "000004"] and not left.exists()


def test_a_checkpoint_without_its_manifest_is_damaged_and_not_overlooked(tmp_path: Path) -> None:
    path = Part(0).save(tmp_path, 2)
    (path / MANIFEST).unlink()
    assert names(tmp_path) == ["000002"]
    with pytest.raises(CorruptCheckpointError, match=f"{path / MANIFEST}: damaged or missing"):
        Part(1).load(path)


def test_a_checkpoint_of_another_format_is_not_passed_over_as_damaged(tmp_path: Path) -> None:
    path = Part(0).save(tmp_path, 2)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["format"] == checkpoint.FORMAT
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": checkpoint.FORMAT + 1, "new": 1}))
    with pytest.raises(UserError, match=r"of format 4, written by a later version; this one reads 3") as caught:
        Part(1).load(path)
    assert not isinstance(caught.value, CorruptCheckpointError)


def test_a_checkpoint_from_before_the_fields_were_renamed_is_refused_with_words(tmp_path: Path) -> None:
    path = Part(0).save(tmp_path, 2)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(
        UserError, match=r"of format 2, written by an earlier version; this one reads 3\. Finish the run"
    ):
        Part(1).load(path)


def test_a_checkpoint_that_was_moved_and_linked_to_is_kept_and_removed_as_any_other(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    Part(0, steps=1).save(folder, 2).rename(elsewhere)
    (folder / "000002").symlink_to(elsewhere)
    assert Part(1).load(folder / "000002") == 2
    for iteration in (4, 6):
        Part(0).save(folder, iteration, keep=1)
    assert [path.name for path in folder.iterdir()] == ["000006"] and (elsewhere / MANIFEST).is_file()


def test_what_cannot_be_removed_is_in_no_saves_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file on a network disk that some process still has open."""
    monkeypatch.setattr(os, "rmdir", refuse)
    for iteration in (2, 4, 6):
        Part(0).save(tmp_path, iteration, keep=1)
    assert names(tmp_path) == ["000006"]
    monkeypatch.undo()
    Part(0).save(tmp_path, 8, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["000008"]


def refuse(*arguments: object, **settings: object) -> None:
    raise OSError(16, "Device or resource busy")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_what_was_loaded_keeps_no_file_open(tmp_path: Path) -> None:
    path, part = Part(0, steps=1).save(tmp_path, 1), Part(1)
    part.load(path)
    assert str(path) not in Path("/proc/self/maps").read_text()


def die_at(operation: int) -> None:
    """End this process, as SIGKILL does, when so many operations on files are behind it."""
    operations: list[str] = []

    def count(event: str, arguments: object) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            operations.append(event)
            if len(operations) > operation:
                os._exit(9)

    sys.addaudithook(count)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A child saves, keeps one, and dies at its n-th operation on files; n grows until nothing is left to die at."""
    done, deaths = False, 0
    while not done:
        folder = tmp_path / str(deaths)
        Part(0, steps=1).save(folder, 1)
        child = os.fork()
        if child == 0:
            die_at(deaths)
            Part(0, steps=2).save(folder, 2, keep=1)
            os._exit(0)
        done = os.waitpid(child, 0)[1] == 0
        newest, part = list_checkpoints(folder)[-1], Part(1)
        iteration = part.load(newest)
        assert torch.equal(part.weights(), Part(0, steps=iteration).weights())
        Part(0, steps=3).save(folder, 3, keep=1)
        assert [path.name for path in folder.iterdir()] == ["000003"]
        deaths += 1
    assert deaths > 15 and iteration == 2


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


def test_a_setting_that_a_checkpoint_does_not_know_must_be_unset(tmp_path: Path) -> None:
    """Of a version before the setting: without it the run goes on, with it another one is asked for."""
    run = Part(0)
    path = run.save(tmp_path, 1)
    assert run.load(path, CONFIG | {"advantages.sars.gamma_penalty": None}) == 1
    with pytest.raises(UserError, match=r"another configuration \(advantages.sars.gamma_penalty: None -> 1.0\)"):
        run.load(path, CONFIG | {"advantages.sars.gamma_penalty": 1.0})


def test_the_manifest_says_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Part(0).save(tmp_path, 1)
    manifest = read_manifest(path)
    assert set(manifest.libraries) == {
        "customized-grpo", "torch", "peft", "diffusers", "transformers", "numpy", "pillow"
    }  # fmt: skip
    assert manifest.libraries["torch"] == metadata.version("torch") and manifest.other_libraries() == []
    now = manifest.libraries | {"torch": "9.9"}
    monkeypatch.setattr(checkpoint, "library_versions", lambda: now)
    assert manifest.other_libraries() == [f"torch {manifest.libraries['torch']} -> 9.9"]


HUGE = "9" * 5000
HOSTILE: dict[str, Callable[[dict[str, Any]], str]] = {
    "no JSON": lambda m: "\x80\x04pickle",
    "another thing": lambda m: "[]",
    "nested deep": lambda m: "[" * 100_000,
    "no iteration": lambda m: json.dumps({k: v for k, v in m.items() if k != "iteration"}),
    "no hashes": lambda m: json.dumps({k: v for k, v in m.items() if k != "sha256"}),
    "no config": lambda m: json.dumps({k: v for k, v in m.items() if k != "config"}),
    "more": lambda m: json.dumps(m | {"code": "import os"}),
    "a text for a number": lambda m: json.dumps(m | {"iteration": "1"}),
    "a number with a point": lambda m: json.dumps(m | {"iteration": 1.5}),
    "a truth for a number": lambda m: json.dumps(m | {"iteration": True}),
    "below zero": lambda m: json.dumps(m | {"iteration": -1}),
    "another iteration": lambda m: json.dumps(m | {"iteration": 2}),
    "a large number": lambda m: json.dumps(m | {"iteration": 10**30}),
    "a number of 5000 digits": lambda m: json.dumps(m | {"iteration": 7}).replace(
        '"iteration": 7', f'"iteration": {HUGE}'
    ),
    "infinity": lambda m: json.dumps(m | {"iteration": float("inf")}),
    "a huge setting": lambda m: json.dumps(m | {"config": {"seed": 7}}).replace(": 7}", f": {HUGE}}}"),
    "settings that are a list": lambda m: json.dumps(m | {"config": [1]}),
    "other settings": lambda m: json.dumps(m | {"config": {"seed": 1}}),
    "libraries that are numbers": lambda m: json.dumps(m | {"libraries": {"torch": 2}}),
    "hashes that are a text": lambda m: json.dumps(m | {"sha256": "0" * 64}),
    "a format that is a text": lambda m: json.dumps(m | {"format": "1"}),
    "a key twice": lambda m: json.dumps(m)[:-1] + ', "config": {"seed": 1}}',
    "a hash of a path outside": lambda m: json.dumps(m | {"sha256": m["sha256"] | {"../../secret": "0" * 64}}),
    "a hash that is a path": lambda m: json.dumps(m | {"sha256": m["sha256"] | {"tensors": "/etc/passwd"}}),
    "another hash": lambda m: json.dumps(m | {"sha256": m["sha256"] | {"tensors": "0" * 64}}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_manifests_are_damage(kind: str, tmp_path: Path) -> None:
    path, part = Part(0, steps=1).save(tmp_path, 1), Part(1)
    before = part.weights()
    text = HOSTILE[kind](json.loads((path / MANIFEST).read_text()))
    (path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptCheckpointError, match=r"damaged") as caught:
        part.load(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500
    assert torch.equal(part.weights(), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parameter/weight": None}, "it lacks parameter/weight"),
        ({"parameter/more": torch.ones(1)}, "it has parameter/more"),
        ({"parameter/weight": torch.ones(2, 2)}, r"parameter/weight is float32 \[2, 2\], expected float32 \[2, 3\]"),
        (
            {"parameter/weight": torch.ones(2, 3, dtype=torch.int8)},
            r"weight is int8 \[2, 3\], expected float32 \[2, 3\]",
        ),
        ({"parameter/weight": torch.full((2, 3), torch.nan)}, "parameter/weight has numbers that are not finite"),
        ({"optimizer/weight/exp_avg": torch.ones(5)}, r"optimizer/weight/exp_avg is float32 \[5\]"),
        ({"optimizer/weight/exp_avg": torch.ones(())}, r"optimizer/weight/exp_avg is float32 \[\]"),
        ({"optimizer/weight/exp_avg_sq": None}, "it lacks optimizer/weight/exp_avg_sq"),
        ({"optimizer/bias/step": None}, "it lacks optimizer/bias/step"),
        (
            {f"optimizer/bias/{key}": None for key in ("step", "exp_avg", "exp_avg_sq")},
            "it lacks optimizer/bias/exp_avg",
        ),
        ({"optimizer/other/exp_avg": torch.ones(2, 3)}, "it has optimizer/other/exp_avg"),
        ({"average/weight": torch.ones(2, 3)}, "it has average/weight"),
    ],
)
def test_tensors_of_another_run_are_damage(change: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    """Their hash is right: the whole folder was made by somebody else."""
    path, part = Part(0, steps=1).save(tmp_path, 1), Part(1)
    tensors = {name: tensor for name, tensor in (load_file(path / TENSORS) | change).items() if tensor is not None}
    save_file(tensors, path / TENSORS)
    rehash(path)
    before = part.weights()
    with pytest.raises(CorruptCheckpointError, match=said):
        part.load(path)
    assert torch.equal(part.weights(), before)


def rehash(path: Path) -> None:
    """Make the manifest's hash that of the tensors as they are now."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["sha256"]["tensors"] = hashlib.sha256((path / TENSORS).read_bytes()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = Part(0, steps=1).save(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == [MANIFEST, TENSORS]
    assert json.loads((path / MANIFEST).read_text())["iteration"] == 1
