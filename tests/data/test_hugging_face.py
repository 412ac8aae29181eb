"""Hugging Face datasets on disk: as `save_to_disk` writes them, and as parquet files."""

import io
import json
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from customized_grpo.cli.main import main
from customized_grpo.data import SubjectDataset, load_image, load_mask
from customized_grpo.data.hugging_face import open_tables, read_hugging_face
from customized_grpo.data.prepare import Options, Outcome, prepare
from customized_grpo.data.sources import recognise
from customized_grpo.errors import UserError

Lay = Callable[[Path, dict[str, list[dict[str, Any]]]], Path]
FEATURES = datasets.Features(
    prompt=datasets.Value("string"), image=datasets.Image(), item=datasets.ClassLabel(names=["cup", "toy"])
)


def png(seed: int = 0, height: int = 20, width: int = 30) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def embedded(content: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": content, "path": path}


def saved_dict(root: Path, splits: dict[str, list[dict[str, Any]]], features: Any = FEATURES) -> Path:
    made = {name: datasets.Dataset.from_list(rows, features) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(root))
    return root


def saved(root: Path, splits: dict[str, list[dict[str, Any]]], features: Any = FEATURES) -> Path:
    (rows,) = splits.values()
    datasets.Dataset.from_list(rows, features).save_to_disk(str(root))
    return root


def parquet(root: Path, splits: dict[str, list[dict[str, Any]]], features: Any = FEATURES) -> Path:
    for name, rows in splits.items():
        (root / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows, features).to_parquet(str(root / "data" / f"{name}-00000-of-00001.parquet"))
    return root


def plain(root: Path, **columns: Any) -> Path:
    """A parquet file of columns without the features that the datasets library knows."""
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), root / "train.parquet")
    return root


def problems(source: Path, **options: Any) -> dict[str, str]:
    return {each.place: each.text for each in prepare(source, None, Options(max_bad=100, **options)).problems}


ROWS = [
    {"prompt": "a cup of tea", "image": embedded(png(0)), "item": 0},
    {"prompt": "a toy ", "image": embedded(png(1)), "item": 1},
    {"prompt": "a cup at sea", "image": embedded(png(0)), "item": 0},
]


@pytest.mark.parametrize("lay", [saved, saved_dict, parquet])
def test_the_three_layouts(lay: Lay, tmp_path: Path) -> None:
    source = lay(tmp_path / "src", {"train": ROWS})
    outcome = prepare(source, tmp_path / "out", Options())
    assert (outcome.format, outcome.samples, outcome.pictures) == ("huggingface", 3, 2)
    data = SubjectDataset.open(tmp_path / "out")
    assert [(s.prompt, s.subject) for s in data] == [("a cup of tea", "cup"), ("a toy", "toy"), ("a cup at sea", "cup")]
    assert data[0].references == data[2].references != data[1].references
    (tmp_path / "one.png").write_bytes(png(1))
    assert torch.equal(load_image(data[1].references[0]), load_image(tmp_path / "one.png"))


@pytest.mark.parametrize("lay", [saved_dict, parquet])
def test_all_splits_are_read_or_one(lay: Lay, tmp_path: Path) -> None:
    source = lay(tmp_path / "src", {"train": ROWS, "test": [{**ROWS[0], "prompt": None}]})
    assert problems(source) == {"test row 0": "prompt is None, expected text"}
    assert prepare(source, None, Options(split="train")).samples == 3
    with pytest.raises(UserError, match="no split 'validation'; there is (train, test|test, train)$"):
        prepare(source, None, Options(split="validation"))


def test_rows_are_counted_on_through_the_files_of_a_split(tmp_path: Path) -> None:
    for index in range(2):
        rows = {"text": ["a", "b"], "image": [png(), b"" if index else png()]}
        pq.write_table(pa.table(rows), tmp_path / f"train-0000{index}-of-00002.parquet")
    (tmp_path / "default" / "test").mkdir(parents=True)
    pq.write_table(pa.table({"text": [""], "image": [png()]}), tmp_path / "default" / "test" / "0000.parquet")
    assert problems(tmp_path) == {
        "train row 3": "image: the image file is empty", "test row 0": "text is '', expected text",
    }  # fmt: skip


