"""The model card of an exported adapter."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from customized_grpo.config.run import Config
from customized_grpo.factory.pipelines import MODELS
from customized_grpo.report.card import Exported, write_card
from customized_grpo.training.export import export

RunTraining = Callable[..., Path]
LAST = Exported(4, averaged=False, best=False, checkpoint=False)


@pytest.fixture(scope="session")
def evaluated_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluated") / "cups"


@pytest.fixture
def evaluated(
    evaluated_place: Path, make_config: Callable[..., Config], run_training: RunTraining, toybox_data: Path
) -> Path:
    """A run with an average, validations, a best adapter and test figures. Tests only read it."""
    if not evaluated_place.exists():
        run_training(
            make_config(
                {
                    "output": evaluated_place, "iterations": 2, "evaluation.every": 1, "checkpoint.every": 1,
                    "data.test": toybox_data / "test", "data.validation": toybox_data / "test",
                    "ema.decay": 0.5, "evaluation.select": "copied",
                }
            )
        )  # fmt: skip
    return evaluated_place


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the table in a section, by their first cell."""
    section = text.partition(f"## {heading}")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "|" in line]
    return {first: rest for first, *rest in cells}


def test_an_average_has_the_figures_of_the_test_and_pictures(evaluated: Path, tmp_path: Path) -> None:
    out = export(evaluated, tmp_path / "out", ema=True)
    card = card_of(out)
    assert card.data.pipeline_tag == "image-to-image" and card.data.license is None
    assert card.text.lstrip().startswith("# cups\n")
    assert "2 iterations; an average of the weights" in card.text
    found = rows(card.text, "How good it is")
    summary = {
        name: json.loads((evaluated / "evaluation" / f"{name}.json").read_text())["summary"]
        for name in ("base", "tuned")
    }
    for place, name in enumerate(("base", "tuned")):
        mean, low, high = (100 * summary[name]["joint_success"][key] for key in ("mean", "low", "high"))
        expected = f"{mean:.1f}\u202f% ({low:.1f}\u202f% to {high:.1f}\u202f%)"
        assert found["Joint success"][place] == expected
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.text)
    assert len(pictures) == 3 * 3  # of each sample
    for number, picture in enumerate(pictures):
        kind = ("reference", "base", "tuned")[number % 3]
        sample = f"test-{number // 3:05d}"
        if kind != "reference":
            assert (out / picture).read_bytes() == (
                evaluated / "evaluation" / "images" / f"{sample}_{kind}.png"
            ).read_bytes()


def test_weights_that_were_not_evaluated_say_so(evaluated: Path, tmp_path: Path) -> None:
    """The evaluation is of the average."""
    text = card_of(export(evaluated, tmp_path / "out")).text
    assert "These weights were not evaluated." in text and "## How good it is" not in text and "![" not in text


