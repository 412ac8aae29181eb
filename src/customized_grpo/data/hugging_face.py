"""Hugging Face datasets on disk as entries: what `save_to_disk` writes, or parquet files as the hub has them.

Rows are read a few at a time; of a parquet file about a row group is held. Pictures that lie in a table are not
opened here: their bytes go as they are to a scratch folder. No code that comes with a dataset is run, and nothing
is downloaded.
"""

import hashlib
import json
import re
import reprlib
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from customized_grpo.data.entries import Entry, EntryOrProblem, Problem, inside
from customized_grpo.errors import UserError, first_line
from customized_grpo.io.files import is_left_behind, writing

# Of several that are there the first counts: "image" beside a reference is most often what was drawn from it.
PROMPTS: tuple[str, ...] = ("prompt", "text", "caption", "instruction")
REFERENCES: tuple[str, ...] = (
    *("references", "reference", "reference_images", "reference_image", "input_images", "input_image"),
    *("source_images", "source_image", "images", "image", "image_paths", "image_path"),
)
MASKS: tuple[str, ...] = ("masks", "mask")
SUBJECTS: tuple[str, ...] = ("subject", "item", "class")
_DICT, _INFO, _STATE = "dataset_dict.json", "dataset_info.json", "state.json"
_BATCH = 16
# What pyarrow and datasets let through on damaged files. pyarrow's own are all of these kinds.
_BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class Table:
    """A table on disk: the split it belongs to, its columns, and of these the ones with names for their numbers.
    `batches` reads some of its columns, a few rows at a time."""

    path: Path
    split: str | None
    rows: int
    columns: Sequence[str]
    classes: dict[str, Sequence[str]]
    batches: Callable[[Sequence[str]], Iterable[Any]]


@dataclass(frozen=True)
class Named:
    """Names of columns; None takes the usual ones."""

    prompt: str | None = None
    reference: str | None = None


def is_saved(source: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder `source`."""
    return (source / _DICT).is_file() or ((source / _INFO).is_file() and (source / _STATE).is_file())


def parquet_files(source: Path) -> list[Path]:
    """Return the parquet files in the folder `source`, or up to two folders down, in order."""
    found = [path for pattern in ("*", "*/*", "*/*/*") for path in source.glob(f"{pattern}.parquet")]
    return sorted(path for path in found if not any(map(is_left_behind, path.relative_to(source).parts)))


def open_tables(source: Path, split: str | None = None) -> list[Table]:
    """Return the tables of the dataset at `source`, all splits or one; nothing but their heads is read.

    Raises `UserError` without the datasets library, for damaged files, files outside `source`, and an unknown split.
    """
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Hugging Face datasets are read by the datasets library: pip install 'customized-grpo[huggingface]'"
        ) from error
    tables = list(_saved_tables(source) if is_saved(source) else _parquet_tables(source))
    if not tables:
        raise UserError(f"{source}: expected {_DICT}, {_INFO} with {_STATE}, or parquet files; found none of them")
    chosen = [table for table in tables if split in (None, table.split)]
    if not chosen:
        known = ", ".join(dict.fromkeys(table.split or "one without a name" for table in tables))
        raise UserError(f"{source}: no split {split!r}; there is {known}")
    return chosen


def read_hugging_face(source: Path, tables: Sequence[Table], named: Named = Named()) -> Generator[EntryOrProblem]:
    """Yield an entry or a problem for each row of `tables`, rows counted from 0 in their split.

    A picture that lies in a table is a file only until the next entry is asked for. Raises `UserError` for columns
    that are missing, before any row, and for damaged files.
    """
    columns = [_columns(table, named) for table in tables]
    rows: dict[str | None, int] = {}
    with tempfile.TemporaryDirectory(prefix="customized-grpo-") as scratch:
        for table, roles in zip(tables, columns, strict=True):
            for row in _rows(table, list(dict.fromkeys(roles.values()))):
                number = rows.get(table.split, 0)
                rows[table.split] = number + 1
                place = f"row {number}" if table.split is None else f"{table.split} row {number}"
                if isinstance(row, str):
                    yield Problem(place, row)
                else:
                    yield _entry(source, Path(scratch), table, place, roles, row)
                for path in Path(scratch).iterdir():
                    path.unlink()


def _columns(table: Table, named: Named) -> dict[str, str]:
    """Return the columns of the prompt, the references, and, if any, the masks and the subject."""
    there = ", ".join(table.columns)
    roles = {}
    for role, usual, name in (("prompt", PROMPTS, named.prompt), ("reference", REFERENCES, named.reference)):
        if name is not None and name not in table.columns:
            raise UserError(f"{table.path}: --{role}_column={name}: no such column; there are {there}")
        found = name or _first(table.columns, usual)
        if found is None:
            raise UserError(
                f"{table.path}: no column for the {role}: expected one of {', '.join(usual)}; there are {there}; "
                f"name it with --{role}_column"
            )
        roles[role] = found
    for role, usual in (("mask", MASKS), ("subject", SUBJECTS)):
        found = _first([name for name in table.columns if name not in roles.values()], usual)
        if found is not None:
            roles[role] = found
    return roles


def _first(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    names = {name.lower(): name for name in columns}
    return next((names[name] for name in usual if name in names), None)


def _rows(table: Table, columns: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a table; a text says what is wrong with one that cannot be read."""
    batches = iter(table.batches(columns))
    while True:
        with _telling(table.path):
            batch = next(batches, None)
        if batch is None:
            return
        for index in range(batch.num_rows):
            try:
                one = batch.slice(index, 1)
                one.validate(full=True)
                (row,) = one.to_pylist()
            except ValueError as error:
                row = f"cannot be read ({first_line(error)}); write the table again, or leave the row out"
            yield row


def _entry(
    source: Path, scratch: Path, table: Table, place: str, roles: dict[str, str], row: dict[str, Any]
) -> EntryOrProblem:
    prompt, subject = row[roles["prompt"]], row.get(roles.get("subject", ""))
    if not isinstance(prompt, str) or not prompt.strip():
        return Problem(place, f"{roles['prompt']} is {reprlib.repr(prompt)}, expected text")
    labels: dict[Path, str] = {}

    def pictures(role: str) -> tuple[Path, ...]:
        value = row[roles[role]]
        several = value if isinstance(value, list) else [value]
        names = [f"{roles[role]}[{index}]" if several is value else roles[role] for index in range(len(several))]
        return tuple(_picture(source, scratch, name, each, labels) for name, each in zip(names, several, strict=True))

    try:
        references = pictures("reference")
        masks = pictures("mask") if _is_there(row.get(roles.get("mask", ""))) else ()
    except ValueError as error:
        return Problem(place, str(error))
    if not references:
        return Problem(place, f"{roles['reference']} is an empty list, expected one picture or more")
    if masks and len(masks) != len(references):
        return Problem(place, f"{roles['mask']}: {len(masks)} for {len(references)} references; expected one for each")
    if roles.get("subject") in table.classes and isinstance(subject, int):
        names = table.classes[roles["subject"]]
        subject = names[subject] if 0 <= subject < len(names) else None
    return Entry(place, prompt.strip(), references, masks, subject if isinstance(subject, str) else None, labels)


def _is_there(value: Any) -> bool:
    """Return whether a value is a picture: null, an empty list, and a picture without bytes and path are none."""
    return any(each is not None for each in value.values()) if isinstance(value, dict) else bool(value)


def _picture(source: Path, scratch: Path, name: str, value: Any, labels: dict[Path, str]) -> Path:
    """Return the file of a picture: its own in `source`, or one made of its bytes.

    Raises ValueError with what is wrong.
    """
    if isinstance(value, dict) and value.keys() >= {"bytes", "path"}:
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes):
        # Named after what is in it, so that a picture that many rows have is decoded once.
        path = scratch / hashlib.sha256(value).hexdigest()
        with writing(scratch):
            path.write_bytes(value)
        labels.setdefault(path, name)
        return path
    if isinstance(value, str) and value:
        return inside(source, source / value)
    raise ValueError(f"{name} is {reprlib.repr(value)}, expected a picture: its bytes, or a path in {source}")


