"""`customized-grpo recipes`: list the recipes in the package, or print one."""

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.parser import Parser
from customized_grpo.config.recipes import find_recipe, list_recipes


def build_parser() -> Parser:
    """Return the parser of `recipes`."""
    recipes = Parser(
        description="List the configurations that come with the package; --config takes them by name. With a name, "
        "print that file, to save and edit it: customized-grpo recipes NAME > mine.yaml"
    )
    recipes.add_argument("name", type=str | None, nargs="?", help="recipe to print; default: list all")
    return recipes


def run(options: Namespace) -> None:
    """Print the file of a recipe, or a line for each recipe."""
    if options.name is not None:
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
        return
    recipes = list_recipes()
    width = max(map(len, recipes))
    for name, purpose in recipes.items():
        print(f"{name:<{width}}  {purpose}")


RECIPES = Command("recipes", "list the configurations that --config takes by name", build_parser, run)