def test_the_iterations_are_those_that_were_trained(evaluated: Path, tmp_path: Path) -> None:
    """Not those that were asked for: patience may end a run."""
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["iterations"], settings["evaluation"]["patience"] = 9, 1
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    row = json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])
    rows = [row | {"iteration": number, "copied": number / 10} for number in range(3)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "2 iterations; an average" in card_of(export(run, tmp_path / "out", ema=True)).text


def test_a_checkpoint_has_the_figures_of_its_validation(evaluated: Path, tmp_path: Path) -> None:
    text = card_of(export(evaluated / "checkpoints" / "000001", tmp_path / "out", ema=True)).text
    assert "1 iterations" in text and "On the validation data of its run" in text
    lines = [json.loads(line) for line in (evaluated / "evaluations.jsonl").read_text().splitlines()]
    found = rows(text, "How good it is")["Identity kept"]
    assert found == [f"{100 * row['identity_kept']:.1f}\u202f%" for row in lines[:2]]


def test_the_best_is_that_of_its_iteration(evaluated: Path, tmp_path: Path) -> None:
    best = json.loads((evaluated / "best" / "best.json").read_text())["iteration"]
    text = card_of(export(evaluated, tmp_path / "out", best=True)).text
    assert f"{best} iterations; of the best validation; an average of the weights" in text
    assert ("chosen by them" in text) == (best == 0)


def test_an_adapter_exported_from_an_export_has_a_card_without_figures(evaluated: Path, tmp_path: Path) -> None:
    first = export(evaluated, tmp_path / "first", ema=True)
    text = card_of(export(first, tmp_path / "second")).text
    assert "These weights were not evaluated." in text


def test_no_path_of_the_machine_is_in_a_card(evaluated: Path, tmp_path: Path) -> None:
    text = (export(evaluated, tmp_path / "out", ema=True) / "README.md").read_text()
    assert str(tmp_path.parent) not in text and "/tmp" not in text


def code(text: str) -> str:
    return text.partition("```python\n")[2].partition("```")[0]


def settings(kind: str, **pipeline: Any) -> dict[str, Any]:
    tree = {
        "policy": {"kind": kind, "pipeline": {"height": 512, "width": 512, "reference_side": 512} | pipeline},
        "rewards": {
            "prompt": {"kind": "hpsv3", "schedule": "early"},
            "identity": {"kind": "dino", "schedule": "late"},
            "quality": {"kind": "pickscore", "role": "constraint", "at_least": 0.21},
        },
        "rollout": {"num_steps": 25, "shift": 3.0},
    }
    return Config.model_validate(tree).model_dump(mode="json")


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "uno"])
def test_the_call_is_the_documented_one_with_the_settings_of_the_run(
    kind: str, tmp_path: Path, repository: Path
) -> None:
    """The documented lines draw as a run does: tests/policies/test_documented_calls.py."""
    text = write_card(tmp_path / "lion", tmp_path, LAST, settings(kind), MODELS[kind]).read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == MODELS[kind] and front["library_name"] == "diffusers" and "lora" in front["tags"]
    ast.parse(code(text))
    section = (repository / "docs" / "models.md").read_text().partition("## Draw as trained")[2].partition("\n## ")[0]
    documented = [
        block.partition("image = ")[2]
        for block in re.findall(r"```python\n(.*?)```", section, re.S)
        if "image = " in block
    ]
    assert code(text).partition("image = ")[2] in documented
    scheduler = section.partition("pipe.scheduler = ")[2].partition(")\n")[0]
    assert scheduler in code(text)
    assert rows(text, "How it was trained")["reward `quality`"] == ["pickscore, constraint, at least 0.21"]


def test_settings_of_the_run_stand_in_the_call(tmp_path: Path) -> None:
    config = settings("flux1-kontext", height=768, width=640, reference_side=None, guidance_scale=2.5)
    config["rollout"] |= {"num_steps": 12, "shift": None}
    text = code(write_card(tmp_path / "lion", tmp_path, LAST, config, "/models/kontext").read_text())
    for line in ("height=768", "width=640", "max_area=768 * 640", "num_inference_steps=12", "guidance_scale=2.5"):
        assert f"    {line},\n" in text
    assert "scheduler" not in text and "1024 * 1024" in text  # Kontext's own side, which it would not scale to
    assert "/models" not in text and 'from_pretrained("BASE_MODEL"' in text


def test_an_adapter_below_it_is_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "uno.safetensors").touch()
    for named, told in ((str(tmp_path / "uno.safetensors"), "uno.safetensors"), ("me/uno/lora.safetensors",) * 2):
        config = settings("flux1-kontext", base_adapter=named)
        text = write_card(tmp_path / "lion", tmp_path, LAST, config, "me/model").read_text()
        assert f"merged into it**: {told}. Merge that first" in text
    assert "merged" not in write_card(tmp_path / "lion", tmp_path, LAST, settings("uno"), "me/model").read_text()
