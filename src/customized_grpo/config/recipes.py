"""The recipes: configuration files that come with the package, found by name."""

from pathlib import Path

from customized_grpo.errors import UserError

FOLDER = Path(__file__).parents[1] / "recipes"


def list_recipes() -> dict[str, str]:
    """Return the purpose of each recipe, the first line of its file, by name."""
    files = sorted(FOLDER.glob("*.yaml"), key=lambda path: path.stem)
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for path in files}


def find_recipe(name: str) -> Path:
    """Return the file of the recipe `name`. Raise `UserError` if there is no such recipe."""
    names = list(list_recipes())
    if name not in names:
        raise UserError(f"recipes: there is no recipe '{name}'; choose one of {', '.join(names)}")
    return FOLDER / f"{name}.yaml"


def find_config(source: str) -> Path:
    """Return the configuration file at the path `source`, or the recipe of that name. Raise `UserError` if neither is.

    A file wins over a recipe of the same name.
    """
    path, names = Path(source), list(list_recipes())
    if not path.is_file() and source in names:
        return find_recipe(source)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is not there"
        raise UserError(f"--config: {path} {found}; expected a YAML file, or the name of a recipe: {', '.join(names)}")
    return path
