"""Lines of text files."""

from pathlib import Path


def read_text_lines(path: Path) -> list[str]:
    r"""Read the lines of a text file in UTF-8, a byte order mark left out; lines end at \n and \r\n alone.

    Raises UnicodeDecodeError for other encodings.
    """
    return [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
