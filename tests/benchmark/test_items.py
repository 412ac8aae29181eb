import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from customized_grpo.benchmark.items import pictures_made_elsewhere, read_items
from customized_grpo.data.formats import SUFFIXES
from customized_grpo.errors import UserError


def test_the_folder_is_drawn_from_first_pictures_and_knows_all(dreambench: Path) -> None:
    items = read_items("dreambench", dreambench)
    assert [(item.id, item.prompt) for item in items] == [
        ("cup-00", "a cup in the jungle"), ("cup-01", "a red cup"), ("rc_car-00", "a toy in the jungle"),
        ("rc_car-01", "a red toy"), ("dog6-00", "a dog wearing a red hat"),
    ]  # fmt: skip
    names = [[path.name for path in group] for item in items for group in (item.references, item.pictures)]
    assert names == [["00.png"], ["00.png", "01.png"]] * 5


def test_a_list_is_drawn_from_what_it_names(dreambench: Path) -> None:
    (dreambench / "prompts_and_classes.txt").unlink()
    records = [
        {"prompt": "a cup", "image_paths": ["cup/01.png"]},
        {"prompt": "a wet cup", "image_paths": ["cup/00.png", "cup/01.png"]},
        {"prompt": "a dog", "image_path": "dog6/00.png"},
    ]
    (dreambench / "list.json").write_text(json.dumps(records))
    items = read_items("dreambench", dreambench)
    assert [(item.id, item.subject, len(item.references)) for item in items] == [
        ("cup-00", "cup", 1), ("cup-01", "cup", 2), ("dog6-00", "dog6", 1),
    ]  # fmt: skip
    assert [path.name for path in items[0].pictures] == ["01.png", "00.png"]
    records[2]["image_path"] = "dog6/09.png"
    (dreambench / "list.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match="is not whole:\n  dog6/09.png: no such file"):
        read_items("dreambench", dreambench)


def test_a_data_folder_keeps_its_names(toybox_data: Path) -> None:
    items = read_items("folder", toybox_data / "test")
    assert [item.id for item in items] == [f"test-0000{number}" for number in range(4)]
    assert all(item.references == item.pictures for item in items)


def test_missing_subjects_are_named_and_counted(dreambench: Path) -> None:
    shutil.rmtree(dreambench / "rc_car")
    (dreambench / "cup" / "00.png").unlink()
    (dreambench / "cup" / "01.png").unlink()
    with pytest.raises(UserError, match="1 of 3 subjects are missing: rc_car") as error:
        read_items("dreambench", dreambench)
    assert "cup: no pictures" in str(error.value)


def test_two_pictures_have_two_names(dreambench: Path) -> None:
    (dreambench / "prompts_and_classes.txt").unlink()
    for old, new in (("cup", "a b"), ("dog6", "a_b")):
        (dreambench / old).rename(dreambench / new)
    records = [{"prompt": "one", "image_path": f"{name}/00.png"} for name in ("a b", "a_b")]
    (dreambench / "list.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match="two pictures would be named a_b-00.png"):
        read_items("dreambench", dreambench)


def test_other_layouts_are_no_dreambench(dreambench: Path, toybox_data: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        read_items("dreambench", dreambench / "cup" / "00.png")
    (dreambench / "prompts_and_classes.txt").unlink()
    (dreambench / "cup" / "prompts.txt").write_text("a cup")
    with pytest.raises(UserError, match="is laid out as folders; expected DreamBench"):
        read_items("dreambench", dreambench)


def test_pictures_made_elsewhere_by_name_or_number(dreambench: Path, tmp_path: Path) -> None:
    items = read_items("dreambench", dreambench)
    made = tmp_path / "made"
    made.mkdir()
    for name in ("cup-00.jpg", "1_0.png", "rc_car-00.webp", "3_0.png"):
        (made / name).touch()
    with pytest.raises(UserError, match="lacks 1 of 5 pictures:\n  dog6-00.png or 4_0.png: a dog wearing a red hat"):
        pictures_made_elsewhere(made, items)
    (made / "4_0.png").touch()
    paths = pictures_made_elsewhere(made, items)
    assert [path.name for path in paths] == ["cup-00.jpg", "1_0.png", "rc_car-00.webp", "3_0.png", "4_0.png"]
    with pytest.raises(UserError, match="is no folder"):
        pictures_made_elsewhere(tmp_path / "nowhere", items)


def test_a_benchmark_with_pictures_that_are_not_read_is_not_whole(
    dreambench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (dreambench / "cup" / "02.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is not whole:\n  cup: 02\.heic: HEIC pictures are read with pip install"):
        read_items("dreambench", dreambench)


def test_pictures_made_elsewhere_are_found_whatever_their_format(
    dreambench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    items = read_items("dreambench", dreambench)
    made = tmp_path / "made"
    made.mkdir()
    paths = [made / f"{item.id}{suffix}" for item, suffix in zip(items, SUFFIXES, strict=False)]
    for path in paths:
        path.touch()
    assert pictures_made_elsewhere(made, items) == paths
    paths[-1].rename(paths[-1].with_suffix(".heic"))
    with pytest.raises(UserError, match=r"lacks 1 of 5 pictures:\n(.*\n)*  dog6-00\.heic: HEIC pictures are read with"):
        pictures_made_elsewhere(made, items)
    paths[0].with_suffix(".bmp").touch()
    with pytest.raises(UserError, match=r"has both cup-00\.bmp and cup-00\.png; leave one of them out"):
        pictures_made_elsewhere(made, items)


def test_what_systems_leave_in_folders_is_no_data(dreambench: Path, tmp_path: Path) -> None:
    before = read_items("dreambench", dreambench)
    made = tmp_path / "made"
    made.mkdir()
    for number in range(len(before)):
        Image.new("RGB", (4, 4)).save(made / f"{number}_0.png")
        (made / f"._{number}_0.png").write_bytes(b"\0\5\x16\7")
    pictures = pictures_made_elsewhere(made, before)
    for folder in (dreambench, dreambench / "cup", made):
        for name in ("._00.png", ".DS_Store", "Thumbs.db", ".hidden.png"):
            (folder / name).write_bytes(b"\0\5\x16\7")
        (folder / "@eaDir").mkdir()
        (folder / "@eaDir" / "00.png").write_bytes(b"x")
    assert read_items("dreambench", dreambench) == before and pictures_made_elsewhere(made, before) == pictures
