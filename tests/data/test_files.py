"""What counts as a line of a text file, and what in a folder is data."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from customized_grpo.data import SubjectDataset
from customized_grpo.data.prepare import Options, prepare
from customized_grpo.io.files import is_left_behind, listed
from customized_grpo.io.jsonl import read_lines as read_log
from customized_grpo.io.text import read_text_lines

# What Python's str.splitlines takes for the end of a line beside \n, \r\n and \r.
OTHERS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
LINE = st.text(st.sampled_from(f"ab {OTHERS}\r"), max_size=8).map(lambda text: text.rstrip("\r"))


@given(st.lists(LINE, min_size=1), st.booleans(), st.randoms(use_true_random=False))
def test_lines_end_at_newlines_alone(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], bom: bool, ends: random.Random
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    text = lines[0] + "".join(ends.choice(["\n", "\r\n"]) + line for line in lines[1:])
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    assert read_text_lines(path) == lines


def test_other_encodings_are_told(tmp_path: Path) -> None:
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "a.txt").write_bytes("a café".encode(encoding))
        with pytest.raises(UnicodeDecodeError):
            read_text_lines(tmp_path / "a.txt")


@pytest.mark.parametrize("separator", OTHERS)
def test_a_prompt_may_hold_any_separator_but_a_newline(tmp_path: Path, separator: str) -> None:
    folder = tmp_path / "src" / "toy"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    text = f"\ufeffa toy{separator}in the snow\r\n\r\na {{}} on a beach\n"
    (folder / "prompts.txt").write_bytes(text.encode())
    prepare(tmp_path / "src", tmp_path / "out", Options())
    prompts = [sample.prompt for sample in SubjectDataset.open(tmp_path / "out")]
    assert prompts == [f"a toy{separator}in the snow", "a toy on a beach"]


@pytest.mark.parametrize("separator", "\u2028\u2029\x85")
def test_lines_of_a_log_may_hold_any_separator_but_a_newline(tmp_path: Path, separator: str) -> None:
    rows = [{"iteration": number, "note": f"a{separator}b"} for number in (1, 2)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"iteration": 3, "no'
    (tmp_path / "log.jsonl").write_bytes(text.encode())
    assert read_log(tmp_path / "log.jsonl") == rows
    (tmp_path / "log.jsonl").write_bytes(text.encode() + "é".encode()[:1])
    assert read_log(tmp_path / "log.jsonl") == rows


LEFT = (
    *(
        ".DS_Store",
        "._a.png",
        ".cache",
        ".ipynb_checkpoints",
        ".git",
        ".thumb.png",
        "__MACOSX",
        "Thumbs.db",
        "THUMBS.DB",
    ),
    *("desktop.ini", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Icon\r"),
)


def test_what_systems_leave_is_no_data(tmp_path: Path) -> None:
    data = ["a.png", "_b.png", "c", "thumbs", "my.cache"]
    for name in (*LEFT, *data):
        (tmp_path / name).touch()
    assert [path.name for path in listed(tmp_path)] == sorted(data)
    assert all(map(is_left_behind, LEFT)) and not any(map(is_left_behind, data))