def _saved_tables(source: Path) -> Iterator[Table]:
    if not (source / _DICT).is_file():
        yield _saved_table(source, source.resolve(), _json(source / _STATE).get("_split"))
        return
    splits = _json(source / _DICT).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) and name for name in splits):
        raise UserError(f'{source / _DICT}: "splits" is {reprlib.repr(splits)}, expected a list of names')
    for name in splits:
        yield _saved_table(source, _data_file(source, source / name), name)


def _saved_table(source: Path, folder: Path, split: str | None) -> Table:
    import datasets

    files = _json(folder / _STATE).get("_data_files")
    if not isinstance(files, list) or not all(isinstance(each, dict) and "filename" in each for each in files):
        raise UserError(f'{folder / _STATE}: "_data_files" is {reprlib.repr(files)}, expected a list of files')
    for each in files:
        _data_file(source, folder / str(each["filename"]))
    with _telling(folder):
        # As Arrow's own tables: the library would decode pictures otherwise.
        dataset = datasets.Dataset.load_from_disk(str(folder), keep_in_memory=False).with_format("arrow")

    def batches(chosen: Sequence[str]) -> Iterable[Any]:
        return dataset.select_columns(list(chosen)).iter(_BATCH)

    return Table(folder, split, dataset.num_rows, dataset.column_names, _classes(dataset.features), batches)


def _parquet_tables(source: Path) -> Iterator[Table]:
    import datasets
    from pyarrow.parquet import ParquetFile

    for path in parquet_files(source):
        real = _data_file(source, path)
        with _telling(path), ParquetFile(real) as file:
            rows, columns = file.metadata.num_rows, file.schema_arrow.names
            classes = _classes(datasets.Features.from_arrow_schema(file.schema_arrow))

        def batches(chosen: Sequence[str], real: Path = real) -> Iterator[Any]:
            # Page by page, not the row group ahead. Still, a page of pictures can be as large as its row group.
            with ParquetFile(real, buffer_size=2**20, pre_buffer=False) as file:
                yield from file.iter_batches(_BATCH, columns=list(chosen))

        yield Table(path, _split_of(source, path), rows, columns, classes, batches)


def _split_of(source: Path, path: Path) -> str:
    """Return the split of a parquet file by its name: train-00000-of-00002, test, or 0000 in a folder train."""
    shard = re.fullmatch(r"(.+?)-\d+-of-\d+.*", path.stem)
    if shard:
        return shard[1]
    if not path.stem.isdecimal():
        return path.stem
    return "train" if path.parent == source else path.parent.name


def _classes(features: Any) -> dict[str, Sequence[str]]:
    import datasets

    return {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel) and kind.names}


def _data_file(source: Path, path: Path) -> Path:
    try:
        return inside(source, path)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    with _telling(path):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {reprlib.repr(found)}")
    return found


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Name the file in errors of the datasets library."""
    try:
        yield
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); save or download the dataset again") from error
