"""Kinds of picture files: each is read, or named with what to do about it."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from customized_grpo.cli.main import main
from customized_grpo.data import SubjectDataset, inspect_image, load_image, load_mask
from customized_grpo.data.formats import is_picture, remedy
from customized_grpo.data.prepare import Options, prepare
from customized_grpo.errors import UserError

HEIF = "HEIC pictures are read with pip install 'customized-grpo[heif]'"
RAW = "raw files of cameras are not read; export it as JPEG, PNG or TIFF"
COLOURS = np.arange(4).reshape(2, 2, 1) * np.array([60, 30, 80])


def photograph(path: Path, height: int = 64, width: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(COLOURS.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    if path.suffix.lower() in (".heic", ".hif"):
        pytest.importorskip("pillow_heif").from_pillow(picture).save(path, quality=90)
    else:
        picture.save(path, **({"format": "JPEG"} if path.suffix in (".jfif", ".jpe") else {}))
    return path


def tiff(path: Path, values: np.ndarray, kind: int, **tags: int) -> Path:
    """A plain TIFF of [H, W, C]; `kind` is its SampleFormat: 1 whole numbers, 2 with a sign, 3 floating point."""
    height, width, channels = values.shape
    bits, data = values.dtype.itemsize * 8, values.tobytes()
    single = {
        256: width,
        257: height,
        259: 1,
        262: 2 if channels == 3 else 1,
        277: channels,
        278: height,
        279: len(data),
    }
    single |= {int(name[1:]): value for name, value in tags.items()}
    lists = {258: [bits] * channels, 339: [kind] * channels}
    count = len(single) + len(lists) + 1
    place = 8 + 2 + 12 * count + 4
    entries = {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in single.items()}
    for tag, numbers in lists.items():
        packed = struct.pack(f"<{channels}H", *numbers)
        value = packed.ljust(4, b"\0") if channels < 3 else struct.pack("<I", place)
        entries[tag] = struct.pack("<HHI", tag, 3, channels) + value
        if channels >= 3:
            place += len(packed)
    entries[273] = struct.pack("<HHII", 273, 4, 1, place)
    tail = b"".join(struct.pack(f"<{channels}H", *numbers) for numbers in lists.values()) if channels >= 3 else b""
    head = b"II*\0" + struct.pack("<IH", 8, count) + b"".join(entries[tag] for tag in sorted(entries))
    path.write_bytes(head + bytes(4) + tail + data)
    return path


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


@pytest.mark.parametrize("suffix", [".avif", ".heic", ".hif", ".jfif", ".jpe", ".HEIC", ".AVIF", ".webp"])
def test_pictures_of_phones_and_browsers_are_read(tmp_path: Path, suffix: str) -> None:
    path = photograph(tmp_path / f"a{suffix}", 48, 64)
    image = load_image(path)
    assert image.shape == (3, 48, 64) and inspect_image(path) == (48, 64)
    assert is_picture(path)
    assert (image[:, 5, 60] * 255).tolist() == pytest.approx([60, 30, 80], abs=12)


def test_heic_is_turned_upright_once(tmp_path: Path) -> None:
    """By the box irot, which libheif follows; the EXIF orientation beside it says the same, and is ignored."""
    exif, pixels = Image.Exif(), np.zeros((32, 64, 3), dtype=np.uint8)
    exif[0x0112], pixels[:, :32] = 6, 255
    file = pytest.importorskip("pillow_heif").from_pillow(Image.fromarray(pixels))
    file.save(tmp_path / "a.heic", quality=90, exif=exif.tobytes())
    # The encoder writes no irot: it takes the place of the box clap, which cuts off what fills the block of 64 x 64.
    content = (tmp_path / "a.heic").read_bytes()
    place = content.index(b"clap") - 4
    quarter = struct.pack(">I4sB", 9, b"irot", 3) + struct.pack(">I4s23x", 31, b"free")
    (tmp_path / "a.heic").write_bytes(content[:place] + quarter + content[place + 40 :])
    image = load_image(tmp_path / "a.heic")
    assert image[:, :28].min() > 0.9 and image[:, 36:].max() < 0.1


def test_a_damaged_heic_is_named(tmp_path: Path) -> None:
    whole = photograph(tmp_path / "a.heic").read_bytes()
    for cut in (len(whole) // 2, len(whole) - 30, 200):
        (tmp_path / "cut.heic").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut\.heic: "):
            load_image(tmp_path / "cut.heic")
    with pytest.raises(UserError, match="4,096 pixels, more than the limit of 99"):
        load_image(tmp_path / "a.heic", max_pixels=99)


@pytest.mark.usefixtures("without_heif")
def test_a_heic_is_known_by_its_content_where_it_is_not_read(tmp_path: Path) -> None:
    head = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic")
    for name in ("a.heic", "a.jpg", "no-suffix"):
        (tmp_path / name).write_bytes(head + bytes(100))
        with pytest.raises(UserError, match=rf"{name}: HEIC pictures are read with pip install"):
            load_image(tmp_path / name)
    photograph(tmp_path / "a.jpg").rename(tmp_path / "really-a-jpeg.heic")
    assert load_image(tmp_path / "really-a-jpeg.heic").shape == (3, 64, 64)
    assert remedy(".HEIC") and not is_picture(Path("a.heic"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jxl", b"\xff\x0a" + bytes(50), "JXL files are not read; save it as PNG or JPEG"),
        ("blob", b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JXL files are not read"),
        ("a.jp2", b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JP2 files are not read"),
        ("a.cr3", struct.pack(">I4s4sI4s", 24, b"ftyp", b"crx ", 1, b"crx "), RAW),
        ("a.raf", b"FUJIFILMCCD-RAW 0201" + bytes(40), RAW),
        ("a.psd", b"8BPS" + bytes(40), "PSD files are not read"),
        ("a.png", b"hello" * 20, "not an image of a known format"),
    ],
)
def test_other_kinds_are_told_with_a_remedy(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (load_image, load_mask, inspect_image):
        with pytest.raises(UserError, match=f"{name}: {said}"):
            read(tmp_path / name)


def test_the_thumbnail_of_a_raw_file_is_not_its_picture(tmp_path: Path) -> None:
    """Raw files are TIFFs; Pillow opens the first image in them."""
    pixels = np.full((8, 8, 3), 200, dtype=np.uint8)
    files = [tiff(tmp_path / "a.nef", pixels, 1), tiff(tmp_path / "a.bin", pixels, 1, t254=1)]
    files += [tiff(tmp_path / "b.bin", pixels, 1, t50706=0x0401), tiff(tmp_path / "a.ARW", pixels, 1)]
    for path in files:
        with pytest.raises(UserError, match=f"{path.name}: {RAW}"):
            load_image(path)
    assert load_image(tiff(tmp_path / "fine.tif", pixels, 1)).unique().tolist() == pytest.approx([200 / 255])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7.5, 0.5])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floating_point_pixels_are_refused(tmp_path: Path, value: float, channels: int, kind: type) -> None:
    path = tiff(tmp_path / "a.tif", np.full((8, 8, channels), value, dtype=kind), 3)
    for read in (load_image, load_mask, inspect_image):
        with pytest.raises(UserError, match=r"a\.tif: .*floating-point numbers.*; save it with 8 bits as RGB"):
            read(path)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.uint32])
def test_numbers_of_no_known_range_are_refused(tmp_path: Path, kind: type) -> None:
    path = tiff(tmp_path / "a.tif", np.full((8, 8, 1), 100, dtype=kind), 1 if kind is np.uint32 else 2)
    for read in (load_image, load_mask, inspect_image):
        with pytest.raises(UserError, match=r"a\.tif: .*range.*; save it with 8 bits as RGB or greyscale"):
            read(path)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A subject with a JPEG, a HEIC and raw files, and one with a raw file alone."""
    source = tmp_path / "src"
    photograph(source / "toy" / "c.jpg")
    for name in ("a.HEIC", "b.heic"):
        (source / "toy" / name).write_bytes(struct.pack(">I4s4sI4s", 20, b"ftyp", b"heic", 0, b"heic"))
    for name in ("c.CR2", "c.xmp", "c.mov", "toy/notes.txt"):
        (source / "toy" / name).parent.mkdir(exist_ok=True)
        (source / "toy" / name).write_bytes(b"x")
    (source / "toy" / "prompts.txt").write_text("a toy")
    return source


