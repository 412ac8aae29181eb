"""The folder of encoded prompts and references: what is in it, who uses it, and how room is made.

A run holds the folder's lock, shared with other runs, as long as it lives. Files are removed under the exclusive lock
alone, so never under a run that reads them.
"""

import errno
import os
import re
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from customized_grpo.errors import UserError
from customized_grpo.io.files import LOCK, NO_LOCKS, writing

if sys.platform != "win32":
    import fcntl

GIGABYTE = 10**9
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system says where one may read and not write."""
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


@dataclass(frozen=True)
class CacheFile:
    """A file of the cache: its size in bytes, and when it was last used, in seconds since the epoch."""

    path: Path
    bytes: int
    used: float


def list_files(folder: Path) -> list[CacheFile]:
    """Return the files of the cache in `folder`, those of earlier versions too, least recently used first."""
    found = []
    for path in folder.glob("??/*.safetensors"):
        if _NAME.fullmatch(path.name):
            with suppress(FileNotFoundError):  # another process makes room
                about = path.stat()
                found.append(CacheFile(path, about.st_size, about.st_mtime))
    return sorted(found, key=lambda each: each.used)


class Hold:
    """The lock of a cache folder, held until the object goes, or the process ends."""

    def __init__(self, folder: Path) -> None:
        """Hold `folder`, which is made, together with other runs."""
        self._folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _open_lock(folder / LOCK)
        self._share()

    def alone(self) -> None:
        """Raise `UserError` where another run holds the folder; otherwise none can hold it from now on."""
        if sys.platform == "win32" or self._file is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"policy.pipeline.cache: {self._folder} is in use by a run; wait for the run to end, or name another "
                "folder"
            ) from error
        except OSError as error:
            if error.errno == errno.EBADF:  # of a network disk, for a lock that may only be read
                raise UserError(
                    f"policy.pipeline.cache: {self._folder} is another user's, so nothing can be removed from it; "
                    "name one of your own"
                ) from error
            if error.errno not in NO_LOCKS:
                raise

    def _share(self) -> None:
        if sys.platform == "win32" or self._file is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def remove(self, files: Sequence[CacheFile]) -> None:
        """Remove `files`, where no other run holds the folder. Raises `UserError` where one does."""
        self.alone()
        try:
            with writing(self._folder):
                for each in files:
                    each.path.unlink(missing_ok=True)
        finally:
            self._share()

    def close(self) -> None:
        """Let the folder go."""
        if self._file is not None:
            self._file.close()


def clear(folder: Path) -> tuple[int, int]:
    """Remove all files of the cache in `folder`; returns their number and bytes. Raises `UserError` where a run uses
    the folder."""
    files = list_files(folder)
    if files:
        hold = Hold(folder)
        try:
            hold.remove(files)
        finally:
            hold.close()
    return len(files), sum(each.bytes for each in files)


def surplus(files: Sequence[CacheFile], keep: Collection[Path], most: float) -> list[CacheFile]:
    """Return the `files`, least recently used first, that must go so that those outside `keep` take at most `most`
    bytes."""
    others = [each for each in files if each.path not in keep]
    left = sum(each.bytes for each in others)
    gone = []
    for each in others:
        if left <= most:
            break
        gone.append(each)
        left -= each.bytes
    return gone


def mark_used(path: Path) -> None:
    """Note that `path` was used now, where this user may change it: a cache may be another's."""
    try:
        os.utime(path)
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise


def _open_lock(path: Path) -> IO[str] | None:
    """Return the lock's file, read-only if it is another user's, None if it cannot be made.

    A user who may not write there does not remove files either.
    """
    if path.is_file() and not os.access(path, os.W_OK):
        return path.open()
    if not path.is_file() and not os.access(path.parent, os.W_OK):
        return None
    with writing(path.parent):
        return path.open("a+")  # to be read, too: some network disks want that for a shared lock


def gigabytes(count: float) -> str:
    """Return a number of bytes for people, in units of 10^9."""
    return f"{count / GIGABYTE:.3g} GB" if count >= GIGABYTE / 1000 else f"{count / 1e6:.3g} MB"
