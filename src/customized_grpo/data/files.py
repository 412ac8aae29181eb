"""What lies in a folder of data: its files without those that systems and tools leave there, and text as lines."""

from pathlib import Path

LEFT_BEHIND = frozenset(
    {
        *("__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *("@eadir", "@recycle", "#recycle", "#snapshot", "lost+found", "__pycache__"),
    }
)
"""Names, in lower case, of what macOS, Windows, network storage, Linux and Python leave in folders."""


def is_left_behind(name: str) -> bool:
    """Tell whether a file or folder of this name is no data: hidden (.DS_Store, ._a.jpg, .cache), or of a system."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def listed(folder: Path) -> list[Path]:
    """List the files and folders in `folder` that are data, in the order of their names."""
    return sorted(path for path in folder.iterdir() if not is_left_behind(path.name))


def read_lines(path: Path) -> list[str]:
    r"""Read the lines of a text file in UTF-8, a byte order mark left out; lines end at \n and \r\n alone.

    Raises UnicodeDecodeError for other encodings.
    """
    return [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
