"""What holds for every layout that `prepare` reads: each test lays the same pictures out in all of them."""

import json
import shutil
import struct
import sys
import types
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from customized_grpo.data import SubjectDataset, images, load_image, load_mask
from customized_grpo.data.color_profiles import ADOBE_GAMMA, ADOBE_RGB, matrix_profile
from customized_grpo.data.prepare import LARGEST_SIDE, Options, prepare
from customized_grpo.errors import UserError

Masks = Sequence[Path] | None
Lay = Callable[[Path, Sequence[Path], Masks], None]


def prompt(index: int) -> str:
    return f"a picture of c{index}"


def copied(source: Path, target: Path) -> Path:
    """Links stay links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, target, follow_symlinks=False))


def folders(root: Path, pictures: Sequence[Path], masks: Masks) -> None:
    for index, path in enumerate(pictures):
        copied(path, root / f"s{index}" / path.name)
        (root / f"s{index}" / "prompts.txt").write_text(prompt(index))
        if masks:
            copied(masks[index], root / f"s{index}" / f"{path.stem}_mask.png")


def dreambench(root: Path, pictures: Sequence[Path], masks: Masks) -> None:
    folders(root, pictures, masks)
    names = "\n".join(f"s{index},c{index}" for index in range(len(pictures)))
    prompts = "prompt_list = [\n'a {0} picture of {1}'.format(unique_token, class_token),\n]\n"
    (root / "prompts_and_classes.txt").write_text(f"subject_name,class\n{names}\n\n{prompts}\n{prompts}")


def manifest(root: Path, pictures: Sequence[Path], masks: Masks) -> None:
    names = [copied(path, root / "pictures" / path.name).name for path in pictures]
    records = [{"prompt": prompt(i), "image_paths": [f"pictures/{name}"]} for i, name in enumerate(names)]
    (root / "list.json").write_text(json.dumps(records))


def syncd(root: Path, pictures: Sequence[Path], masks: Masks) -> None:
    names = [copied(path, root / path.name).name for path in pictures]
    prompts = [prompt((index + 1) % len(names)) for index in range(len(names))]
    for name, mask in zip(names, masks or (), strict=False):
        copied(mask, root / "masks" / name)
    (root / "rigid.json").write_text(json.dumps([{"filenames": names, "prompts": prompts}]))


def in_table(root: Path, pictures: Sequence[Path], masks: Masks) -> dict[str, list[object]]:
    columns: dict[str, list[object]] = {"prompt": [prompt(index) for index in range(len(pictures))]}
    columns["image"] = [{"bytes": path.read_bytes(), "path": path.name} for path in pictures]
    if masks:
        columns["mask"] = [{"bytes": path.read_bytes(), "path": None} for path in masks]
    root.mkdir(parents=True, exist_ok=True)
    return columns


def parquet(root: Path, pictures: Sequence[Path], masks: Masks) -> None:
    pq.write_table(pa.table(in_table(root, pictures, masks)), root / "train-00000-of-00001.parquet")


def saved(root: Path, pictures: Sequence[Path], masks: Masks) -> None:
    datasets.Dataset.from_dict(in_table(root, pictures, masks)).save_to_disk(str(root))


def paths(root: Path, pictures: Sequence[Path], masks: Masks) -> None:
    columns = {"prompt": [prompt(index) for index in range(len(pictures))]}
    columns["image"] = [f"p/{copied(path, root / 'p' / path.name).name}" for path in pictures]
    if masks:
        columns["mask"] = [f"m/{copied(path, root / 'm' / path.name).name}" for path in masks]
    pq.write_table(pa.table(columns), root / "train.parquet")


LINKING: list[Lay] = [folders, dreambench, manifest, syncd, paths]
LAYOUTS: list[Lay] = [*LINKING, parquet, saved]
MASKED: list[Lay] = [folders, dreambench, syncd, paths, parquet, saved]
every_layout = pytest.mark.parametrize("lay", LAYOUTS)


def noise(path: Path, height: int = 20, width: int = 30, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def half_mask(path: Path, height: int = 20, width: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[:, width // 2 :] = 255
    Image.fromarray(mask).save(path)
    return path


def by_picture(output: Path) -> dict[int, torch.Tensor]:
    return {
        int(sample.prompt.split("c")[-1]): load_image(sample.references[0]) for sample in SubjectDataset.open(output)
    }


@every_layout
def test_pictures_come_out_upright_on_white_in_plain_colours_and_small(lay: Lay, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    two = Image.new("RGB", (80, 40), (250, 0, 0))
    two.paste((0, 0, 250), (40, 0, 80, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the left half comes on top
    two.save(made / "turned.jpg", exif=exif, quality=95)
    clear = Image.new("RGBA", (80, 40), (0, 250, 0, 255))
    clear.paste((0, 0, 0, 0), (40, 0, 80, 40))
    clear.save(made / "clear.png")
    Image.new("CMYK", (80, 40), (0, 255, 255, 0)).save(made / "cmyk.jpg", quality=95)
    Image.fromarray(np.full((40, 80), 40000, dtype=np.uint16)).save(made / "deep.png")
    palette = Image.new("P", (80, 40), 1)
    palette.putpalette([0, 0, 0, 200, 100, 0])
    palette.save(made / "palette.png", transparency=0)
    Image.new("RGB", (4000, 2000), (0, 100, 200)).save(made / "huge.png")
    names = ("turned.jpg", "clear.png", "cmyk.jpg", "deep.png", "palette.png", "huge.png")
    lay(tmp_path / "src", [made / name for name in names], None)
    prepare(tmp_path / "src", tmp_path / "out", Options(max_side=32))
    turned, clear_, cmyk, deep, coloured, huge = (image for _, image in sorted(by_picture(tmp_path / "out").items()))
    assert turned.shape == (3, 32, 16)
    assert all(image.shape == (3, 16, 32) for image in (clear_, cmyk, deep, coloured, huge))

    def near(pixels: torch.Tensor, *colour: int) -> bool:
        return bool((pixels.mean((1, 2)) * 255 - torch.tensor(colour)).abs().max() < 12)

    assert near(turned[:, :12], 250, 0, 0) and near(turned[:, 20:], 0, 0, 250)
    assert near(clear_[:, :, :12], 0, 250, 0) and near(clear_[:, :, 20:], 255, 255, 255)
    assert near(cmyk, 255, 0, 0) and near(deep, *[round(40000 / 257)] * 3)
    assert near(coloured, 200, 100, 0) and near(huge, 0, 100, 200)


def bomb(path: Path, side: int) -> Path:
    """A PNG whose header promises much more than there is: decoding it would fail in other words."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


