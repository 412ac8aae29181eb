"""`customized-grpo prepare`: subject data as others lay it out -> the data folder that training reads."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.data.dataset import METADATA, Sample, SubjectDataset, write_metadata
from customized_grpo.data.images import load_image, load_mask, resize, save_image, to_pil
from customized_grpo.data.sources import READERS, Entry, Problem, recognise
from customized_grpo.errors import UserError

LARGEST = 150_000_000
"""Pixels of the largest picture that is taken, by its header; more could be meant to exhaust memory."""
LISTED = 50
Segment = Callable[[Tensor], Tensor]
"""A picture [3, H, W] to the mask [1, H, W] of its subject."""
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """How entries become samples. `references`: "first" or "all" pictures of a subject; `max_side`: larger pictures are
    scaled down to it, in pixels; `max_bad`: so many entries may be unusable, and are left out."""

    format: str = "auto"
    references: str = "first"
    max_side: int = 1024
    segment: bool = False
    max_bad: int = 0


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
    if options.max_side < 16 or options.max_bad < 0:
        raise UserError("--max_side is at least 16 pixels, and --max_bad at least 0")
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not an empty folder; name a new one")
    name = recognise(source) if options.format == "auto" else options.format
    segment = _segmenter() if options.segment and output is not None else None
    found = list(READERS[name](source))
    problems = [each for each in found if isinstance(each, Problem)]
    entries = [_chosen(each, options.references) for each in found if isinstance(each, Entry)]
    partial = None if output is None else output.with_name(f".{output.name}.partial")
    if partial is not None:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        pictures = _Pictures(partial, options.max_side, segment)
        samples = []
        for number, entry in enumerate(entries):
            sample = pictures.sample(entry, f"{number:06d}")
            if isinstance(sample, Problem):
                problems.append(sample)
            else:
                samples.append(sample)
            on_progress(number + 1, len(entries))
        if len(problems) > options.max_bad or not samples:
            raise UserError(_listed(source, problems, len(found), options.max_bad))
        if partial is not None and output is not None:
            write_metadata(partial, samples)
            if output.exists():
                output.rmdir()
            os.replace(partial, output)
            SubjectDataset.open(output)
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return Outcome(name, len(samples), pictures.count, problems)


class _Pictures:
    """Writes each distinct picture once, with its mask; or, without a folder, only looks at it."""

    def __init__(self, folder: Path | None, max_side: int, segment: Segment | None) -> None:
        self._folder, self._max_side, self._segment = folder, max_side, segment
        self._written: dict[tuple[Path, Path | None], tuple[Path, Path | None] | str] = {}

    @property
    def count(self) -> int:
        return sum(not isinstance(each, str) for each in self._written.values())

    def sample(self, entry: Entry, identifier: str) -> Sample | Problem:
        masks: Sequence[Path | None] = entry.masks or [None] * len(entry.references)
        written = [self._write(path, mask) for path, mask in zip(entry.references, masks, strict=True)]
        wrong = [each for each in written if isinstance(each, str)]
        if wrong:
            return Problem(entry.place, wrong[0])
        pairs = [each for each in written if not isinstance(each, str)]
        cut = [mask for _, mask in pairs if mask is not None]
        return Sample(identifier, entry.prompt, tuple(image for image, _ in pairs), tuple(cut), entry.subject)

    def _write(self, path: Path, mask: Path | None) -> tuple[Path, Path | None] | str:
        key = (path, mask)
        if key not in self._written:
            try:
                self._written[key] = self._made(path, mask, f"{len(self._written):06d}")
            except UserError as error:
                self._written[key] = str(error)
        return self._written[key]

    def _made(self, path: Path, mask: Path | None, name: str) -> tuple[Path, Path | None]:
        image = _within(load_image(path, LARGEST), self._max_side)
        cut = None if mask is None else load_mask(mask, LARGEST)
        if self._folder is None:
            return path, mask
        if cut is None and self._segment is not None:
            cut = self._segment(image)
            if cut.max() <= 0.5:
                raise UserError(f"{path}: no subject was found to cut out; draw its mask by hand")
        target = self._folder / "images" / f"{name}.png"
        save_image(image, target)
        if cut is None:
            return target, None
        save_image(resize(cut, (image.shape[1], image.shape[2])), target.with_name(f"{name}_mask.png"))
        return target, target.with_name(f"{name}_mask.png")


def _chosen(entry: Entry, references: str) -> Entry:
    if references == "all":
        return entry
    return Entry(entry.place, entry.prompt, entry.references[:1], entry.masks[:1], entry.subject)


def _within(image: Tensor, max_side: int) -> Tensor:
    height, width = image.shape[-2:]
    scale = max_side / max(height, width)
    return image if scale >= 1 else resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))


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


def _listed(source: Path, problems: Sequence[Problem], entries: int, max_bad: int) -> str:
    if not problems:
        return f"{source} holds no entry: nothing to write to {METADATA}"
    lines = [f"  {problem.place}: {problem.text}" for problem in problems[:LISTED]]
    more = [f"  ... and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
    head = f"{source}: {len(problems)} of {entries} entries cannot be used, more than --max_bad={max_bad} allows:"
    return "\n".join([head, *lines, *more])
