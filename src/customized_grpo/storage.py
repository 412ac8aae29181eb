"""Files that are whole or not there, and words for a disk that takes no more."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from customized_grpo.errors import UserError, first_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, no quota, or a limit on the size of files."""
UNFINISHED = ".part"
"""How the names of files end that are being written."""


class StorageError(UserError):
    """A file of a run could not be written: the disk is full, or does not take it."""


@contextmanager
def writing(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Within it files are written into `folder`, of `needed` bytes where that is known. Raises `StorageError` where
    that fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(_worded(folder, needed, error)) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file that replaces the one before it when it is complete."""
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _worded(folder: Path, needed: int | None, error: OSError | SafetensorError) -> str:
    size = "" if needed is None else f"{needed / 1e6:.1f} MB are needed, "
    if _number(error) not in FULL:
        return f"{folder}: cannot be written to ({first_line(error)}); see that the folder is there and yours"
    return (
        f"{folder}: no space to write ({first_line(error)}): {size}{_free(folder) / 1e6:.1f} MB are free on the disk. "
        "Make room, or raise the quota or the limit on the size of files"
    )


def _number(error: OSError | SafetensorError) -> int | None:
    """The operating system's number of an error; safetensors has it in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _free(folder: Path) -> int:
    nearest = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(nearest).free
