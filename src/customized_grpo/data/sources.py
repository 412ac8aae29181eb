"""Subject data in the layouts of others, read as entries: a prompt, pictures of its subject, and masks if any.

Nothing here opens a picture. Paths may not leave the source folder, links followed.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from customized_grpo.data.entries import Entry, EntryOrProblem, Problem, inside
from customized_grpo.data.formats import is_picture, remedy
from customized_grpo.data.hugging_face import is_saved, parquet_files
from customized_grpo.errors import UserError, truncated
from customized_grpo.io.files import listed
from customized_grpo.io.text import read_text_lines

PROMPTS, CLASSES = "prompts.txt", "prompts_and_classes.txt"
MASK = "_mask"
"""Suffix of a mask's name after the name of its picture."""
PLACE = "{}"
"""Where a template of prompts.txt has the subject's name."""
LISTED = 30

Reader = Callable[[Path], Iterator[EntryOrProblem]]


def read_folders(source: Path) -> Iterator[EntryOrProblem]:
    """Read a folder per subject with its pictures and a prompts.txt, one prompt a line.

    `{}` in a prompt stands for the folder's name. Masks, if any, are named after their pictures: toy.jpg and
    toy_mask.png.
    """
    for folder in (path for path in listed(source) if path.is_dir()):
        prompts = folder / PROMPTS
        if not prompts.is_file():
            yield Problem(folder.name, f"no {PROMPTS}; write one prompt a line")
            continue
        name = re.sub(r"[_\W\d]+", " ", folder.name).strip() or folder.name
        try:
            lines = [line.strip() for line in read_text_lines(inside(source, prompts))]
        except UnicodeDecodeError as error:
            yield Problem(
                folder.name, f"{PROMPTS} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
            )
            continue
        except ValueError as error:
            yield Problem(folder.name, str(error))
            continue
        yield from read_subject(source, folder, [line.replace(PLACE, name) for line in lines if line])


def read_dreambench(source: Path) -> Iterator[EntryOrProblem]:
    """Read DreamBench's folder: a folder of pictures per subject, and prompts_and_classes.txt.

    That file holds the subjects' classes and 25 templates for objects and for living things.
    """
    try:
        text = "\n".join(read_text_lines(source / CLASSES))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{source / CLASSES}: cannot be read ({error}); expected DreamBench's file of that name"
        ) from error
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", text, re.MULTILINE))
    classes.pop("subject_name", None)
    lists = [re.findall(r"^'(.*)'\.format\(", part, re.MULTILINE) for part in text.split("prompt_list = [")[1:]]
    if len(lists) != 2 or not all(lists) or not classes:
        raise UserError(
            f"{source / CLASSES}: expected subjects with their classes and two lists of prompts, for objects and for "
            f"living things; found {len(classes)} subjects and {len(lists)} lists"
        )
    objects, living = lists
    missing = [name for name in classes if not (source / name).is_dir()]
    if missing:
        text = f"{len(missing)} of {len(classes)} subjects are missing: {', '.join(missing[:LISTED])}"
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        yield Problem(CLASSES, f"{text}{more}; put a folder with the pictures of each beside it", len(missing))
    for name, kind in classes.items():
        folder = source / name
        if name in missing:
            continue
        templates = living if kind in ("dog", "cat") else objects
        # The first place is DreamBooth's rare token, which a reference takes the place of.
        prompts = [" ".join(template.replace("{0}", "").replace("{1}", kind).split()) for template in templates]
        yield from read_subject(source, folder, prompts)


def read_manifest(source: Path) -> Iterator[EntryOrProblem]:
    """Read JSON lists of `{"prompt", "image_path" or "image_paths"}`, as UNO's and DreamBench's lists are.

    A picture to be drawn (`image_tgt_path`) is not needed.
    """
    for path, number, record in _records(source):
        place = f"{path.name}:{number}"
        paths = record.get("image_paths", record.get("image_path"))
        yield _entry(path.parent, source, place, record.get("prompt"), paths)