def test_an_unnamed_split_has_only_rows(tmp_path: Path) -> None:
    source = saved(tmp_path / "src", {"train": [{**ROWS[0], "image": None}, ROWS[1]]})
    assert list(problems(source)) == ["row 0"]
    with pytest.raises(UserError, match="no split 'train'; there is one without a name"):
        prepare(source, None, Options(split="train"))


def test_a_reference_goes_before_the_picture_drawn_from_it(tmp_path: Path) -> None:
    source = plain(tmp_path / "src", image=[png(0)], reference=[png(1)], Caption=["a toy"], edit=["red"], old=[png(2)])

    def made(**options: Any) -> tuple[str, torch.Tensor]:
        prepare(source, tmp_path / "_".join(["out", *options]), Options(**options))
        (sample,) = SubjectDataset.open(tmp_path / "_".join(["out", *options]))
        return sample.prompt, load_image(sample.references[0])

    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(png(index))
    prompt, image = made()
    assert prompt == "a toy" and torch.equal(image, load_image(tmp_path / "1.png"))
    prompt, image = made(prompt_column="edit", reference_column="old")
    assert prompt == "red" and torch.equal(image, load_image(tmp_path / "2.png"))


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    source = plain(tmp_path / "src", words=["a"], picture=[png()])
    with pytest.raises(UserError) as found:
        prepare(source, None, Options())
    assert "train.parquet: no column for the prompt: expected one of prompt, text" in str(found.value)
    assert "there are words, picture; name it with --prompt_column" in str(found.value)
    with pytest.raises(UserError, match="no column for the reference: .* there are words, picture; name it with --ref"):
        prepare(source, None, Options(prompt_column="words"))
    with pytest.raises(UserError, match="--reference_column=image: no such column; there are words, picture"):
        prepare(source, None, Options(prompt_column="words", reference_column="image"))
    assert prepare(source, None, Options(prompt_column="words", reference_column="picture")).samples == 1


def test_several_references_with_masks(tmp_path: Path) -> None:
    white = io.BytesIO()
    Image.new("L", (30, 20), 255).save(white, "PNG")
    pictures = datasets.List(datasets.Image())
    features = datasets.Features(prompt=datasets.Value("string"), references=pictures, masks=pictures)
    two, cut = [embedded(png(0)), embedded(png(1))], embedded(white.getvalue())
    rows = [
        {"prompt": "with", "references": two, "masks": [cut, cut]},
        {"prompt": "without", "references": two, "masks": None},
        {"prompt": "too few", "references": two, "masks": [cut]},
        {"prompt": "none", "references": [], "masks": None},
        {"prompt": "null", "references": [two[0], None], "masks": None},
        {"prompt": "torn", "references": [two[0], embedded(png(2)[:100])], "masks": None},
    ]
    source = saved(tmp_path / "src", {"train": rows}, features)
    outcome = prepare(source, tmp_path / "out", Options(references="all", max_bad=4))
    told = {each.place: each.text for each in outcome.problems}
    assert told["row 2"] == "masks: 1 for 2 references; expected one for each"
    assert told["row 3"] == "references is an empty list, expected one picture or more"
    assert told["row 4"].startswith("references[1] is None, expected a picture")
    assert told["row 5"].startswith("references[1]: broken or truncated image")
    with_masks, without = SubjectDataset.open(tmp_path / "out")
    assert [len(with_masks.references), len(with_masks.masks), len(without.references)] == [2, 2, 2]
    assert load_mask(with_masks.masks[0]).min() == 1 and not without.masks


