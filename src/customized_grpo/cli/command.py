"""What each file of `commands` provides, and how a parser takes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jsonargparse import Namespace

from customized_grpo.cli.parser import Parser


@dataclass(frozen=True)
class Command:
    """A command: its `name`, a line of `help`, its parser, and what it does with the parsed options.

    `resume_hint` follows the word "interrupted" when the user stops the command. `actions` are commands of its own, as
    in `toybox export`; `run` passes the options on to them.
    """

    name: str
    help: str
    build_parser: Callable[[], Parser]
    run: Callable[[Namespace], None]
    resume_hint: str = ""
    actions: Sequence["Command"] = ()


def find_command(commands: Sequence[Command], name: str) -> Command:
    """Return the command called `name`."""
    return next(command for command in commands if command.name == name)


def add_commands(parser: Parser, commands: Sequence[Command], title: str) -> None:
    """Add `commands` and their actions to `parser`, under a heading `title` of its help."""
    group = parser.add_subcommands(required=True, title=title)
    for command in commands:
        # jsonargparse wants a command in its place before the command gets actions.
        group.add_subcommand(command.name, added := command.build_parser(), help=command.help)
        if command.actions:
            add_commands(added, command.actions, "actions")
    parser.commands = group.choices
