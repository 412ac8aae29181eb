"""Recipes are found by name; files still by path."""

from pathlib import Path

import pytest

from customized_grpo.config.recipes import find_config, find_recipe, list_recipes
from customized_grpo.errors import UserError


def test_each_recipe_says_for_which_command_it_is() -> None:
    recipes = list_recipes()
    assert {"toybox", "flux1-kontext", "compare"} <= set(recipes) and list(recipes) == sorted(recipes)
    for name, purpose in recipes.items():
        command = "compare" if name.startswith("compare") else "train"
        assert purpose.startswith(f"{command}: ") and purpose.endswith(".") and len(purpose) < 100, purpose


def test_a_recipe_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toybox").mkdir()  # a folder of that name, as of data, is no configuration
    monkeypatch.chdir(tmp_path)
    assert find_config("toybox") == find_recipe("toybox")
    assert find_recipe("toybox").is_absolute() and find_recipe("toybox").is_file()


def test_a_file_wins_over_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toybox").write_text("iterations: 3")
    assert find_config("toybox") == Path("toybox")
    assert find_config(str(tmp_path / "toybox")) == tmp_path / "toybox"


@pytest.mark.parametrize("source", ["toyboxx", "toybox.yaml", "configs/toybox.yaml", "../recipes/toybox", ""])
def test_what_is_neither_is_refused_with_the_names(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ", ".join(list_recipes())
    with pytest.raises(UserError, match=rf"^--config: {Path(source)} is .*the name of a recipe: {names}$"):
        find_config(source)
    with pytest.raises(UserError, match=rf"^recipes: there is no recipe '{source}'; choose one of {names}$"):
        find_recipe(source)
