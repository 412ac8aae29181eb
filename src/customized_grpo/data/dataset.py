"""Subject datasets on disk: a folder with `metadata.jsonl` and the pictures it names.

One JSON object a line: `{"id", "prompt", "references": ["a.png"], "masks": ["m.png"]?, "subject"?}`. Paths
are relative to the folder and stay inside it. All of it is checked when the folder is opened.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Any, overload

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from torch import Tensor

from customized_grpo.data.images import (
    CACHE_BYTES,
    MAX_PIXELS,
    ImageLoader,
    PictureCache,
    Prepare,
    inspect_image,
    load_image,
    load_mask,
)
from customized_grpo.data.masks import misfit
from customized_grpo.errors import UserError, truncated
from customized_grpo.io.files import file_sha256, write_whole

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """One prompt about one subject. Paths are absolute; `masks` is empty or as long as `references`."""

    id: str
    prompt: str
    references: tuple[Path, ...]
    masks: tuple[Path, ...] = ()
    subject: str | None = None


class SubjectDataset:
    """The samples of a dataset folder, in the order of its lines; its pictures as batches of tensors."""

    def __init__(self, folder: Path, samples: Sequence[Sample], max_pixels: int, cache_bytes: int) -> None:
        self.folder = folder
        self.samples = tuple(samples)
        self._max_pixels = max_pixels
        self._pictures = PictureCache(max_pixels, cache_bytes)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        max_pixels: int = MAX_PIXELS,
        cache_bytes: int = CACHE_BYTES,
        *,
        decode: bool = True,
    ) -> "SubjectDataset":
        """Read and check a dataset folder: each line, each path, and each distinct picture, decoded completely.

        `max_pixels` bounds a picture's height x width, `cache_bytes` the memory that holds resized pictures. `decode`:
        whether to look at the pictures, which one process of a machine does for all.
        Raises UserError listing what is wrong (the first 20, and how many): with the lines, or if these are
        right, with the pictures.
        """
        folder = Path(folder)
        entries = _read_metadata(folder)
        if decode:
            _check_pictures(folder / METADATA, entries, max_pixels)
        return cls(folder, [sample for _, sample in entries], max_pixels, cache_bytes)

    @classmethod
    def outline(cls, folder: str | Path) -> "SubjectDataset":
        """Read the lines of a dataset folder alone: no picture is looked at, or need be there. Raises UserError as
        `open` does for lines."""
        return cls(Path(folder), [sample for _, sample in _read_metadata(Path(folder))], MAX_PIXELS, CACHE_BYTES)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def sha256(self) -> str:
        """Return the hash of the samples in their order, with their pictures, wherever the folder lies."""
        digest = hashlib.sha256()
        pictures = {path for sample in self for path in (*sample.references, *sample.masks)}
        hashes = {path: file_sha256(path) for path in pictures}
        for sample in self:
            paths = (sample.references, sample.masks)
            told = [sample.id, sample.prompt, sample.subject, *([hashes[path] for path in row] for row in paths)]
            digest.update(json.dumps(told).encode())
        return digest.hexdigest()

    def references(self, samples: Sequence[Sample], prepare: Prepare) -> list[list[Tensor]]:
        """Return the references of B samples as `prepare` leaves them: for each sample K pictures [3, h, w] in [0,
        1]."""
        return [
            [self._pictures.get(load_image, path, prepare, len(sample.references)) for path in sample.references]
            for sample in samples
        ]

    def originals(self, samples: Sequence[Sample]) -> "Originals":
        """Return the references of B samples in the size of their files: for each sample K pictures [3, h, w] in [0,
        1]."""
        return Originals(load_image, [sample.references for sample in samples], self._max_pixels)

    def masks(self, samples: Sequence[Sample]) -> "Originals | None":
        """Return the masks of B samples, or None if no sample has any.

        For each sample K masks [1, h, w] in [0, 1], of the size of `originals`. Raises UserError when only some samples
        have masks.
        """
        without = [sample.id for sample in samples if not sample.masks]
        if len(without) == len(samples):
            return None
        if without:
            raise UserError(
                f"{self.folder / METADATA}: {len(without)} of {len(samples)} samples of one batch have no "
                f"masks: {truncated([repr(name) for name in without], ', ')}; give masks to every sample or to none"
            )
        return Originals(load_mask, [sample.masks for sample in samples], self._max_pixels)


class Originals(Sequence[list[Tensor]]):
    """The pictures of B samples as their files have them: read each time a sample is asked for, and not kept.

    Those of a whole dataset may be many times the memory of a machine.
    """

    def __init__(self, load: ImageLoader, paths: Sequence[tuple[Path, ...]], max_pixels: int) -> None:
        self._load, self.paths, self._max_pixels = load, tuple(paths), max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> list[Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> "Originals": ...
    def __getitem__(self, index: int | slice) -> "list[Tensor] | Originals":
        """Return the pictures [C, h, w] of a sample, or a part of the samples."""
        if isinstance(index, slice):
            return Originals(self._load, self.paths[index], self._max_pixels)
        return [self._load(path, self._max_pixels) for path in self.paths[index]]


def write_metadata(folder: str | Path, samples: Iterable[Sample]) -> Path:
    """Write `metadata.jsonl` into `folder` (made if need be), whole or not at all; returns its path.

    Relative paths count from `folder`. Raises UserError, as `SubjectDataset.open` would, for a sample that is
    malformed, repeats an id or has a path that leaves the folder; the pictures themselves are not looked at. Raises
    StorageError where the disk does not take it.
    """
    folder = Path(folder)
    target = folder / METADATA
    root = Path(os.path.realpath(folder))
    lines = [json.dumps(_record_of(root, sample)) for sample in samples]
    _parse_lines(target, [(number, line.encode()) for number, line in enumerate(lines, 1)])
    write_whole(target, "".join(line + "\n" for line in lines))
    return target


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"has half of a surrogate pair, which no file can hold: {json.dumps(value)}")
    return value


def _one_line(value: str) -> str:
    if any(letter < " " for letter in value):
        raise ValueError(f"has control characters: {value!r}")
    return value


def _file_name_part(value: str) -> str:
    if "/" in value or "\\" in value or len(value.encode()) > 128:
        raise ValueError(f"names files: at most 128 bytes, no / and no \\; got {value[:140]!r}")
    return value


_Text = Annotated[str, AfterValidator(_not_blank)]
_Name = Annotated[_Text, AfterValidator(_one_line)]


class _Record(BaseModel):
    """A line of metadata.jsonl, as written."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Annotated[_Name, AfterValidator(_file_name_part)]
    prompt: _Text
    references: list[_Name]
    masks: list[_Name] | None = None
    subject: _Text | None = None


