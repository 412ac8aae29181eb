import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from photographs import YCBCR
from PIL import Image
from torch import Tensor

from customized_grpo.data import image_grid, inspect_image, load_image, load_mask, resize_square, save_image
from customized_grpo.data.images import PictureCache, fit, resize
from customized_grpo.errors import UserError


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def as_tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).permute(2, 0, 1).float() / 255


def jpeg(values: np.ndarray, orientation: int | None = None) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(values).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def test_an_rgb_png_is_read_exactly(tmp_path: Path) -> None:
    values = pixels(5, 7)
    Image.fromarray(values).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.dtype == torch.float32
    assert torch.equal(image, as_tensor(values))
    assert image.is_contiguous()
    assert inspect_image(tmp_path / "a.png") == (5, 7)


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    values = pixels(6, 6, channels=4)
    values[0, 0] = (10, 20, 30, 0)
    values[0, 1] = (10, 20, 30, 255)
    Image.fromarray(values, "RGBA").save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image[:, 0, 0].tolist() == [1, 1, 1]
    torch.testing.assert_close(image[:, 0, 1], torch.tensor([10, 20, 30]) / 255)
    rgb, alpha = as_tensor(values)[:3], as_tensor(values)[3:]
    torch.testing.assert_close(image, 1 + alpha * (rgb - 1), rtol=0, atol=1e-6)
    assert float(image.max()) <= 1


def test_a_palette_with_a_transparent_colour_is_composited_on_white(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([200, 0, 0, 0, 200, 0])
    picture.putdata([0, 1])
    picture.save(tmp_path / "a.gif", transparency=1)
    image = load_image(tmp_path / "a.gif")
    torch.testing.assert_close(image[:, 0], torch.tensor([[200 / 255, 1], [0, 1], [0, 1]]))


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a.swapaxes(0, 1), 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, turned) -> None:  # type: ignore[no-untyped-def]
    values = np.kron(pixels(2, 3), np.ones((8, 8, 1), dtype=np.uint8))
    (tmp_path / "plain.jpg").write_bytes(jpeg(values))
    (tmp_path / "turned.jpg").write_bytes(jpeg(values, orientation))
    plain, image = load_image(tmp_path / "plain.jpg"), load_image(tmp_path / "turned.jpg")
    expected = turned(plain.permute(1, 2, 0).numpy())
    assert torch.equal(image, torch.from_numpy(expected.copy()).permute(2, 0, 1))
    assert inspect_image(tmp_path / "turned.jpg") == expected.shape[:2]


def test_16_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = torch.tensor([0, 257, 32896, 65535]) / 65535
    torch.testing.assert_close(load_image(tmp_path / "a.png"), expected.expand(3, 1, 4))
    torch.testing.assert_close(load_mask(tmp_path / "a.png"), expected.expand(1, 1, 4))


def test_pixels_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff: cannot read pixels of mode F"):
        load_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", YCBCR])
def test_other_pixel_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    name = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.fromarray(pixels(4, 4)).convert(mode).save(name)
    image = load_image(name)
    assert image.shape == (3, 4, 4)
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1


def test_a_truncated_jpeg_is_named(tmp_path: Path) -> None:
    whole = jpeg(pixels(64, 64))
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for read in (load_image, load_mask, inspect_image):
        with pytest.raises(UserError, match=r"cut\.jpg: broken or truncated image .*truncated"):
            read(tmp_path / "cut.jpg")


def test_a_damaged_png_is_named(tmp_path: Path) -> None:
    Image.fromarray(pixels(32, 32)).save(tmp_path / "bad.png")
    data = bytearray((tmp_path / "bad.png").read_bytes())
    data[60:90] = bytes(30)
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.png: broken or truncated"):
        load_image(tmp_path / "bad.png")


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for name, said in [
        ("text.png", "not an image of a known format"),
        ("empty.png", "the image file is empty"),
        ("folder.png", "not a file"),
        ("none.png", "no such image file"),
    ]:
        with pytest.raises(UserError, match=rf"{name}: {said}"):
            load_image(tmp_path / name)


