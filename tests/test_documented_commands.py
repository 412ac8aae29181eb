"""The commands of README, docs and recipes: the command line takes each, for as many processes as it says."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from customized_grpo.benchmark.config import BenchmarkConfig
from customized_grpo.cli.main import build_parser
from customized_grpo.cli.parser import BadArguments, Parser
from customized_grpo.compare.config import CompareConfig
from customized_grpo.config.messages import values_of
from customized_grpo.config.recipes import find_recipe, list_recipes
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.factory.config import check_shares

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *map(find_recipe, list_recipes()))
LAUNCHERS = {"torchrun": "--nproc_per_node", "accelerate": "--num_processes"}
ELIDED = {
    "train": ["--config", "flux1-kontext"],
    "generate": ["--reference", "toy.png", "--prompt", "a toy"],
}
"""What `...` stands for in a command."""


def commands(page: Path) -> Iterator[str]:
    """The commands in the code of a page: indented, or in a comment of a recipe; continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        found = re.match(r"(?:#?\s{3,}|#\s+)(?:[A-Z_]+=\S+ )*((customized-grpo|torchrun|accelerate launch) .*)", line)
        if found:
            yield re.sub(r"\s+[#>].*", "", found[1])


EVERY = [(page, command) for page in PAGES for command in commands(page)]


def split(command: str) -> tuple[list[str], int]:
    """The arguments of customized-grpo in a command, and the number of processes."""
    words = shlex.split(command)
    count = 1
    if words[0] in LAUNCHERS:
        count = int(words[words.index(LAUNCHERS[words[0]]) + 1])
        words = words[words.index("customized_grpo") :]
    arguments = words[1:]
    if "..." in arguments:
        place = arguments.index("...")
        arguments[place : place + 1] = ELIDED[arguments[0]]
    for path in (each for each in values_of("config", arguments) if each.endswith(".yaml")):
        place = arguments.index(path)  # what another command or the user writes; recipes go by their names
        del arguments[place - 1 : place + 1]
    return arguments, count


@pytest.fixture(scope="module")
def parser() -> Parser:
    return build_parser()


def settings(parser: Parser, arguments: Sequence[str]) -> tuple[str, Any]:
    """The command and its options, parsed as `main` does it."""
    command = parser.command_of(arguments)[1]
    options = parser.parse_args(command.resolve_configs(command.normalize_flags(arguments)))
    return options.subcommand, options[options.subcommand]


@pytest.mark.parametrize(("page", "command"), EVERY, ids=[f"{page.name}-{n}" for n, (page, _) in enumerate(EVERY)])
def test_a_documented_command_is_taken(page: Path, command: str, parser: Parser) -> None:
    arguments, count = split(command)
    name, options = settings(parser, arguments)
    model = {"train": Config, "compare": CompareConfig, "evaluate": BenchmarkConfig, "diagnose": Config}.get(name)
    if name == "recipes" and options.name is not None:
        find_recipe(options.name)
    if model is None:
        return
    known = set(model.model_fields)
    config = model.model_validate({key: value for key, value in options.as_dict().items() if key in known})
    if isinstance(config, Config):
        check_shares(config, max(count, options.get("num_processes", 1)))


def test_the_commands_are_found() -> None:
    """Commands for several processes are among them, with every launcher."""
    several = [command for page, command in EVERY if page.name == "guide.md" and split(command)[1] > 1]
    assert {command.split()[0] for command in several} == set(LAUNCHERS)
    assert len(EVERY) > 30 and {page.name for page, _ in EVERY} >= {"README.md", "models.md", "uno.yaml"}


def test_a_command_that_is_not_taken_is_found(parser: Parser) -> None:
    for wrong in ("customized-grpo train --config toybox --rollout.et 1", "customized-grpo trains"):
        with pytest.raises(BadArguments):
            settings(parser, split(wrong)[0])
    with pytest.raises(UserError, match="the name of a recipe: compare, "):
        settings(parser, split("customized-grpo train --config toyboxx")[0])
