"""What several commands share: exit statuses, settings from options, and lines of output."""

import sys
from pathlib import Path
from typing import NoReturn, TypeVar

from jsonargparse import Namespace
from pydantic import ValidationError

from customized_grpo.config.messages import format_validation_error
from customized_grpo.config.run import flatten
from customized_grpo.config.section import Section
from customized_grpo.errors import UserError

SectionT = TypeVar("SectionT", bound=Section)
USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130


def fail(message: str, status: int = USAGE_ERROR) -> NoReturn:
    """Print an error and exit with `status`."""
    print(f"customized-grpo: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def validate_settings(model: type[SectionT], options: Namespace, *flags: str) -> SectionT:
    """Return the options as a configuration; `flags` are options that the configuration does not have.

    Raises `UserError` for settings that do not fit together.
    """
    settings = {key: value for key, value in options.as_dict().items() if key not in ("config", *flags)}
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise UserError(format_validation_error(error)) from error


def changed_settings(config: Section) -> str:
    """Return the names of all fields that differ from their defaults, separated by commas."""
    defaults = flatten(type(config)().model_dump())
    return ", ".join(name for name, value in flatten(config.model_dump()).items() if value != defaults.get(name))


def print_path(what: str, path: Path | str | None) -> None:
    """Print the path or address of what was written; None, as in all processes but the main one, prints nothing."""
    if path is not None:
        print(f"{what}: {path}")
