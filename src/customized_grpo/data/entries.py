"""What the readers of others' data yield: entries, and what is wrong with those that are none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A prompt about a subject. `place` says where it was read, for messages; `masks` is empty or as `references`, with
    None where a picture has none; `labels` says what messages call a picture whose file is not the user's."""

    place: str
    prompt: str
    references: tuple[Path, ...]
    masks: tuple[Path | None, ...] = ()
    subject: str | None = None
    labels: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """What is wrong with an entry, and where; or with `count` of them at once. With a count of 0 no entry is lost, but
    something in the folder is left out of them."""

    place: str
    text: str
    count: int = 1


EntryOrProblem = Entry | Problem


def inside(root: Path, path: Path) -> Path:
    """Return the file that `path` means, links followed. Raises ValueError when it is outside the folder `root`."""
    real, top = path.resolve(), root.resolve()
    if not real.is_relative_to(top):
        raise ValueError(f"{path.name} leads out of {root} to {real}; move the file into it")
    return real