@every_layout
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_problem_is_listed_and_counted(lay: Lay, tmp_path: Path) -> None:
    made = tmp_path / "made"
    fine = noise(made / "fine.png")
    (made / "torn.png").write_bytes(fine.read_bytes()[:100])
    (made / "words.png").write_text("no picture")
    (made / "empty.png").write_bytes(b"")
    files = [fine, made / "torn.png", made / "words.png", made / "empty.png"]
    files += [bomb(made / "bomb.png", 13_000), bomb(made / "larger.png", 60_000)]
    lay(tmp_path / "src", files, None)
    for output in (None, tmp_path / "out"):
        with pytest.raises(UserError) as found:
            prepare(tmp_path / "src", output, Options(max_bad=4))
        said = str(found.value)
        assert "5 of 6 entries cannot be used, more than --max_bad=4 allows" in said and len(said.splitlines()) == 6
        for words in (
            "broken or truncated", "not an image of a known format", "the image file is empty",
            "13000x13000 is 169,000,000 pixels, more than the limit of 150,000,000", "too large (",
        ):  # fmt: skip
            assert words in said
    assert not (tmp_path / "out").exists()
    outcome = prepare(tmp_path / "src", tmp_path / "out", Options(max_bad=5))
    assert (outcome.samples, outcome.pictures, len(outcome.problems)) == (1, 1, 5)
    assert list(by_picture(tmp_path / "out")) == [0]


@pytest.mark.parametrize("lay", LINKING)
def test_links_out_of_the_folder_are_refused(lay: Lay, tmp_path: Path) -> None:
    fine, outside = noise(tmp_path / "made" / "fine.png"), noise(tmp_path / "made" / "outside.png", seed=1)
    (tmp_path / "made" / "link.png").symlink_to(outside)
    lay(tmp_path / "src", [fine, tmp_path / "made" / "link.png"], None)
    with pytest.raises(UserError, match=r"1 of 2 entries cannot be used(?s:.*)link.png leads out of"):
        prepare(tmp_path / "src", None, Options())


