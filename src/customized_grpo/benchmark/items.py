"""A benchmark's prompts, with the pictures of their subjects. Nothing here opens a picture."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from customized_grpo.data import SubjectDataset
from customized_grpo.data.entries import Entry, Problem
from customized_grpo.data.formats import is_picture, remedy
from customized_grpo.data.sources import READERS, recognise
from customized_grpo.errors import UserError, truncated
from customized_grpo.io.files import listed

UNFIT = re.compile(r"[^\w.-]+")
"""What a subject's name may have, and a file's is better without."""


@dataclass(frozen=True)
class Item:
    """A prompt to draw. `references`: what is drawn from; `pictures`: all that the benchmark has of the subject."""

    id: str
    subject: str
    prompt: str
    references: tuple[Path, ...]
    pictures: tuple[Path, ...]


def read_items(benchmark: str, folder: Path) -> list[Item]:
    """Return the items of `benchmark` ("dreambench" or "folder") in `folder`, in its order.

    Raises `UserError` where it is of another layout, or not whole: with all that is missing.
    """
    if not folder.is_dir():
        raise UserError(f"data: {folder} is no folder; name the benchmark's")
    if benchmark == "folder":
        samples = list(SubjectDataset.open(folder))
        return _items([(sample.subject, sample.prompt, sample.references, sample.id) for sample in samples])
    layout = recognise(folder)
    if layout not in ("dreambench", "manifest"):
        raise UserError(
            f"data: {folder} is laid out as {layout}; expected DreamBench's folders with its prompts_and_classes.txt, "
            "or a JSON list of prompts and image_paths"
        )
    found = list(READERS[layout](folder))
    problems = [each for each in found if isinstance(each, Problem)]
    entries = [each for each in found if isinstance(each, Entry)]
    files = dict.fromkeys(path for entry in entries for path in entry.references)
    missing = [f"{path.relative_to(folder.resolve())}: no such file" for path in files if not path.is_file()]
    missing = [f"{each.place}: {each.text}" for each in problems] + missing
    if missing or not entries:
        raise UserError(f"data: {folder} is not whole:\n  " + truncated(missing or ["it has no prompt"]))
    # A folder names all pictures of a subject, the first of which is drawn from; a list names what is drawn from.
    one = layout == "dreambench"
    return _items([(_subject(entry, folder), entry.prompt, entry.references, None) for entry in entries], one=one)


def pictures_made_elsewhere(folder: Path, items: Sequence[Item]) -> list[Path]:
    """Return the picture of each item in `folder`: named by the item, or by its number as in 17_0.png.

    Raises `UserError` naming those that are not there, and those that are there twice.
    """
    if not folder.is_dir():
        raise UserError(f"images: {folder} is no folder; name one with a picture for each prompt")
    files = listed(folder)
    found: dict[str, Path] = {}
    for path in files:
        if is_picture(path) and found.setdefault(path.stem, path) != path:
            raise UserError(f"images: {folder} has both {found[path.stem].name} and {path.name}; leave one of them out")
    paths = [found.get(item.id, found.get(f"{number}_0")) for number, item in enumerate(items)]
    missing = [
        f"{item.id}.png or {number}_0.png: {item.prompt}"
        for number, (item, path) in enumerate(zip(items, paths, strict=True))
        if path is None
    ]
    if missing:
        missing += [f"{path.name}: {text}" for path in files if (text := remedy(path.suffix))]
        raise UserError(
            f"images: {folder} lacks {paths.count(None)} of {len(items)} pictures:\n  " + truncated(missing)
        )
    return [path for path in paths if path is not None]


def _items(rows: Sequence[tuple[str | None, str, tuple[Path, ...], str | None]], *, one: bool = False) -> list[Item]:
    """Return the items of (subject, prompt, pictures, id) rows; with `one`, only the first picture is a reference."""
    named = [(subject or name or "", prompt, pictures, name) for subject, prompt, pictures, name in rows]
    pictures_of: dict[str, dict[Path, None]] = {}
    for subject, _, pictures, _ in named:
        pictures_of.setdefault(subject, {}).update(dict.fromkeys(pictures))
    counts: dict[str, int] = {}
    items = []
    for subject, prompt, pictures, name in named:
        number = counts.setdefault(subject, 0)
        counts[subject] += 1
        identifier = name or f"{UNFIT.sub('_', subject)}-{number:02d}"
        drawn_from = pictures[:1] if one else pictures
        items.append(Item(identifier, subject, prompt, drawn_from, tuple(pictures_of[subject])))
    names = Counter(item.id for item in items)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(f"data: two pictures would be named {twice[0]}.png; rename one of the subjects")
    return items


def _subject(entry: Entry, folder: Path) -> str:
    """Return the subject of an entry: entries whose first pictures lie in one folder share it."""
    parent = entry.references[0].parent
    return entry.subject or (entry.references[0].stem if parent == folder.resolve() else parent.name)
