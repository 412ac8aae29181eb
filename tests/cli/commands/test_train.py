"""`train`: bad settings, options and data are named before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from customized_grpo.cli import main as cli
from customized_grpo.toybox.language import VOCABULARY

Refused = Callable[..., str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of one sample, to be spoilt."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (40, 30), (200, 100, 0)).save(folder / "a.png")
    write_lines(folder, sample())
    return folder


def sample(name: str = "one", prompt: str = "a star on the beach", reference: str = "a.png") -> dict[str, Any]:
    return {"id": name, "prompt": prompt, "references": [reference]}


def write_lines(folder: Path, *rows: dict[str, Any] | str) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


# settings


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"rollout.group_sise": 4}, ["rollout.group_sise", "Did you mean 'rollout.group_size'?"]),
        ({"itterations": 4}, ["itterations", "Did you mean 'iterations'?"]),
        ({"group_size": 4}, ["group_size", "Did you mean 'rollout.group_size'?"]),
        ({"rollout.group_size": "many"}, ["rollout", "group_size", "many"]),
        ({"rollout.group_size": 1}, ["rollout", "group_size", "greater than or equal to 2"]),
        ({"policy.toybox.adapter": "lorra"}, ["policy", "adapter", "lora", "full"]),
        ({"rollout.trained_steps": "window", "rollout.window.size": 4}, ["window", "does not fit", "num_steps=4"]),
        ({"advantages.weights": "table"}, ["advantages", "table: missing; give the weights of each reward"]),
    ],
)
def test_a_wrong_setting_in_the_file_is_named(
    refused: Refused, settings_file: Callable[..., Path], changes: dict[str, Any], messages: list[str]
) -> None:
    error = refused("train", "--config", settings_file(changes))
    assert all(message in error for message in messages), error
    assert "[type=" not in error and "pydantic" not in error


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--rollout.group_sise", "4"], ["rollout.group_sise", "Did you mean 'rollout.group_size'?"]),
        (["--optimiser.learning_rate", "1"], ["optimiser", "optimizer.learning_rate"]),
        (["--iterations", "soon"], ["iterations", "soon"]),
        (["--iterations", "0"], ["iterations", "0"]),
        (["--rollout.group_size", "1"], ["group_size", "2"]),
        (["--rollout.trained_steps", "window", "--rollout.window.start", "9"], ["window", "does not fit"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--resume", "--overwrite"], ["--resume and --resume_from continue a run and --overwrite deletes it"]),
        (["--resume_from", "nowhere", "--output", "no/where"], ["nowhere/manifest.json: damaged or missing"]),
    ],
)
def test_a_wrong_option_is_named(refused: Refused, arguments: list[str], messages: list[str]) -> None:
    error = refused("train", *arguments)
    assert all(message in error for message in messages), error


def test_the_file_among_several_is_named(refused: Refused, settings_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("rollout: {eta: -1}\n")
    for files in (("settings", "more"), ("more", "settings")):
        arguments = [word for name in files for word in ("--config", settings_file().with_name(f"{name}.yaml"))]
        error = refused("train", *arguments)
        assert f"{tmp_path / 'more.yaml'}: rollout.eta: Input should be greater than 0 (found -1)" in error


def test_a_dry_run_of_several_processes_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "--dry-run", "--num-processes", "5"])
    said = capsys.readouterr().out
    assert said.count("one iteration, and what it needs of each of 5 processes") == 1
    with pytest.raises(SystemExit):
        cli.main(["train", "--dry-run", "--num-processes", "6"])
    assert "5 groups cannot be shared among 6 processes" in capsys.readouterr().err


def test_a_number_of_processes_that_is_none(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE: the environment variable is 'two', expected a number of processes" in refused("train")


# data


def test_a_missing_data_folder_is_named(refused: Refused, settings_file: Callable[..., Path], tmp_path: Path) -> None:
    path = settings_file({"data.path": tmp_path / "none"})
    assert f"data folder {tmp_path / 'none'} does not exist" in refused("train", "--config", path)


def test_a_broken_line_is_named_by_file_and_line(
    refused: Refused, settings_file: Callable[..., Path], data: Path
) -> None:
    write_lines(data, sample(), '{"id": "two", "prompt"')
    error = refused("train", "--config", settings_file({"data.path": data}))
    assert f"{data / 'metadata.jsonl'}:2: broken JSON" in error


def test_all_bad_images_are_listed(refused: Refused, settings_file: Callable[..., Path], data: Path) -> None:
    (data / "b.png").write_bytes((data / "a.png").read_bytes()[:60])
    Image.new("RGB", (400, 300)).save(data / "large.png")
    rows = [sample(name, reference=f"{name}.png") for name in ("a", "b", "large", "missing")]
    write_lines(data, *rows)
    error = refused("train", "--config", settings_file({"data.path": data, "data.max_pixels": 2000}))
    assert all(f"{name}.png" in error for name in ("b", "large", "missing")) and "a.png" not in error


def test_a_path_that_leaves_the_folder_is_refused(
    refused: Refused, settings_file: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    write_lines(data, sample(reference="../secret.png"))
    error = refused("train", "--config", settings_file({"data.path": data}))
    assert "'../secret.png', leaves the data folder" in error


def test_an_unknown_word_is_named_with_the_vocabulary(
    refused: Refused, settings_file: Callable[..., Path], data: Path
) -> None:
    write_lines(data, sample(prompt="a zebra on the beach"))
    error = refused("train", "--config", settings_file({"data.path": data}))
    assert "sample 'one'" in error and "'zebra'" in error and ", ".join(VOCABULARY) in error


def test_validation_and_test_data_are_checked_before_training(
    refused: Refused, settings_file: Callable[..., Path], data: Path
) -> None:
    write_lines(data, sample(prompt="a zebra on the beach"))
    for field in ("data.validation", "data.test"):
        assert "'zebra'" in refused("train", "--config", settings_file({field: data}))


def test_segmenting_needs_masks(refused: Refused, settings_file: Callable[..., Path], data: Path) -> None:
    changes = {"data.path": data, "rewards.identity.toybox_identity": {"reference": "segmented"}}
    error = refused("train", "--config", settings_file(changes))
    assert "sample 'one': has no mask, but rewards.identity.toybox_identity.reference is 'segmented'" in error


def test_missing_weights_are_named(refused: Refused, settings_file: Callable[..., Path], tmp_path: Path) -> None:
    error = refused("train", "--config", settings_file({"policy.toybox.weights": tmp_path / "none"}))
    assert "_encoder" in error and ".safetensors: no such weights" in error


def test_an_output_with_something_in_it_is_refused(
    refused: Refused, settings_file: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    assert "is not empty. Pass --resume" in refused("train", "--config", settings_file())
