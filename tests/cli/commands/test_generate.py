"""`generate`: its options."""

from collections.abc import Callable
from pathlib import Path

from customized_grpo.cli.main import build_parser

Refused = Callable[..., str]


def test_pictures_are_written_as_png(refused: Refused, tmp_path: Path) -> None:
    arguments = ["--reference", "a.png", "--prompt", "a star", "--out", "a.jpg"]
    assert "ends in .png, not a.jpg" in refused("generate", "--run", tmp_path, *arguments)


def test_references_are_named_together_or_one_by_one() -> None:
    arguments = ["generate", "--run", "r", "--prompt", "a star", "--reference", "a.png", "b.png", "--reference=c.png"]
    found = build_parser().parse_args(arguments).generate.reference
    assert [path.name for path in found] == ["a.png", "b.png", "c.png"]