def test_a_mask_of_nothing_is_none(tmp_path: Path) -> None:
    nothing = pa.array([embedded(None), embedded(None)], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    source = plain(tmp_path, prompt=["a", "b"], image=[png(), png()], mask=nothing)
    assert prepare(source, None, Options()).samples == 2


def test_values_of_other_types(tmp_path: Path) -> None:
    source = plain(tmp_path / "a", prompt=[1, 2], image=[png(), png()])
    assert problems_only(source) == {f"train row {i}": f"prompt is {i + 1}, expected text" for i in range(2)}
    source = plain(tmp_path / "b", prompt=["a", "b"], image=[7, None], subject=[3, 4])
    told = problems_only(source)
    assert told["train row 0"].startswith("image is 7, expected a picture: its bytes, or a path in ")
    assert told["train row 1"].startswith("image is None, expected a picture")
    source = plain(tmp_path / "c", prompt=["a", "b"], image=[b"no picture", png()])
    assert problems(source)["train row 0"].startswith("image: not an image of a known format")


def problems_only(source: Path) -> dict[str, str]:
    """The problems where there is nothing else."""
    with pytest.raises(UserError, match="and there is no other"):
        prepare(source, None, Options(max_bad=100))
    return {each.place: each.text for each in read_hugging_face(source, open_tables(source))}  # type: ignore[union-attr]


def test_text_that_is_no_utf_8_spoils_its_row_alone(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff")]
    )
    tmp_path.joinpath("src").mkdir()
    pq.write_table(pa.table({"prompt": broken, "image": [png(), png()]}), tmp_path / "src" / "train.parquet")
    told = problems(tmp_path / "src")
    assert list(told) == ["train row 1"] and "cannot be read" in told["train row 1"] and "UTF8" in told["train row 1"]


def test_paths_lead_into_the_source(tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(png())
    inner = tmp_path / "src" / "images" / "in.png"
    inner.parent.mkdir(parents=True)
    inner.write_bytes(png())
    (inner.parent / "link.png").symlink_to(tmp_path / "outside.png")
    paths = [
        "images/in.png",
        str(inner),
        "../outside.png",
        str(tmp_path / "outside.png"),
        "images/link.png",
        "no.png",
        "a\0b",
    ]
    source = plain(tmp_path / "src", prompt=["p"] * 7, image_path=paths)
    told = problems(source)
    assert list(told) == [f"train row {row}" for row in range(2, 7)]
    for row in (2, 3, 4):
        assert "leads out of" in told[f"train row {row}"]
    assert told["train row 5"].endswith("no.png: no such image file") and "null" in told["train row 6"]
    rows = [{"prompt": "p", "image": embedded(None, path)} for path in paths[1:5]]
    schema = datasets.Features(prompt=datasets.Value("string"), image=datasets.Image()).arrow_schema
    (source / "train.parquet").unlink()
    pq.write_table(pa.Table.from_pylist(rows, schema), source / "test.parquet")
    assert list(problems(source)) == [f"test row {row}" for row in range(1, 4)]


def test_files_of_the_dataset_lie_in_it(tmp_path: Path) -> None:
    saved(tmp_path / "other", {"train": ROWS})
    source = saved(tmp_path / "src", {"train": ROWS})
    state = json.loads((source / "state.json").read_text())
    name = state["_data_files"][0]["filename"]
    for path in (f"../other/{name}", str(tmp_path / "other" / name)):
        (source / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": path}]}))
        with pytest.raises(UserError, match="leads out of"):
            prepare(source, None, Options())
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["../other"]}')
    with pytest.raises(UserError, match="leads out of"):
        prepare(tmp_path / "dict", None, Options())
    plain(tmp_path / "file", prompt=["p"], image=[png()])
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train.parquet").symlink_to(tmp_path / "file" / "train.parquet")
    with pytest.raises(UserError, match="leads out of .*; move the file into it"):
        prepare(tmp_path / "linked", None, Options())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", "{"),
        ("state.json", "[]"),
        ("state.json", '{"_data_files": [3]}'),
        ("state.json", '{"_data_files": []}'),
        ("state.json", '{"_data_files": [{"filename": "missing.arrow"}]}'),
        ("dataset_info.json", "3"),
        ("dataset_info.json", '{"features": {"prompt": {"_type": "Unheard"}}}'),
        ("data-00000-of-00001.arrow", "nothing"),
        ("dataset_dict.json", '{"splits": "train"}'),
        ("dataset_dict.json", '{"splits": ["train"]}'),
    ],
)
def test_damaged_files_of_save_to_disk(name: str, content: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "src", {"train": ROWS})
    (source / name).write_text(content)
    with pytest.raises(UserError, match=str(source)):
        prepare(source, None, Options())


@pytest.mark.parametrize("lay", [saved, parquet])
def test_a_torn_table(lay: Lay, tmp_path: Path) -> None:
    source = lay(tmp_path / "src", {"train": ROWS})
    (path,) = [*source.glob("*.arrow"), *source.glob("data/*.parquet")]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot be read .*; save or download the dataset again"):
        prepare(source, None, Options())


def test_damage_within_a_parquet_file(tmp_path: Path) -> None:
    plain(tmp_path, prompt=["p"] * 40, image=[png(i) for i in range(40)])
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    content[4:400] = b"\xff" * 396
    (tmp_path / "train.parquet").write_bytes(bytes(content))
    with pytest.raises(UserError, match="train.parquet: cannot be read"):
        prepare(tmp_path, None, Options())


def test_nothing_stays_in_the_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    source = parquet(tmp_path / "src", {"train": ROWS})
    most: list[int] = []
    prepare(source, None, Options(), lambda done, of: most.append(sum(path.is_file() for path in scratch.rglob("*"))))
    assert most == [1, 1, 1]
    assert not list(scratch.iterdir())

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", Options(), stop)
    assert not list(scratch.iterdir()) and not (tmp_path / "out").exists()


def test_no_code_is_run_and_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for lay in (saved_dict, parquet):
        source = lay(tmp_path / lay.__name__, {"train": ROWS})
        for name in (f"{lay.__name__}.py", "src.py", "dataset.py", "__init__.py"):
            (source / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        assert prepare(source, None, Options()).samples == 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("lay", [saved, parquet])
def test_without_the_library(lay: Lay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lay(tmp_path / "src", {"train": ROWS})
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert recognise(source) == "huggingface"
    with pytest.raises(UserError, match=r"pip install 'customized-grpo\[huggingface\]'"):
        prepare(source, None, Options())


def test_other_layouts_go_first(tmp_path: Path) -> None:
    plain(tmp_path, prompt=["p"], image=[png()])
    assert recognise(tmp_path) == "huggingface"
    (tmp_path / "list.json").write_text(json.dumps([{"prompt": "p", "image_path": "a.png"}]))
    assert recognise(tmp_path) == "manifest"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected dataset_dict.json, .* or parquet files; found none of them"):
        prepare(tmp_path / "empty", None, Options(format="huggingface"))


def test_rows_and_progress(tmp_path: Path) -> None:
    source = saved_dict(tmp_path / "src", {"train": ROWS, "test": ROWS[:2]})
    seen: list[tuple[int, int]] = []
    outcome: Outcome = prepare(source, None, Options(), lambda done, of: seen.append((done, of)))
    assert seen == [(done, 5) for done in range(1, 6)] and outcome.samples == 5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved_dict(tmp_path / "src", {"train": ROWS, "test": [{**ROWS[0], "image": embedded(b"x")}]})
    main(["prepare", str(source), str(tmp_path / "out"), "--max_bad", "1", "--prompt_column", "prompt"])
    said = "".join(capsys.readouterr())
    assert "huggingface: 3 samples of 2 pictures written to" in said
    assert "left out: test row 0: image: not an image of a known format" in " ".join(said.split())
    main(["prepare", str(source), "--check", "--split", "train"])
    assert "3 samples of 2 pictures could be written" in capsys.readouterr().out
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "prompts.txt").write_text("a toy\n")
    for option in ("--prompt_column", "--reference_column", "--split"):
        with pytest.raises(SystemExit) as ended:
            main(["prepare", str(tmp_path), "--check", "--format", "folders", option, "x"])
        assert ended.value.code == 2
        assert f"{option}: only for a Hugging Face dataset" in capsys.readouterr().err
