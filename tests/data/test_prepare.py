"""Data folders made of data as others lay it out, and what is said of what cannot be used."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from customized_grpo.cli.main import main
from customized_grpo.data import SubjectDataset, load_image, load_mask
from customized_grpo.data.prepare import Options, prepare
from customized_grpo.data.sources import recognise
from customized_grpo.errors import UserError

DREAMBENCH = Path(__file__).parents[3] / "shared" / "data" / "dreambench" / "dataset"
TEMPLATES = """Classes

subject_name,class
rc_car,toy
dog6,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token),
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
]
"""


def picture(path: Path, height: int = 20, width: int = 30, seed: int = 0, mode: str = "RGB", **save: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **save)
    return path


def mask(path: Path, height: int = 20, width: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[height // 4 : -(height // 4), width // 4 :] = 255
    Image.fromarray(pixels).save(path)


def folders(root: Path) -> Path:
    picture(root / "my_toy2" / "b.png", seed=1)
    picture(root / "my_toy2" / "a.jpg", 30, 20)
    (root / "my_toy2" / "prompts.txt").write_text("a {} in the snow\n\na {} on a beach\n")
    picture(root / "cup" / "cup.png", seed=2)
    (root / "cup" / "prompts.txt").write_text("a cup of tea\n")
    return root


def made(source: Path, output: Path, **options: Any) -> SubjectDataset:
    prepare(source, output, Options(**options))
    return SubjectDataset.open(output)


def test_a_folder_per_subject(tmp_path: Path) -> None:
    data = made(folders(tmp_path / "src"), tmp_path / "out")
    assert [(sample.prompt, sample.subject) for sample in data] == [
        ("a cup of tea", "cup"), ("a my toy in the snow", "my_toy2"), ("a my toy on a beach", "my_toy2"),
    ]  # fmt: skip
    assert data[1].references == data[2].references and len(data[1].references) == 1
    assert load_image(data[1].references[0]).shape == (3, 30, 20)
    every = made(tmp_path / "src", tmp_path / "all", references="all")
    assert [len(sample.references) for sample in every] == [1, 2, 2]
    assert not any(sample.masks for sample in every)


@pytest.mark.parametrize("output", ["out", "./out", "deep/out"])
def test_a_relative_output(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    data = made(folders(tmp_path / "src"), Path(output))
    assert len(data) == 3 and data[0].references[0].is_relative_to(tmp_path / output)


def test_masks_beside_pictures_are_kept(tmp_path: Path) -> None:
    source = folders(tmp_path / "src")
    mask(source / "cup" / "cup_mask.png")
    (one, *others) = made(source, tmp_path / "out")
    assert len(one.masks) == 1 and not any(sample.masks for sample in others)
    assert load_mask(one.masks[0])[0, 10, 20] == 1 and load_mask(one.masks[0])[0, 0, 0] == 0


def test_masks_of_some_pictures_of_a_subject(tmp_path: Path) -> None:
    source = folders(tmp_path / "src")
    mask(source / "my_toy2" / "a_mask.bmp", 30, 20)
    data = made(source, tmp_path / "first")
    assert [len(sample.masks) for sample in data] == [0, 1, 1]
    said = problems_of(source, references="all")
    assert "2 of 3 entries" in said
    assert "my_toy2-0: 1 of 2 pictures have no mask: b.png; draw them, or make them with --segment" in said
    assert prepare(source, None, Options(references="all", segment=True)).samples == 3


def test_dreambench(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for name in ("rc_car", "dog6"):
        picture(source / name / "01.jpg", seed=1)
        picture(source / name / "00.jpg")
    (source / "prompts_and_classes.txt").write_text(TEMPLATES)
    data = made(source, tmp_path / "out")
    assert [(s.prompt, s.subject) for s in data] == [
        ("a toy in the jungle", "rc_car"), ("a red toy", "rc_car"), ("a dog wearing a red hat", "dog6"),
    ]  # fmt: skip


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason=f"the photographs of DreamBench are not at {DREAMBENCH}")
def test_dreambench_itself_is_750_prompts_of_30_subjects() -> None:
    outcome = prepare(DREAMBENCH, None, Options())
    assert (outcome.format, outcome.samples, outcome.pictures, len(outcome.problems)) == ("dreambench", 750, 30, 0)


def test_lists_as_uno_has_them(tmp_path: Path) -> None:
    source = tmp_path / "src"
    picture(source / "a" / "1.png")
    picture(source / "b.png", seed=1)
    records = [
        {"prompt": "one", "image_path": "a/1.png", "image_tgt_path": "missing.png"},
        {"prompt": "two", "image_paths": ["./b.png", "a/1.png"]},
    ]
    (source / "list.json").write_text(json.dumps(records))
    data = made(source, tmp_path / "out", references="all")
    assert [(s.prompt, len(s.references)) for s in data] == [("one", 1), ("two", 2)]
    assert data[0].references[0] == data[1].references[1]


def test_syncd_in_both_forms(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for index in range(3):
        picture(source / f"toy_{index}.jpg", seed=index)
    mask(source / "masks" / "toy_1.jpg", 5, 8)
    both = [
        {"filenames": [f"toy_{i}.jpg" for i in range(3)], "prompts": ["p0", "p1", "p2"], "category": "rigid"},
        {"id": "7", "ref_img": "toy_0.jpg", "img": "x.png", "text": "text", "category_description": "a toy"},
    ]
    (source / "rigid_metadata.json").write_text(json.dumps(both))
    data = made(source, tmp_path / "out")
    assert [(s.prompt, s.subject) for s in data] == [("p0", None), ("p1", None), ("p2", None), ("text", "a toy")]
    # A prompt's reference is the next picture of the subject, with its mask brought to its size.
    assert [bool(s.masks) for s in data] == [True, False, False, False]
    assert load_mask(data[0].masks[0]).shape[1:] == load_image(data[0].references[0]).shape[1:]
    assert torch.equal(load_image(data[0].references[0]), load_image(source / "toy_1.jpg"))
    assert torch.equal(load_image(data[2].references[0]), load_image(source / "toy_0.jpg"))


def test_pictures_of_every_kind_come_out_plain_upright_and_small(tmp_path: Path) -> None:
    source = tmp_path / "src" / "toy"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(source / "a.jpg", 40, 80, mode="CMYK", exif=exif)
    picture(source / "b.png", 40, 80, mode="P")
    Image.fromarray(np.full((40, 80), 40000, dtype=np.uint16)).save(source / "c.png")
    Image.new("RGBA", (80, 40), (255, 0, 0, 0)).save(source / "d.png")
    (source / "prompts.txt").write_text("a toy\n")
    (sample,) = made(tmp_path / "src", tmp_path / "out", references="all", max_side=32)
    a, b, c, d = (load_image(path) for path in sample.references)
    assert a.shape == (3, 32, 16) and b.shape == c.shape == d.shape == (3, 16, 32)
    assert c.mean() == pytest.approx(40000 / 65535, abs=0.01) and (d == 1).all()


def problems_of(source: Path, **options: Any) -> str:
    with pytest.raises(UserError) as found:
        prepare(source, None, Options(**options))
    return str(found.value)


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    source = tmp_path / "src"
    picture(source / "fine.png")
    picture(tmp_path / "outside.png")
    (source / "torn.png").write_bytes((source / "fine.png").read_bytes()[:100])
    (source / "link.png").symlink_to(tmp_path / "outside.png")
    Image.new("1", (12500, 12500)).save(source / "bomb.png")
    names = ["fine.png", "torn.png", "link.png", "../outside.png", "missing.png", "bomb.png", 7]
    records: list[Any] = [{"prompt": "p", "image_path": name} for name in names]
    records += [{"prompt": " ", "image_path": "fine.png"}, {"image_path": "fine.png"}, {"prompt": "p"}]
    (source / "list.json").write_text(json.dumps(records))
    said = problems_of(source)
    assert "9 of 10 entries cannot be used, more than --max_bad=0 allows" in said
    for words in (
        "list.json:1: ", "broken or truncated", "list.json:2: link.png leads out of", "list.json:3: ",
        "list.json:4: ", "no such image file", "156,250,000 pixels, more than the limit",
        "list.json:6: the pictures are 7", "list.json:7: the prompt is ' '", "list.json:9: the pictures are None",
    ):  # fmt: skip
        assert words in said
    assert "list.json:0" not in said
    outcome = prepare(source, tmp_path / "out", Options(max_bad=9))
    assert outcome.samples == 1 and len(outcome.problems) == 9
    assert len(SubjectDataset.open(tmp_path / "out")) == 1


def test_subjects_without_what_they_need(tmp_path: Path) -> None:
    source = folders(tmp_path / "src")
    (source / "empty").mkdir()
    (source / "silent").mkdir()
    (source / "silent" / "prompts.txt").write_text("\n")
    (source / "bare").mkdir()
    (source / "bare" / "prompts.txt").write_text("a bare one\n")
    picture(source / "silent" / "a.png")
    said = problems_of(source)
    assert "empty: no prompts.txt" in said and "silent: prompts.txt is empty" in said and "bare: no pictures" in said


def test_dreambench_with_missing_subjects(tmp_path: Path) -> None:
    (tmp_path / "prompts_and_classes.txt").write_text(TEMPLATES)
    picture(tmp_path / "dog6" / "00.jpg")
    said = problems_of(tmp_path)
    assert "1 of 2 entries cannot be used" in said
    assert "prompts_and_classes.txt: 1 of 2 subjects are missing: rc_car; put a folder with the pictures of" in said
    assert prepare(tmp_path, None, Options(max_bad=1)).samples == 1
    (tmp_path / "dog6").rename(tmp_path / "cat")
    said = problems_of(tmp_path, max_bad=1)
    assert "2 of 2 entries cannot be used, more than --max_bad=1 allows" in said
    assert "2 of 2 subjects are missing: rc_car, dog6;" in said
    (tmp_path / "prompts_and_classes.txt").write_text("Classes\n\nsubject_name,class\n")
    assert "expected subjects with their classes and two lists of prompts" in problems_of(tmp_path)


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    source = folders(tmp_path / "src")
    (source / "cup" / "cup.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not an image of a known format"):
        prepare(source, tmp_path / "out", Options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_a_folder_that_is_not_empty_stays(tmp_path: Path) -> None:
    source = folders(tmp_path / "src")
    with pytest.raises(UserError, match="is not an empty folder"):
        prepare(source, source, Options())
    assert (source / "cup" / "cup.png").is_file()


@pytest.mark.parametrize("content", [None, "{", '{"a": 1}'])
def test_layouts_that_are_not_known(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "list.json").write_text(content)
    with pytest.raises(UserError, match="broken JSON" if content == "{" else "not a layout that is known"):
        recognise(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        prepare(tmp_path / "nowhere", None, Options())


def test_masks_are_made_where_they_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folders(tmp_path / "src")
    mask(source / "cup" / "cup_mask.png")
    seen: list[tuple[int, int]] = []

    def remove(image: Image.Image, session: str, only_mask: bool) -> Image.Image:
        assert session == "session" and only_mask
        seen.append(image.size)
        return Image.new("L", image.size, 200)

    fake = types.SimpleNamespace(new_session=lambda: "session", remove=remove)
    monkeypatch.setitem(sys.modules, "rembg", fake)
    data = made(source, tmp_path / "out", segment=True)
    assert all(len(sample.masks) == 1 for sample in data)
    assert seen == [(20, 30)]
    assert load_mask(data[1].masks[0]).unique().tolist() == pytest.approx([200 / 255])
    fake.remove = lambda image, **settings: Image.new("L", image.size, 0)
    with pytest.raises(UserError, match="no subject was found to cut out; draw its mask by hand"):
        prepare(source, tmp_path / "none", Options(segment=True))


def test_segmenting_without_rembg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(UserError, match=r"--segment needs rembg: pip install 'customized-grpo\[segment\]'"):
        prepare(folders(tmp_path / "src"), tmp_path / "out", Options(segment=True))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folders(tmp_path / "src")
    main(["prepare", str(source), "--check"])
    assert "folders: 3 samples of 2 pictures could be written" in capsys.readouterr().out
    main(["prepare", str(source), str(tmp_path / "out"), "--max_side", "16"])
    assert "written to" in capsys.readouterr().out
    assert len(SubjectDataset.open(tmp_path / "out")) == 3
    for options, said in (
        ([str(source)], "name the folder to write after SRC, or pass --check"),
        ([str(source), str(tmp_path / "x"), "--check"], "or pass --check to write nothing"),
        ([str(source), str(tmp_path / "x"), "--max_side", "1"], "--max_side is at least 16"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["prepare", *options])
        assert ended.value.code == 2 and said in capsys.readouterr().err