def test_a_format_that_runs_programs_is_not_opened(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    with pytest.raises(UserError, match=r"a\.eps: EPS files are not read; save it as PNG or JPEG"):
        load_image(tmp_path / "a.eps")


def test_the_pixel_limit_is_read_from_the_header(tmp_path: Path) -> None:
    Image.fromarray(pixels(20, 30)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", max_pixels=600).shape == (3, 20, 30)
    with pytest.raises(UserError, match=r"a\.png: 30x20 is 600 pixels, more than the limit of 599"):
        load_image(tmp_path / "a.png", max_pixels=599)
    header_only = (tmp_path / "a.png").read_bytes()[:60]
    (tmp_path / "header.png").write_bytes(header_only)
    with pytest.raises(UserError, match="more than the limit"):
        load_image(tmp_path / "header.png", max_pixels=599)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_000, 12_000, 20_000])
def test_a_decompression_bomb_is_refused(tmp_path: Path, side: int) -> None:
    Image.new("1", (8, 8)).save(tmp_path / "bomb.bmp")
    data = bytearray((tmp_path / "bomb.bmp").read_bytes())
    data[18:26] = side.to_bytes(4, "little") * 2
    (tmp_path / "bomb.bmp").write_bytes(data)
    with pytest.raises(UserError, match=r"bomb\.bmp: .*scale the image down"):
        load_image(tmp_path / "bomb.bmp")


def test_a_mask_is_one_on_the_subject(tmp_path: Path) -> None:
    values = np.zeros((4, 5), dtype=np.uint8)
    values[1:3, 2:4] = 255
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(values > 0).save(tmp_path / "binary.png")
    cutout = np.dstack([np.full((4, 5, 3), 255, dtype=np.uint8), values])
    Image.fromarray(cutout, "RGBA").save(tmp_path / "cutout.png")
    expected = torch.from_numpy(values)[None].float() / 255
    for name in ("grey.png", "binary.png", "cutout.png"):
        assert torch.equal(load_mask(tmp_path / name), expected), name


def test_a_mask_of_zeros_and_ones_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m\.png: the mask is empty: its brightest value is 0\.004 of 1"):
        load_mask(tmp_path / "m.png")


def test_an_image_of_the_right_size_passes_bitwise() -> None:
    image = torch.rand(3, 9, 9)
    assert torch.equal(resize_square(image, 9), image)


@pytest.mark.parametrize(("height", "width"), [(6, 10), (10, 6), (6, 9), (9, 6)])
def test_the_centre_is_kept(height: int, width: int) -> None:
    image = torch.rand(3, height, width)
    top, left = (height - 6) // 2, (width - 6) // 2
    assert torch.equal(resize_square(image, 6), image[:, top : top + 6, left : left + 6])


def test_shrinking_is_antialiased() -> None:
    stripes = torch.zeros(1, 64, 64)
    stripes[:, :, ::4] = 1
    inner = resize_square(stripes, 8)[:, :, 1:-1]
    torch.testing.assert_close(inner, torch.full((1, 8, 6), 0.25), atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [16, 48, 96])
def test_resizing_agrees_with_pillow(size: int) -> None:
    values = pixels(64, 64)
    pillow = Image.fromarray(values).resize((size, size), Image.Resampling.BILINEAR)
    ours = resize_square(as_tensor(values), size)
    assert (ours - as_tensor(np.asarray(pillow).copy())).abs().max() <= 1.01 / 255


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1, width=32))
def test_a_plain_image_stays_plain(height: int, width: int, size: int, level: float) -> None:
    resized = resize_square(torch.full((1, height, width), level), size)
    torch.testing.assert_close(resized, torch.full((1, size, size), level), rtol=0, atol=1e-6)
    assert 0 <= float(resized.min()) <= float(resized.max()) <= 1


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 pixel"):
        resize_square(torch.rand(3, 4, 4), 0)