def read_syncd(source: Path) -> Iterator[EntryOrProblem]:
    """Read SynCD: JSON lists beside their pictures.

    Either lists of `{"filenames", "prompts"}` with masks/ of the same names, or lists of `{"id", "ref_img", "img",
    "text", "category_description"}`. The reference of a prompt is another picture of its subject.
    """
    for path, number, record in _records(source):
        place = f"{path.name}:{number}"
        if "ref_img" in record:
            subject = record.get("category_description")
            yield _entry(path.parent, source, place, record.get("text"), record["ref_img"], subject=subject)
            continue
        names, prompts = record.get("filenames"), record.get("prompts")
        if not isinstance(names, list) or not isinstance(prompts, list) or not 2 <= len(names) == len(prompts):
            yield Problem(place, 'expected "filenames" and "prompts" of one length, 2 or more')
            continue
        for index, prompt in enumerate(prompts):
            name = names[(index + 1) % len(names)]
            mask = f"masks/{name}" if isinstance(name, str) and (path.parent / "masks" / name).is_file() else None
            yield _entry(path.parent, source, f"{place}.{index}", prompt, name, mask)


HUGGING_FACE = "huggingface"
READERS: dict[str, Reader] = {
    "folders": read_folders,
    "dreambench": read_dreambench,
    "manifest": read_manifest,
    "syncd": read_syncd,
}


def recognise(source: Path) -> str:
    """Return the reader for the folder `source`, of `READERS` or `HUGGING_FACE`. Raises `UserError` where none fits."""
    if is_saved(source):
        return HUGGING_FACE
    if (source / CLASSES).is_file():
        return "dreambench"
    if any((folder / PROMPTS).is_file() for folder in listed(source)):
        return "folders"
    for path in _lists(source):
        first = next(iter(_load(path)), None)
        if isinstance(first, dict):
            return "syncd" if "ref_img" in first or "filenames" in first else "manifest"
    if parquet_files(source):
        return HUGGING_FACE
    raise UserError(
        f"{source}: not a layout that is known: expected subject folders with a {PROMPTS}, DreamBench's {CLASSES}, "
        "a JSON list as UNO or SynCD have it, or a Hugging Face dataset, saved to disk or as parquet files"
    )


def read_subject(source: Path, folder: Path, prompts: Sequence[str]) -> Iterator[EntryOrProblem]:
    """Read the pictures in a `folder` within `source` as one subject, with an entry for each of the `prompts`."""
    files = listed(folder)
    named = {path.stem: path for path in files if is_picture(path)}
    pictures = [path for path in files if is_picture(path) and not path.stem.endswith(MASK)]
    unread: dict[str, list[str]] = {}
    for path in files:
        if text := remedy(path.suffix):
            unread.setdefault(text, []).append(path.name)
    for text, names in unread.items():
        yield Problem(folder.name, f"{truncated(names, ', ', most=5)}: {text}", count=0)
    if not pictures or not prompts:
        yield Problem(folder.name, "no pictures" if prompts else f"{PROMPTS} is empty")
        return
    masks = [named.get(f"{picture.stem}{MASK}") for picture in pictures]
    for number, prompt in enumerate(prompts):
        try:
            references = tuple(inside(source, picture) for picture in pictures)
            cut = tuple(mask and inside(source, mask) for mask in masks)
        except ValueError as error:
            yield Problem(folder.name, str(error))
            return
        yield Entry(f"{folder.name}-{number}", prompt, references, cut if any(cut) else (), folder.name)


def _entry(
    base: Path, root: Path, place: str, prompt: Any, names: Any, mask: str | None = None, subject: Any = None
) -> EntryOrProblem:
    names = [names] if isinstance(names, str) else names
    if not isinstance(prompt, str) or not prompt.strip():
        return Problem(place, f"the prompt is {prompt!r:.80}, expected text")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        return Problem(place, f"the pictures are {names!r:.80}, expected paths")
    try:
        references = tuple(inside(root, base / name) for name in names)
        masks = (inside(root, base / mask),) if mask else ()
    except ValueError as error:
        return Problem(place, str(error))
    return Entry(place, prompt.strip(), references, masks, subject if isinstance(subject, str) and subject else None)


def _records(source: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    for path in _lists(source):
        for number, record in enumerate(_load(path)):
            if isinstance(record, dict):
                yield path, number, record


def _lists(source: Path) -> list[Path]:
    return [path for path in listed(source) if path.suffix == ".json"]


def _load(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error}); expected a list of objects") from error
    return found if isinstance(found, list) else []
