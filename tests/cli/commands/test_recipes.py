"""`recipes`, and --config with the name of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from customized_grpo.cli import main as cli
from customized_grpo.cli.main import build_parser
from customized_grpo.config.recipes import find_recipe, list_recipes

Refused = Callable[..., str]


def options_of(*arguments: str) -> Any:
    """The options of a command, parsed as `main` does it."""
    parser = build_parser()
    chosen = parser.command_of(arguments)[1]
    return parser.parse_args(chosen.resolve_configs(chosen.normalize_flags(arguments)))[arguments[0]]


def test_each_recipe_is_listed_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [list(item) for item in list_recipes().items()]


def test_a_printed_recipe_can_be_saved_and_trained_with(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["recipes", "toybox"])
    printed = capsys.readouterr().out
    assert printed == find_recipe("toybox").read_text(encoding="utf-8")
    Path("mine.yaml").write_text(printed)
    found = [options_of("train", "--config", name).as_dict() | {"config": None} for name in ("mine.yaml", "toybox")]
    assert found[0] == found[1]


@pytest.mark.parametrize("arguments", [["--config", "toybox"], ["--config=toybox"]])
def test_paths_in_a_recipe_are_relative_to_the_folder_of_the_user(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = options_of("train", *arguments, "--iterations", "7")
    assert (options.output, options.data.path, options.iterations) == (
        Path("runs/toybox"),
        Path("data/toybox/train"),
        7,
    )


def test_recipes_and_files_are_merged_in_their_order(settings_file: Callable[..., Path]) -> None:
    path = settings_file({"iterations": 3})
    assert options_of("train", "--config", "toybox", "--config", str(path)).iterations == 3
    assert options_of("train", "--config", str(path), "--config", "toybox").iterations == 30


@pytest.mark.parametrize("command", ["train", "compare", "diagnose", "evaluate"])
def test_a_recipe_that_is_none_is_refused_with_the_names(refused: Refused, command: str) -> None:
    error = refused(command, "--config", "toyboxx")
    assert "--config: toyboxx is not there; expected a YAML file, or the name of a recipe: compare, " in error


def test_a_recipe_of_another_command_is_refused(refused: Refused) -> None:
    assert f"{find_recipe('compare')}:" in refused("train", "--config", "compare")
    assert "choose one of compare, compare-guard, compare-leak, flux1-kontext" in refused("recipes", "flux1")
