"""Errors that end a command, and their words."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Bad input, said in one clear message: what was found, where, what was expected and what to do.

    The command line prints the message and exits with status 2.
    """


class TrainingError(Exception):
    """Training cannot go on: a number is not finite, the rewards failed, or a process is gone. Says at which iteration,
    and what to do."""


class NotFinite(TrainingError):
    """The generator draws pictures that are not finite."""


class WeightsDivergedError(TrainingError):
    """Processes hold different weights: none of them is worth saving."""


@contextmanager
def telling_where(where: str) -> Iterator[None]:
    """Put `where` before the words of a `NotFinite` that is raised within."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"{where}: {error}") from error


def truncated(items: Sequence[str], separator: str = "\n  ", most: int = 20) -> str:
    """Return the first `most` items, and the number of the others."""
    more = [f"... and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return which of the fields `names` differ, and how; empty if none does."""
    changed = sorted(name for name in names if before.get(name) != now.get(name))
    return "; ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in changed)


def first_line(error: Exception) -> str:
    """Return the first line of an error, short enough to quote."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