def _read_metadata(folder: Path) -> list[tuple[int, Sample]]:
    """Return the samples of a folder with their line numbers, without looking at the pictures."""
    path = folder / METADATA
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data folder {folder} {state}; expected one with {METADATA} and the images it names")
    if not path.is_file():
        raise UserError(
            f"{path} is missing; expected one JSON object a line, such as "
            '{"id": "cat-1", "prompt": "a cat on the beach", "references": ["cat.png"]}'
        )
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty; expected at least one sample, a JSON object a line")
    return _parse_lines(path, lines)


def _parse_lines(metadata: Path, lines: Sequence[tuple[int, bytes]]) -> list[tuple[int, Sample]]:
    root = Path(os.path.realpath(metadata.parent))
    entries: list[tuple[int, Sample]] = []
    problems: list[str] = []
    line_of_id: dict[str, int] = {}
    for number, line in lines:
        try:
            sample = _parse_sample(root, line)
        except UserError as error:
            problems.append(f"{metadata}:{number}: {error}")
            continue
        if sample.id in line_of_id:
            problems.append(
                f"{metadata}:{number}: the id {sample.id!r} is already the id of line {line_of_id[sample.id]}; "
                "give each sample its own"
            )
        line_of_id.setdefault(sample.id, number)
        entries.append((number, sample))
    _raise_listed(problems, f"{metadata}: {len(problems)} of {len(lines)} lines are wrong")
    return entries


def _parse_sample(root: Path, line: bytes) -> Sample:
    """Return the sample of one line. Raises UserError that lists all that is wrong with it, without the place."""
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_reject_duplicate_keys)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"broken JSON: {error.msg} at column {error.colno}; expected one JSON object a line") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"broken JSON: {error}; expected one JSON object a line") from error
    if not isinstance(value, dict):
        raise UserError(f"expected a JSON object with {_field_names()}, got {_described(value)}")
    try:
        record = _Record.model_validate(value)
    except ValidationError as error:
        raise UserError("; ".join(_worded(dict(each)) for each in error.errors())) from error
    if not record.references:
        raise UserError('"references" is empty; expected at least one image of the subject')
    if record.masks is not None and len(record.masks) != len(record.references):
        raise UserError(
            f'"masks" has {len(record.masks)} entries and "references" {len(record.references)}; '
            'expected one mask for each reference, or no field "masks"'
        )
    return Sample(
        id=record.id,
        prompt=record.prompt,
        references=_inside(root, "references", record.references),
        masks=_inside(root, "masks", record.masks or ()),
        subject=record.subject,
    )


