"""A first run on one's own photographs: its data, its settings, and whether these fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from customized_grpo.cli.main import main
from customized_grpo.config.recipes import find_recipe, list_recipes
from customized_grpo.config.run import Config, flatten, set_dotted
from customized_grpo.data import SubjectDataset
from customized_grpo.data.scenes import TEST, TRAIN, VALIDATION
from customized_grpo.training import first_run
from customized_grpo.training.estimate import Estimate
from customized_grpo.training.first_run import edited
from customized_grpo.training.fit import GIB

Init = Callable[..., Path]


def save(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        if "_mask" in name:
            pixels = np.full((40, 48), 255, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def pretended(config: Config) -> Estimate:
    """20 GiB, half of them with int8; and 1 GiB for 16 of the rank."""
    weights = 10.0 if config.policy.pipeline.quantization == "int8" else 20.0
    return Estimate(1, 1, {}, 0.0, {"all": GIB * (weights + config.policy.lora_rank / 16)}, {"update": {}})


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Init:
    """`init` on the photographs in `tmp_path/photos`, with a pretended estimate; returns the folder of the run."""
    monkeypatch.setattr(first_run, "dry_run", pretended)
    monkeypatch.setattr("customized_grpo.training.fit.find_spec", lambda name: object())

    def init(*options: str, memory: str = "80") -> Path:
        given = ["--pictures", str(tmp_path / "photos"), "--called", "a dog", "--gpu_memory", memory]
        main(["init", str(tmp_path / "my"), *given, *options])
        return tmp_path / "my"

    return init


def settings(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((folder / "settings.yaml").read_text())
    Config.model_validate(tree)
    return flatten(tree)


def test_each_photograph_meets_each_prompt_and_no_split_shares_one(
    init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "photos", "a.png", "b.jpg")
    folder = init()
    found = {}
    for split, scenes in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        dataset = SubjectDataset.open(folder / "data" / split)
        assert len(dataset) == 2 * len(scenes)
        found[split] = {sample.prompt for sample in dataset}
        assert found[split] == {f"a dog {scene}" for scene in scenes}
    assert not found["train"] & found["validation"] and not (found["train"] | found["validation"]) & found["test"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"next: customized-grpo train --config {folder / 'settings.yaml'}"
    assert f"samples: {2 * len(TRAIN)} train, {2 * len(VALIDATION)} validation, {2 * len(TEST)} test" in lines[-3]


def test_folders_are_subjects_and_masks_are_taken(init: Init, tmp_path: Path) -> None:
    save(tmp_path / "photos" / "rex", "a.png", "a_mask.png")
    save(tmp_path / "photos" / "luna", "a.png", "a_mask.png", "b.png", "b_mask.png")
    folder = init()
    rows = [json.loads(line) for line in (folder / "data" / "train" / "metadata.jsonl").read_text().splitlines()]
    assert {row["subject"] for row in rows} == {"rex", "luna"} and all(row["masks"] for row in rows)
    assert settings(folder)["rewards.identity.dino.reference"] == "segmented"


def test_without_masks_the_whole_picture_is_the_reference(init: Init, tmp_path: Path) -> None:
    save(tmp_path / "photos", "a.png")
    found = settings(init())
    assert found["rewards.identity.dino.reference"] == "whole"
    assert found["output"] == str(tmp_path / "my" / "run")
    for field, split in (("path", "train"), ("validation", "validation"), ("test", "test")):
        assert found[f"data.{field}"] == str(tmp_path / "my" / "data" / split)


@pytest.mark.parametrize(
    ("generator", "memory", "recipe", "quantization"),
    [
        ("flux2-klein", "80", "flux2-klein", None),
        ("qwen-image-edit-plus", "30", "qwen-image-edit-24gb", "nf4"),
        ("flux1-kontext", "80", "flux1-kontext", None),
        ("uno", "24", "uno", "int8"),  # no recipe for a small GPU, so the settings are changed
    ],
)
def test_the_recipe_is_that_of_the_generator_and_the_gpu(
    generator: str, memory: str, recipe: str, quantization: str | None, init: Init, tmp_path: Path
) -> None:
    save(tmp_path / "photos", "a.png")
    folder = init("--generator", generator, memory=memory)
    found = settings(folder)
    assert (folder / "settings.yaml").read_text().splitlines()[0] == find_recipe(recipe).read_text().splitlines()[0]
    assert found["policy.kind"] == generator
    assert found.get("policy.pipeline.quantization") == quantization


@pytest.mark.parametrize(
    ("options", "memory", "said"),
    [
        (["--generator", "flux2"], "80", "--generator: there is no recipe of flux2 yet"),
        ([], "5", "--gpu_memory: 5 GiB are not enough for flux2-klein-24gb with any setting that is tried"),
        (["--pictures", "nowhere"], "80", "--pictures: nowhere is no folder"),
    ],
)
def test_what_cannot_be_is_told_and_nothing_is_written(
    options: list[str], memory: str, said: str, init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "photos", "a.png")
    with pytest.raises(SystemExit):
        init(*options, memory=memory)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "my").exists()


def test_a_broken_photograph_is_named_and_nothing_is_written(
    init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "photos", "a.png")
    (tmp_path / "photos" / "b.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        init()
    assert "b.png" in capsys.readouterr().err
    assert not list((tmp_path / "my").rglob("*.png")) and not (tmp_path / "my" / "settings.yaml").exists()


def test_photographs_in_a_format_that_is_not_read_are_told(
    init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `prepare` tells them: nothing is left out in silence."""
    save(tmp_path / "photos", "a.png")
    (tmp_path / "photos" / "b.cr2").write_bytes(b"raw")
    init()
    assert capsys.readouterr().out.count("left out: photos: b.cr2: ") == 1


def test_a_folder_without_pictures_is_told(init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit):
        init()
    assert "holds no pictures; expected photographs of one subject" in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "photos", "a.png")
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        init()
    assert "is not empty; name a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "my").iterdir()] == ["mine.txt"]


def test_what_is_missing_is_asked_for_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "my"), "--called", "a dog"])
    assert "init: --pictures is missing, and there is no terminal to ask on; give it" in capsys.readouterr().err


def test_answers_on_a_terminal_are_taken(
    init: Init, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "photos", "a.png")
    answers = iter([str(tmp_path / "photos"), "this item", "80"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("rich.prompt.Prompt.ask", lambda question: next(answers))
    main(["init", str(tmp_path / "my")])
    assert f"this item {TRAIN[0]}" in (tmp_path / "my" / "data" / "train" / "metadata.jsonl").read_text()


CHANGES = {
    "output": "some/where: else", "data.validation": "data/v", "policy.lora_rank": 16,
    "policy.pipeline.block_offload": True, "policy.pipeline.height": 256, "rollout.subset.timestep_fraction": 0.5,
    "optimizer.kind": "adamw_8bit", "objective.clip_range": 1.0e-3, "ema.decay": 0.9, "log.report_to": ["wandb"],
}  # fmt: skip


@pytest.mark.parametrize("recipe", [name for name in list_recipes() if not name.startswith("compare")])
def test_an_edited_recipe_says_what_is_asked_and_the_rest_as_before(recipe: str) -> None:
    text = find_recipe(recipe).read_text()
    expected = yaml.safe_load(text)
    for name, value in CHANGES.items():
        set_dotted(expected, name, value)
    found = edited(text, CHANGES)
    assert yaml.safe_load(found) == expected
    kept = [line for line in text.splitlines() if line.startswith("#")]
    assert [line for line in found.splitlines() if line.startswith("#")] == kept
    assert "lora_rank: 16 # in the recipe: " in found or "lora_rank" not in text
