"""See test_full_disk.py for disks that take no more."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.io.files import check_folder, save_tensors
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.training.checkpoint import State, save_checkpoint


@pytest.fixture(params=[0o022, 0o027, 0o077])
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Sets the umask of the process."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_adapters_and_checkpoints_may_be_read_by_whom_the_umask_allows(
    mask: int, make_policy: Callable[..., ToyBoxPolicy], tmp_path: Path
) -> None:
    policy = make_policy()
    policy.save_adapter(tmp_path)
    state = State(list(policy.trainable_parameters()), torch.optim.AdamW(p for _, p in policy.trainable_parameters()))
    checkpoint = save_checkpoint(tmp_path, 2, {}, state.tensors())
    files = [tmp_path / "adapter_model.safetensors", *checkpoint.iterdir()]
    assert len(files) == 3 and {mode(path) for path in files} == {0o666 & ~mask}
    assert os.umask(mask) == mask


def test_a_disk_that_keeps_no_modes_takes_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").is_file()


def test_a_folder_must_be_one_that_can_be_made_and_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "new" / "folder"):
        check_folder(folder, "--out")
    with pytest.raises(UserError, match="--out: .*file is a file; name a folder elsewhere"):
        check_folder(tmp_path / "file" / "below", "--out")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=f"--out: {tmp_path} cannot be written to"):
        check_folder(tmp_path / "new", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
