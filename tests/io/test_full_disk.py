"""A disk that takes no more: the run ends with one message, what was saved before is as it was, and it goes on."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from customized_grpo.config.run import Config
from customized_grpo.io.files import StorageError, write_whole, writing
from customized_grpo.training import checkpoint
from customized_grpo.training.checkpoint import list_checkpoints, read_manifest

MakeConfig = Callable[..., Config]
RunTraining = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]
Limit = Callable[[int], AbstractContextManager[None]]
ADAPTER = "adapter_model.safetensors"
THREE = {"iterations": 3, "checkpoint.every": 1, "optimizer.num_minibatches": 1}
LIMITED = """
import resource, sys
from customized_grpo.cli.main import main
from customized_grpo.training.saving import CheckpointSaver

save, limit = CheckpointSaver.save, int(sys.argv.pop(1))

def limited(saver):
    if saver.snapshot.iteration == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    save(saver)

CheckpointSaver.save = limited
main()
"""
"""Trains as the command does; from the second save on, no file may be larger than a limit."""


@pytest.fixture
def settings(make_settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[[Path], Path]:
    """Writes the configuration of a run into a folder."""

    def settings(output: Path) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(make_settings(THREE | {"output": output})))
        return path

    return settings


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode != 0:
            pytest.skip(f"mounting is not allowed: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for each in mounted:
        subprocess.run(["umount", str(each)], check=True)


def test_files_larger_than_a_limit(settings: Callable[[Path], Path], tmp_path: Path, run_python: Run) -> None:
    run, path = tmp_path / "run", settings(tmp_path / "run")
    done = run_python("-c", LIMITED, 20_000, "train", "--config", path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("customized-grpo: error: ") == 1
    assert f"error: {run / 'checkpoints'}: no space to write (" in done.stderr and "Make room, or raise" in done.stderr
    assert "MB are needed, " in done.stderr and "MB are free" in done.stderr
    assert "what was saved before is as it was; `train --resume` goes on from it" in done.stdout
    assert [each.name for each in (run / "checkpoints").iterdir()] == ["000001"]
    assert read_manifest(run / "checkpoints" / "000001").iteration == 1
    again = run_python("-m", "customized_grpo", "train", "--config", path, "--resume")
    assert again.returncode == 0 and "resuming after iteration 1" in again.stdout, again.stderr


def test_a_disk_that_fills_up(
    settings: Callable[[Path], Path], small_disk: Callable[[int], Path], tmp_path: Path, make_config: MakeConfig,
    run_training: RunTraining, run_python: Run,
) -> None:  # fmt: skip
    """It has room for two checkpoints and no third; with more room, the run comes to its end as on a larger disk."""
    run_training(make_config(THREE))
    whole = tmp_path / "run"
    size = sum(file.stat().st_size for file in (whole / "checkpoints" / "000003").iterdir())
    disk = small_disk(2 * size + size // 2)
    path = settings(disk / "run")
    done = run_python("-m", "customized_grpo", "train", "--config", path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"error: {disk / 'run'}" in done.stderr and "No space left on device" in done.stderr
    names = [each.name for each in (disk / "run" / "checkpoints").iterdir()]
    assert names and not any("partial" in name for name in names)
    newest = list_checkpoints(disk / "run" / "checkpoints")[-1]
    subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(disk)], check=True)
    again = run_python("-m", "customized_grpo", "train", "--config", path, "--resume")
    assert again.returncode == 0 and f"from {newest}" in again.stdout, again.stderr
    assert (disk / "run" / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


@pytest.mark.parametrize("what", ["metrics.jsonl", "evaluations.jsonl", "gallery", "adapter", "evaluation"])
def test_whatever_cannot_be_written_is_named(
    what: str, tmp_path: Path, toybox_data: Path, make_config: MakeConfig, run_training: RunTraining
) -> None:
    """A folder is where the file should go; afterwards the run goes on as if that had not been."""
    config = make_config(THREE | {"evaluation.every": 2, "data.test": toybox_data / "test"})
    run = tmp_path / "run"
    run_training(config.model_copy(update={"iterations": 1}))
    place = {
        "gallery": run / "galleries" / "000002.png", "adapter": run / ADAPTER, "evaluation": run / "evaluation",
    }.get(what, run / what)  # fmt: skip
    content = place.read_bytes() if place.is_file() else None
    obstruct(place, file=what == "evaluation")
    with pytest.raises(StorageError, match=f"{run}.*: cannot be written to"):
        run_training(config, resume=True)
    assert list_checkpoints(run / "checkpoints")
    clear(place)
    if content is not None:
        place.write_bytes(content)
    run_training(config, resume=True)
    rows = [json.loads(line)["iteration"] for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert rows == [0, 2, 3] and (run / "galleries" / "000002.png").is_file()


def obstruct(place: Path, *, file: bool) -> None:
    if file:
        subprocess.run(["rm", "-r", str(place)], check=True)
        place.write_text("")
    else:
        place.unlink(missing_ok=True)
        place.mkdir()
        (place / "stays").write_text("")


def clear(place: Path) -> None:
    if place.is_dir():
        (place / "stays").unlink()
        place.rmdir()
    else:
        place.unlink()


@pytest.mark.parametrize(("number", "full"), [(28, True), (27, True), (122, True), (5, False), (13, False)])
def test_the_systems_numbers_in_words(number: int, full: bool, tmp_path: Path) -> None:
    """ENOSPC, EFBIG and EDQUOT, against EIO and EACCES."""
    with pytest.raises(StorageError) as caught, writing(tmp_path / "not" / "there", 5_000_000):
        raise OSError(number, os.strerror(number))
    assert ("no space to write" in str(caught.value)) == full and str(tmp_path / "not" / "there") in str(caught.value)
    assert ("5.0 MB are needed" in str(caught.value)) == full


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, files_up_to: Limit) -> None:
    path = tmp_path / "log"
    write_whole(path, "before")
    with files_up_to(1000), pytest.raises(StorageError, match=r"no space to write \(\[Errno 27\] File too large"):
        write_whole(path, "x" * 5000)
    assert path.read_text() == "before" and [each.name for each in tmp_path.iterdir()] == ["log"]


def test_a_save_that_fails_is_not_tried_again(
    tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(*arguments: Any) -> None:
        tried.append(arguments)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint, "save_tensors", refuse)
    with pytest.raises(StorageError, match="no space to write"):
        run_training(make_config(THREE))
    assert len(tried) == 1 and list((tmp_path / "run" / "checkpoints").iterdir()) == []