def test_prompts_are_read_within_the_folder_and_as_utf_8(tmp_path: Path) -> None:
    folders(tmp_path / "src", [noise(tmp_path / f"{seed}.png", seed=seed) for seed in range(3)], None)
    (tmp_path / "secret.txt").write_text("not for prompts")
    (tmp_path / "src" / "s0" / "prompts.txt").unlink()
    (tmp_path / "src" / "s0" / "prompts.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "src" / "s1" / "prompts.txt").write_bytes("a café".encode("latin-1"))
    told = {each.place: each.text for each in prepare(tmp_path / "src", None, Options(max_bad=2)).problems}
    assert told["s0"].startswith("prompts.txt leads out of") and told["s1"].startswith("prompts.txt is not UTF-8")


def test_text_that_no_file_can_hold(tmp_path: Path) -> None:
    manifest(tmp_path / "src", [noise(tmp_path / "a.png")], None)
    record = {"prompt": "\ud800", "image_path": "pictures/a.png"}
    (tmp_path / "src" / "more.json").write_text(json.dumps([record]))
    outcome = prepare(tmp_path / "src", tmp_path / "out", Options(max_bad=1))
    assert [each.place for each in outcome.problems] == ["more.json:0"] and outcome.samples == 1
    assert list(by_picture(tmp_path / "out")) == [0]


def test_dreambench_without_its_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompts_and_classes.txt: cannot be read"):
        prepare(tmp_path, None, Options(format="dreambench"))


@pytest.fixture
def segmented(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes of the pictures given to rembg, which finds the subject everywhere."""
    seen: list[tuple[int, int]] = []

    def remove(image: Image.Image, **settings: object) -> Image.Image:
        seen.append(image.size)
        return Image.new("L", image.size, 200)

    monkeypatch.setitem(sys.modules, "rembg", types.SimpleNamespace(new_session=lambda: None, remove=remove))
    return seen


@every_layout
def test_masks_are_made_where_there_are_none(lay: Lay, tmp_path: Path, segmented: list[tuple[int, int]]) -> None:
    lay(tmp_path / "src", [noise(tmp_path / f"{seed}.png", seed=seed) for seed in range(2)], None)
    prepare(tmp_path / "src", tmp_path / "out", Options(segment=True))
    assert segmented == [(30, 20)] * 2
    for sample in SubjectDataset.open(tmp_path / "out"):
        assert load_mask(sample.masks[0]).unique().tolist() == pytest.approx([200 / 255])


@pytest.mark.parametrize("lay", MASKED)
def test_masks_that_are_there_are_kept(lay: Lay, tmp_path: Path, segmented: list[tuple[int, int]]) -> None:
    pictures = [noise(tmp_path / f"{seed}.png", seed=seed) for seed in range(2)]
    # One of half the size: it is brought to that of its picture.
    masks = [half_mask(tmp_path / "masks" / "0.png"), half_mask(tmp_path / "masks" / "1.png", 10, 15)]
    lay(tmp_path / "src", pictures, masks)
    prepare(tmp_path / "src", tmp_path / "out", Options(segment=True))
    assert not segmented
    for sample in SubjectDataset.open(tmp_path / "out"):
        mask = load_mask(sample.masks[0])
        assert mask.shape == (1, 20, 30) and mask[..., :12].max() < 0.2 and mask[..., 18:].min() > 0.8


@pytest.mark.parametrize("output", ["out", None])
def test_a_mask_that_vanishes_when_made_small(output: str | None, tmp_path: Path) -> None:
    mask = np.zeros((400, 400), dtype=np.uint8)
    mask[200, 200] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    folders(tmp_path / "src", [noise(tmp_path / "a.png", 400, 400)], [tmp_path / "mask.png"])
    with pytest.raises(UserError, match="a_mask.png: nothing is left of the mask at the size of its picture"):
        prepare(tmp_path / "src", None if output is None else tmp_path / output, Options(max_side=16))


@every_layout
def test_each_picture_is_decoded_once(lay: Lay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is written opens, though it is not decoded again."""
    decoded: Counter[Path] = Counter()
    decode = images._decode

    def counted(path: Path, max_pixels: int) -> Image.Image:
        decoded[path] += 1
        return decode(path, max_pixels)

    files = [noise(tmp_path / f"{seed}.png", seed=seed) for seed in range(3)]
    masks = None if lay is manifest else [half_mask(tmp_path / "masks" / f"{s}.png", 20 * s, 30 * s) for s in (1, 2, 3)]
    lay(tmp_path / "src", files, masks)
    with monkeypatch.context() as patched:
        patched.setattr(images, "_decode", counted)
        prepare(tmp_path / "src", tmp_path / "out", Options(max_side=20))
    assert set(decoded.values()) == {1} and len(decoded) == (3 if masks is None else 6)
    assert not any(path.is_relative_to(tmp_path / "out") for path in decoded)
    assert sorted(by_picture(tmp_path / "out")) == [0, 1, 2]


def test_what_could_not_be_opened_is_not_written(tmp_path: Path) -> None:
    folders(tmp_path / "src", [noise(tmp_path / "a.png")], None)
    assert LARGEST_SIDE**2 <= images.MAX_PIXELS < (LARGEST_SIDE + 1) ** 2
    assert prepare(tmp_path / "src", None, Options(max_side=LARGEST_SIDE)).samples == 1
    with pytest.raises(UserError, match=f"at most {LARGEST_SIDE}"):
        prepare(tmp_path / "src", None, Options(max_side=LARGEST_SIDE + 1))


@every_layout
def test_what_systems_and_tools_leave_is_left_out(lay: Lay, tmp_path: Path) -> None:
    lay(tmp_path / "src", [noise(tmp_path / f"{seed}.png", seed=seed) for seed in range(3)], None)
    folder_of = [tmp_path / "src", *(path for path in (tmp_path / "src").rglob("*") if path.is_dir())]
    for folder in folder_of:
        for name in ("._a.jpg", "._list.json", "._train.parquet", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"\0\5\x16\7 Mac OS X")
        for name in (".cache/huggingface/download", "__MACOSX", "@eaDir", ".ipynb_checkpoints"):
            (folder / name).mkdir(parents=True)
            shutil.copy(tmp_path / "0.png", folder / name / "a.png")
            for left in ("prompts.txt", "list.json", "train.parquet"):
                (folder / name / left).write_text("a picture of nothing")
    outcome = prepare(tmp_path / "src", tmp_path / "out", Options(references="all"))
    assert (outcome.samples, outcome.pictures, outcome.problems) == (3, 3, [])
    assert all(len(sample.references) == 1 for sample in SubjectDataset.open(tmp_path / "out"))


@pytest.mark.parametrize("lay", MASKED)
def test_masks_of_turned_photographs_lie_on_their_subject(lay: Lay, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = half_mask(tmp_path / "masks" / "a.png", 64, 96)
    Image.open(mask).convert("RGB").save(tmp_path / "a.jpg", quality=95, exif=exif)
    lay(tmp_path / "src", [tmp_path / "a.jpg", tmp_path / "a.jpg"], [mask, mask])
    prepare(tmp_path / "src", tmp_path / "out", Options())
    for sample in SubjectDataset.open(tmp_path / "out"):
        image, cut = load_image(sample.references[0]), load_mask(sample.masks[0])
        assert image.shape == (3, 96, 64) and ((image[:1] > 0.5) == (cut > 0.5)).float().mean() > 0.99


@every_layout
def test_colours_are_those_of_the_profile(lay: Lay, tmp_path: Path) -> None:
    profile = matrix_profile(ADOBE_RGB, ADOBE_GAMMA)
    for name in "ab":
        Image.new("RGB", (30, 20), (60, 160, 60)).save(tmp_path / f"{name}.png", icc_profile=profile)
    lay(tmp_path / "src", [tmp_path / "a.png", tmp_path / "b.png"], None)
    prepare(tmp_path / "src", tmp_path / "out", Options())
    for sample in SubjectDataset.open(tmp_path / "out"):
        assert (load_image(sample.references[0])[:, 0, 0] * 255).tolist() == pytest.approx([0, 161, 47], abs=0.01)