@pytest.mark.usefixtures("without_heif")
def test_pictures_that_are_not_read_are_named(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = prepare(mixed, None, Options(references="all"))
    told = [(each.place, each.text, each.count) for each in outcome.problems]
    assert outcome.samples == 1 and outcome.pictures == 1
    assert told == [("toy", f"a.HEIC, b.heic: {HEIF}; or save it as JPEG or PNG", 0), ("toy", f"c.CR2: {RAW}", 0)]
    main(["prepare", str(mixed), "--check"])
    said = " ".join(capsys.readouterr().out.split())
    assert "left out: toy: a.HEIC, b.heic: HEIC pictures are read with pip install" in said and f"c.CR2: {RAW}" in said


@pytest.mark.usefixtures("without_heif")
def test_a_subject_with_nothing_that_is_read_is_a_problem(mixed: Path) -> None:
    (mixed / "toy" / "c.jpg").unlink()
    with pytest.raises(UserError) as found:
        prepare(mixed, None, Options())
    assert "1 of 1 entries cannot be used" in str(found.value)
    assert HEIF in str(found.value) and RAW in str(found.value) and "toy: no pictures" in str(found.value)


def test_heic_becomes_references_where_it_is_read(mixed: Path, tmp_path: Path) -> None:
    for name in ("a.HEIC", "b.heic"):
        photograph(mixed / "toy" / name)
    outcome = prepare(mixed, tmp_path / "out", Options(references="all"))
    (sample,) = SubjectDataset.open(tmp_path / "out")
    assert len(sample.references) == 3 and [each.text for each in outcome.problems] == [f"c.CR2: {RAW}"]
