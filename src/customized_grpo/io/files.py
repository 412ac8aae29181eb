"""Files that are whole or not there, and words for a disk that takes no more."""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from customized_grpo.errors import UserError, first_line, truncated

LEFT_BEHIND = frozenset(
    {
        *("__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *("@eadir", "@recycle", "#recycle", "#snapshot", "lost+found", "__pycache__"),
    }
)
"""Names, in lower case, of what macOS, Windows, network storage, Linux and Python leave in folders."""

if sys.platform != "win32":
    import fcntl

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, no quota, or a limit on the size of files."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""This disk knows no locks."""
LOCK = ".lock"
UNFINISHED = ".part"
"""How the names of files end that are being written."""


class StorageError(UserError):
    """A file of a run could not be written: the disk is full, or does not take it."""


@contextmanager
def writing(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Write files into `folder` within it, of `needed` bytes where that is known.

    Raises `StorageError` where that fails. Guards may be nested: the outermost names its own folder, which is the one
    that the user named.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(_worded(folder, needed, error)) from error
    except StorageError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError | SafetensorError):
            raise
        raise StorageError(_worded(folder, needed, cause)) from cause


@contextmanager
def downloading(folder: Path, setting: str) -> Iterator[None]:
    """Raise `StorageError` where the disk of `folder` fills up within; other errors pass.

    `setting`: the environment variable that moves the folder to another disk.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: of hf_xet
        if _number(error) not in FULL:
            raise
        raise StorageError(f"{_worded(folder, None, error)}, or name a folder on another disk in {setting}") from error


@contextmanager
def replacing(path: Path, unfinished: Path | None = None) -> Iterator[Path]:
    """Yield the path of a file to write, which takes the place of `path` at the end and is removed on any error.

    `unfinished` is that path; by default `path` with `.part` after its name, for which there may be one writer at a
    time. The folder is made. Raises `StorageError` where the disk does not take it.
    """
    unfinished = unfinished or path.with_name(path.name + UNFINISHED)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def check_folder(folder: Path, name: str) -> None:
    """Raise `UserError`, naming the option `name`, where `folder` cannot be written into, or cannot be made."""
    nearest = _nearest(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "cannot be written to" if nearest.is_dir() else "is a file"
        raise UserError(f"{name}: {nearest} {what}; name a folder elsewhere")


def write_whole(path: Path, text: str) -> None:
    """Write a text file that replaces the one before it when it is complete. Raises `StorageError`."""
    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file of `tensors` by name, whole or not at all. Raises `StorageError`."""
    with writing(path.parent, sum(tensor.nbytes for tensor in tensors.values())):
        # safetensors writes to a file of another name, and renames it.
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
        follow_umask(path)


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise `UserError`, naming the file `path` and the tensors, where some hold numbers that are not finite."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _is_finite(tensor)]
    if bad:
        raise UserError(
            f"{path}: {len(bad)} of its {len(tensors)} tensors hold numbers that are not finite "
            f"({truncated(bad, ', ', 3)}): the run that wrote it diverged, or the file is damaged; take an earlier one"
        )


def _is_finite(tensor: Tensor) -> bool:
    # Of types of one byte there is no test.
    return bool((tensor if tensor.itemsize > 1 else tensor.float()).isfinite().all())


def follow_umask(path: Path) -> None:
    """Apply the umask to `path`; safetensors makes files readable by their owner only."""
    mask = os.umask(0o077)  # it cannot be read without being set
    os.umask(mask)
    with suppress(PermissionError):  # of a disk that keeps no modes
        path.chmod(0o666 & ~mask)


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Read the header of an open safetensors file: types, shapes and places of tensors by name, and `__metadata__`."""
    header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which is never in memory as a whole."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path, what: str) -> Iterator[int | None]:
    """Hold the lock of `folder`, so that nothing else (`what`) writes into it.

    Yields the descriptor, which processes that inherit it hold too; None on a disk without locks. Raises `UserError` if
    another process holds the lock.
    """
    with writing(folder):
        file = (folder / LOCK).open("w")
    with file as lock:
        held: int | None = None
        if sys.platform != "win32":
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = lock.fileno()
            except BlockingIOError as error:
                raise UserError(
                    f"output: {folder} is being worked on by {what}, or by processes that a killed one left behind; "
                    "wait for them, or end them"
                ) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
        yield held


def _worded(folder: Path, needed: int | None, error: Exception) -> str:
    size = "" if needed is None else f"{needed / 1e6:.1f} MB are needed, "
    if _number(error) not in FULL:
        return f"{folder}: cannot be written to ({first_line(error)}); see that the folder is there and yours"
    free = free_bytes(folder)
    return (
        f"{folder}: no space to write ({first_line(error)}): {size}{free / 1e6:.1f} MB are free on the disk. "
        "Make room, or raise the quota or the limit on the size of files"
    )


def _number(error: Exception) -> int | None:
    """Return the operating system's number of an error, or of the one that it was raised from; None without one.

    Libraries in Rust have it in their text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    return _number(error.__cause__) if isinstance(error.__cause__, Exception) else None


def free_bytes(folder: Path) -> int:
    """Return how many bytes are free on the disk of `folder`, which need not be there yet."""
    return shutil.disk_usage(_nearest(folder)).free


def _nearest(folder: Path) -> Path:
    """Return `folder`, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())


def is_left_behind(name: str) -> bool:
    """Tell whether a file or folder of this name is no data: hidden (.DS_Store, ._a.jpg, .cache), or of a system."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def listed(folder: Path) -> list[Path]:
    """List the files and folders in `folder` that are data, in the order of their names."""
    return sorted(path for path in folder.iterdir() if not is_left_behind(path.name))
