"""`customized-grpo prepare`: subject data as others lay it out -> the data folder that training reads."""

import math
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.data.dataset import METADATA, Sample, write_metadata
from customized_grpo.data.entries import Entry, EntryOrProblem, Problem
from customized_grpo.data.hugging_face import Named, open_tables, read_hugging_face
from customized_grpo.data.images import MAX_PIXELS, load_image, resize, save_image, to_pil, within
from customized_grpo.data.masks import load_mask_of
from customized_grpo.data.sources import HUGGING_FACE, READERS, recognise
from customized_grpo.errors import UserError, truncated
from customized_grpo.io.files import StorageError, check_folder, writing

LARGEST = 150_000_000
"""Pixels of the largest picture that is taken, by its header; more could be meant to exhaust memory."""
LARGEST_SIDE = math.isqrt(MAX_PIXELS)
"""Pixels of the largest `max_side`: what is written has to be small enough to be opened."""
LISTED = 50
Segment = Callable[[Tensor], Tensor]
"""A picture [3, H, W] to the mask [1, H, W] of its subject."""
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """How entries become samples. `references`: "first" or "all" pictures of a subject; `max_side`: larger pictures are
    scaled down to it, in pixels; `max_bad`: so many entries may be unusable, and are left out; `prompt_column`,
    `reference_column` and `split`: what to read of a Hugging Face dataset."""

    format: str = "auto"
    references: str = "first"
    max_side: int = 1024
    segment: bool = False
    max_bad: int = 0
    prompt_column: str | None = None
    reference_column: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of it: samples written (or writable), distinct pictures, and what is wrong with the others."""

    format: str
    samples: int
    pictures: int
    problems: Sequence[Problem]


def prepare(
    source: Path, output: Path | None, options: Options, on_progress: OnProgress = lambda done, of: None
) -> Outcome:
    """Read `source`, check every entry and picture, and write a data folder `output`; None only checks.

    Raises `UserError` when the layout is not known, the output is not empty, and, listing the problems, when more than
    `max_bad` entries are unusable: then nothing is left behind.
    """
    _check(source, output, options)
    name = recognise(source) if options.format == "auto" else options.format
    total, reading = _reading(name, source, options)
    return write_entries(name, source, output, options, total, reading, on_progress)


def write_entries(
    name: str, source: Path, output: Path | None, options: Options, total: int, reading: Generator[EntryOrProblem],
    on_progress: OnProgress = lambda done, of: None,
) -> Outcome:  # fmt: skip
    """Check the `total` entries of `reading`, which are of `source` in the layout `name`, and write them as `prepare`
    does."""
    output = None if output is None else output.absolute()  # a manifest's relative paths count from its folder
    segment = _segmenter() if options.segment and output is not None else None
    partial = None if output is None else output.with_name(f".{output.name}.partial")
    if partial is not None:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        pictures = _Pictures(partial, options.max_side, segment, options.segment)
        samples: list[Sample] = []
        problems: list[Problem] = []
        with closing(reading) as found:
            for number, each in enumerate(found):
                made = pictures.sample(each, f"{number:06d}", options.references) if isinstance(each, Entry) else each
                if isinstance(made, Problem):
                    problems.append(made)
                else:
                    samples.append(made)
                on_progress(number + 1, total)
        bad = sum(problem.count for problem in problems)
        if bad > options.max_bad or not samples:
            raise UserError(_listed(source, problems, bad, len(samples) + bad, options.max_bad))
        if partial is not None and output is not None:
            # It opens: the lines are checked here, and the pictures are our own.
            write_metadata(partial, samples)
            with writing(output.parent):
                if output.exists():
                    output.rmdir()
                os.replace(partial, output)
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return Outcome(name, len(samples), pictures.count, problems)


def _check(source: Path, output: Path | None, options: Options) -> None:
    if not 16 <= options.max_side <= LARGEST_SIDE or options.max_bad < 0:
        raise UserError(f"--max_side is at least 16 pixels and at most {LARGEST_SIDE}, and --max_bad at least 0")
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not an empty folder; name a new one")
    if output is not None:
        check_folder(output, "out")
    if not source.is_dir():
        raise UserError(f"{source} is no folder")


def _reading(name: str, source: Path, options: Options) -> tuple[int, Generator[EntryOrProblem]]:
    """Return the number of entries and problems, and an iterator over both."""
    if name == HUGGING_FACE:
        tables = open_tables(source, options.split)
        named = Named(options.prompt_column, options.reference_column)
        return sum(table.rows for table in tables), read_hugging_face(source, tables, named)
    for setting in ("prompt_column", "reference_column", "split"):
        if getattr(options, setting) is not None:
            raise UserError(
                f"--{setting}: only for a Hugging Face dataset, and {source} is read as {name}; leave it out"
            )
    found = list(READERS[name](source))
    return len(found), (each for each in found)


class _Pictures:
    """Writes each distinct picture once, with its mask; or, without a folder, only looks at it.

    With `makes_masks`, missing masks are made by `segment` if there is a folder.
    """

    def __init__(self, folder: Path | None, max_side: int, segment: Segment | None, makes_masks: bool) -> None:
        self._folder, self._max_side, self._segment, self._makes_masks = folder, max_side, segment, makes_masks
        self._written: dict[tuple[Path, Path | None], tuple[Path, Path | None] | str] = {}

    @property
    def count(self) -> int:
        return sum(not isinstance(each, str) for each in self._written.values())

    def sample(self, entry: Entry, identifier: str, references: str) -> Sample | Problem:
        """Return an entry as written, with its first reference or all.

        A problem names the first picture.
        """
        last = 1 if references == "first" else len(entry.references)
        masks: Sequence[Path | None] = entry.masks or [None] * len(entry.references)
        written = [self._write(*pair) for pair in zip(entry.references[:last], masks[:last], strict=True)]
        wrong = [each for each in written if isinstance(each, str)]
        if wrong:
            text = wrong[0]
            for path, label in entry.labels.items():
                text = text.replace(str(path), label)
            return Problem(entry.place, text)
        subject = (entry.subject or "").strip() or None
        if not _is_text(entry.prompt + (subject or "")):
            return Problem(entry.place, "its prompt or subject has half of a surrogate pair, which no file can hold")
        pairs = [each for each in written if not isinstance(each, str)]
        cut = [mask for _, mask in pairs if mask is not None]
        if cut and len(cut) < len(pairs) and not self._makes_masks:
            bare = [path.name for path, (_, mask) in zip(entry.references, pairs, strict=False) if mask is None]
            text = f"{len(bare)} of {len(pairs)} pictures have no mask: {truncated(bare, ', ', most=5)}"
            return Problem(entry.place, f"{text}; draw them, or make them with --segment")
        return Sample(identifier, entry.prompt, tuple(image for image, _ in pairs), tuple(cut), subject)

    def _write(self, path: Path, mask: Path | None) -> tuple[Path, Path | None] | str:
        key = (path, mask)
        if key not in self._written:
            try:
                self._written[key] = self._made(path, mask, f"{len(self._written):06d}")
            except StorageError:
                raise  # nothing is wrong with the picture
            except UserError as error:
                self._written[key] = str(error)
        return self._written[key]

    def _made(self, path: Path, mask: Path | None, name: str) -> tuple[Path, Path | None]:
        image = within(load_image(path, LARGEST), self._max_side)
        cut = None if mask is None else load_mask_of(path, mask, LARGEST)
        if cut is None and self._segment is not None:
            cut = self._segment(image)
            if cut.max() <= 0.5:
                raise UserError(f"{path}: no subject was found to cut out; draw its mask by hand")
        if cut is not None:
            cut = resize(cut, (image.shape[1], image.shape[2]))
            if cut.max() <= 0.5:
                raise UserError(f"{mask}: nothing is left of the mask at the size of its picture; draw it larger")
        if self._folder is None:
            return path, mask
        target = self._folder / "images" / f"{name}.png"
        save_image(image, target)
        if cut is None:
            return target, None
        save_image(cut, target.with_name(f"{name}_mask.png"))
        return target, target.with_name(f"{name}_mask.png")


def _is_text(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _segmenter() -> Segment:
    try:
        import rembg
    except ImportError as error:
        raise UserError("--segment needs rembg: pip install 'customized-grpo[segment]'") from error
    session: Any = rembg.new_session()

    def segment(image: Tensor) -> Tensor:
        mask = rembg.remove(to_pil(image), session=session, only_mask=True).convert("L")
        pixels = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8)
        return pixels.reshape(1, mask.size[1], mask.size[0]).float() / 255

    return segment


def _listed(source: Path, problems: Sequence[Problem], bad: int, entries: int, max_bad: int) -> str:
    if not problems:
        return f"{source} holds no entry: nothing to write to {METADATA}"
    listed = truncated([f"{problem.place}: {problem.text}" for problem in problems], most=LISTED)
    head = f"{source}: {bad} of {entries} entries cannot be used"
    limit = f", more than --max_bad={max_bad} allows:" if bad > max_bad else ", and there is no other:"
    return f"{head}{limit}\n  {listed}"
