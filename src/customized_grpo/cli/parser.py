"""The parser of the command line and of each command. Nothing here loads torch."""

import argparse
import re
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from customized_grpo.cli.kinds import reset_other_kinds
from customized_grpo.config.files import check_file
from customized_grpo.config.messages import annotation_at, default_at, field_names, named_section
from customized_grpo.config.recipes import find_config
from customized_grpo.config.section import Section
from customized_grpo.errors import UserError

CONFIG_HELP = "YAML file of settings, or the name of a recipe; options given after it override it"


class BadArguments(Exception):
    """The arguments, or a configuration file they name, are wrong."""


class Parser(ArgumentParser):
    """Take options by their whole names alone, and leave the wording of errors to `main`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self.commands: dict[str, Parser] = {}
        self.settings: type[Section] | None = None

    def command_of(self, arguments: Sequence[str]) -> tuple[list[str], "Parser"]:
        """Return the words of `arguments` that name a command, and its parser."""
        if not arguments or arguments[0] not in self.commands:
            return [], self
        words, command = self.commands[arguments[0]].command_of(arguments[1:])
        return [arguments[0], *words], command

    def add_config(self, settings: type[Section], help: str = CONFIG_HELP) -> None:
        """Add the option --config, for a file with the fields of `settings`."""
        self.settings = settings
        self.add_argument("--config", action="config", help=help)

    def add_fields(self, settings: type[Section], skip: Collection[str] = ()) -> None:
        """Add the fields of `settings` as options, without those to `skip`."""
        self.add_class_arguments(settings, skip=set(skip))
        # As plain trees: an option for one field of a section with a name of the user's would replace a whole object.
        for place in (name for name in field_names(settings) if name.split(".")[0] not in skip):
            if named_section(annotation_at(settings, place)):
                sections = default_at(settings, place)
                self.set_defaults(
                    {place: {n: s.model_dump(mode="json", exclude_unset=True) for n, s in sections.items()}}
                )

    def options(self) -> list[str]:
        """Return the names of all options that the help shows, without those with "+", which append to a list."""
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        names = [name for action in shown for name in action.option_strings]
        return [name[2:] for name in names if name.startswith("--") and not name.endswith("+")]

    def normalize_flags(self, arguments: Sequence[str]) -> list[str]:
        """Write --max-bad as --max_bad: the names of this command's options, no value, and nothing after `--`."""
        end = arguments.index("--") if "--" in arguments else len(arguments)
        known = {f"--{name}" for name in self.options()}
        return [*(_normalize_flag(argument, known) for argument in arguments[:end]), *arguments[end:]]

    def resolve_configs(self, arguments: Sequence[str]) -> list[str]:
        """Replace the values of --config, paths or names of recipes, by paths; check each file for itself.

        Once the files are merged, nothing says which file and line a setting came from. Raises `UserError`.
        """
        resolved = list(arguments)
        for index, argument in enumerate(arguments) if self.settings else ():
            if argument.startswith("--config="):
                resolved[index] = f"--config={self._resolve_config(argument.removeprefix('--config='))}"
            elif index and arguments[index - 1] == "--config":
                resolved[index] = self._resolve_config(argument)
        return resolved if self.settings is None else reset_other_kinds(resolved, self.settings)

    def _resolve_config(self, source: str) -> str:
        assert self.settings is not None
        path = find_config(source)
        check_file(path, self.settings)
        return str(path)

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Return the help; fields of sections with names of the user's have NAME in place of one."""
        text = super().format_help(formatter)
        return re.sub(r"--(\S*\b(?:rewards|evaluation\.metrics))\.(?!help\b|NAME\b)(?=\w)", r"--\1.NAME.", text)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `BadArguments`."""
        raise BadArguments(message) from ex


class FileOnly(argparse.Action):
    """A setting that a configuration file may hold and that is not an option here; `const` says why."""

    def __call__(self, *arguments: object) -> NoReturn:
        raise UserError(str(self.const))


def _normalize_flag(argument: str, known: set[str]) -> str:
    name, equals, value = argument.partition("=")
    plain = "--" + name.removeprefix("--").replace("-", "_")
    return plain + equals + value if name.startswith("--") and plain in known else argument