def _reject_duplicate_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of `pairs`. Raises UserError for a field given twice: JSON would take the last one."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f'"{twice}" stands in it twice; remove one of the two')
    return value


def _inside(root: Path, field: str, names: Sequence[str]) -> tuple[Path, ...]:
    """Return the files `names` mean, links followed. Raises UserError for one that is absolute or outside `root`."""
    paths = []
    for index, name in enumerate(names):
        if os.path.isabs(name):
            raise UserError(f'"{field}[{index}]" is {name!r}; expected a path relative to the data folder')
        path = Path(os.path.realpath(root / name))
        if not path.is_relative_to(root):
            raise UserError(f'"{field}[{index}]", {name!r}, leaves the data folder for {path}; move the file into it')
        paths.append(path)
    return tuple(paths)


def _record_of(root: Path, sample: Sample) -> dict[str, Any]:
    def names(paths: Iterable[Path]) -> list[str]:
        return [Path(os.path.relpath(os.path.realpath(root / path), root)).as_posix() for path in paths]

    record: dict[str, Any] = {"id": sample.id, "prompt": sample.prompt}
    record["references"] = names(sample.references)
    if sample.masks:
        record["masks"] = names(sample.masks)
    if sample.subject is not None:
        record["subject"] = sample.subject
    return record


def _check_pictures(metadata: Path, entries: Sequence[tuple[int, Sample]], max_pixels: int) -> None:
    references = list(dict.fromkeys(path for _, sample in entries for path in sample.references))
    masks = list(dict.fromkeys(path for _, sample in entries for path in sample.masks))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(partial(_size, inspect_image, max_pixels), references))
        reference_sizes = dict(zip(references, found, strict=True))
        found = list(pool.map(partial(_size, _inspect_mask, max_pixels), masks))
        mask_sizes = dict(zip(masks, found, strict=True))
    place_of: dict[str, int] = {}
    compared: set[tuple[Path, Path]] = set()
    for number, sample in entries:
        sizes = [reference_sizes[path] for path in sample.references]
        sizes += [mask_sizes[path] for path in sample.masks]
        for problem in (size for size in sizes if isinstance(size, str)):
            place_of.setdefault(problem, number)
        for path, mask in zip(sample.references, sample.masks, strict=False):
            size, mask_size = reference_sizes[path], mask_sizes[mask]
            if isinstance(size, tuple) and isinstance(mask_size, tuple) and (path, mask) not in compared:
                compared.add((path, mask))
                if different := misfit(path, mask):
                    place_of.setdefault(different, number)
    problems = [f"{metadata}:{number}: {problem}" for problem, number in place_of.items()]
    files = len({*references, *masks})
    _raise_listed(problems, f"{metadata}: {len(problems)} problems in {files} image files")


_Inspect = Callable[[Path, int], tuple[int, int]]


def _inspect_mask(path: Path, max_pixels: int) -> tuple[int, int]:
    _, height, width = load_mask(path, max_pixels).shape
    return height, width


def _size(inspect: _Inspect, max_pixels: int, path: Path) -> tuple[int, int] | str:
    """Return (height, width), or what is wrong with the file."""
    try:
        return inspect(path, max_pixels)
    except UserError as error:
        return str(error)


def _raise_listed(problems: Sequence[str], headline: str) -> None:
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{headline}:\n  " + truncated(problems))


def _worded(error: dict[str, Any]) -> str:
    """Return the words for a pydantic error."""
    head, *rest = error["loc"]
    name = f'"{head}' + "".join(f"[{part}]" for part in rest if isinstance(part, int)) + '"'
    if error["type"] == "missing":
        return f"the field {name} is missing"
    if error["type"] == "extra_forbidden":
        near = get_close_matches(str(head), _Record.model_fields, 1)
        hint = f'did you mean "{near[0]}"?' if near else f"known are {_field_names()}"
        return f"unknown field {name}; {hint}"
    if error["type"] == "value_error":
        return f"{name} {error['ctx']['error']}"
    expected = "a list of strings" if error["type"] == "list_type" else "a string"
    return f"{name} must be {expected}, got {_described(error['input'])}"


def _field_names() -> str:
    return ", ".join(f'"{name}"' for name in _Record.model_fields)


def _described(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    text = json.dumps(value)
    return f"{kinds.get(type(value), 'a number')}: {text if len(text) <= 60 else text[:57] + '...'}"