def test_the_cache_drops_the_least_recently_used() -> None:
    loaded: list[str] = []

    def load(path: Path, max_pixels: int) -> Tensor:
        loaded.append(path.name)
        return torch.zeros(3, 4, 4)

    def prepare(image: Tensor, count: int) -> Tensor:
        return image * count

    cache = PictureCache(max_bytes=2 * 3 * 4 * 4 * 4)
    for name in "abacab":
        cache.get(load, Path(name), prepare, 1)
    assert loaded == ["a", "b", "c", "b"]
    assert cache.get(load, Path("b"), prepare, 2) is not cache.get(load, Path("b"), prepare, 1)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (64, 48), (16, 16)])
def test_resizing_keeps_shape_and_crops_what_is_over(height: int, width: int) -> None:
    ramp = torch.linspace(0, 1, width).expand(3, height, width)
    resized = resize(ramp, (16, 32))
    assert resized.shape == (3, 16, 32)
    assert resize(resized, (16, 32)) is resized
    # The middle stays in the middle, and the ramp still rises.
    assert resized.mean() == pytest.approx(0.5, abs=0.02)
    assert (resized[0, 8].diff() >= -1e-4).all()
    if height * 2 > width:
        slope = (resized[0, 8, -4] - resized[0, 8, 3]) / 25
        assert float(slope) == pytest.approx(1 / (width - 1) * (width / 32), rel=0.15)


def test_a_fitted_picture_is_whole_and_on_white() -> None:
    dark = torch.zeros(3, 10, 30)
    fitted = fit(dark, (20, 20))
    assert fitted.shape == (3, 20, 20)
    assert (fitted[:, :6] == 1).all() and (fitted[:, -6:] == 1).all()
    assert (fitted[:, 7:13] == 0).all()
    assert fit(dark, (10, 30)) is dark


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_saved_is_read_back(tmp_path: Path, channels: int) -> None:
    image = as_tensor(pixels(6, 5, channels))
    save_image(image, tmp_path / "new" / "a.png")
    back = load_image(tmp_path / "new" / "a.png")
    assert torch.equal(back, image.expand(3, -1, -1))
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_saving_rounds_and_clamps(tmp_path: Path) -> None:
    save_image(torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 2.0]).reshape(1, 1, 6), tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 0, 0, 1, 255, 255]]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jpg: images are written as PNG"):
        save_image(torch.rand(3, 2, 2), tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"got \[1, 3, 2, 2\]"):
        save_image(torch.rand(1, 3, 2, 2), tmp_path / "a.png")
    with pytest.raises(ValueError, match="not finite"):
        save_image(torch.full((3, 2, 2), float("nan")), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_grid_places_every_pixel() -> None:
    images = torch.rand(5, 3, 2, 4)
    grid = image_grid(images, columns=3, scale=2, padding=1, background=0.25)
    assert grid.shape == (3, 2 * (4 + 1) + 1, 3 * (8 + 1) + 1)
    for index, image in enumerate(images):
        top, left = 1 + index // 3 * 5, 1 + index % 3 * 9
        for dy in (0, 1):
            for dx in (0, 1):
                assert torch.equal(grid[:, top + dy : top + 4 : 2, left + dx : left + 8 : 2], image)
    assert (grid[:, 6:10, 19:27] == 0.25).all()
    assert (grid[:, 0] == 0.25).all()


def test_a_grid_is_no_wider_than_its_images() -> None:
    images = torch.rand(2, 3, 2, 2)
    assert torch.equal(image_grid(images, columns=8), torch.cat([images[0], images[1]], dim=-1))


@pytest.mark.parametrize("change", [{"columns": 0}, {"scale": 0}, {"padding": -1}, {"images": torch.rand(0, 3, 2, 2)}])
def test_an_impossible_grid_is_refused(change: dict[str, object]) -> None:
    settings: dict[str, object] = {"images": torch.rand(2, 3, 2, 2), "columns": 2, **change}
    with pytest.raises(ValueError, match="expected images"):
        image_grid(**settings)  # type: ignore[arg-type]
