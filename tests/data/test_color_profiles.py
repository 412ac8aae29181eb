"""Colours come out in sRGB, whatever profile a picture has; each is compared with the formulas, written out here."""

import io
import itertools
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photographs import YCBCR
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from customized_grpo.data import inspect_image, load_image, load_mask, save_image
from customized_grpo.data.color_profiles import ADOBE_GAMMA, ADOBE_RGB, DISPLAY_P3, SRGB, matrix_profile
from customized_grpo.errors import UserError

ADOBE = matrix_profile(ADOBE_RGB, ADOBE_GAMMA)
P3 = matrix_profile(DISPLAY_P3, None)
# Linear RGB to CIE XYZ of D65, as the standards print it.
XYZ_OF_SRGB = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
XYZ_OF_ADOBE = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]])
XYZ_OF_P3 = np.array([[0.48657, 0.26567, 0.19822], [0.22897, 0.69174, 0.07929], [0.0, 0.04511, 1.04394]])


def srgb(values: np.ndarray) -> np.ndarray:
    """Linear to sRGB (IEC 61966-2-1)."""
    values = values.clip(0, 1)
    return np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055)


def linear(values: np.ndarray) -> np.ndarray:
    """sRGB to linear."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def noise(seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (12, 16, channels), dtype=np.uint8)


def saved(path: Path, picture: Image.Image, **settings: Any) -> Path:
    picture.save(path, **settings)
    return path


def as_tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).permute(2, 0, 1)


WHITE = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)


def profile_of(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, data, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s", offset + len(data), 0x02400000, kind, space, connection, b"acsp")
    return head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061) + bytes(48) + table + data


def grey_profile(gamma: float) -> bytes:
    """A minimal ICC profile of grey with the curve value ** gamma."""
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    return profile_of(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": WHITE, b"kTRC": curve})


def cmyk_profile() -> bytes:
    """A minimal ICC profile of CMYK: a table of 16 corners in Lab, each ink darkening by its own amount alone."""
    corners = itertools.product((0, 1), repeat=4)
    lightness = [100 - 10 * cyan - 20 * magenta - 5 * yellow - 60 * black for cyan, magenta, yellow, black in corners]
    table = bytes(value for level in lightness for value in (round(level * 2.55), 128, 128))
    ramp = bytes(range(256))
    head = b"mft1\0\0\0\0" + struct.pack(">4B9i", 4, 3, 2, 0, *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
    return profile_of(b"prtr", b"CMYK", b"Lab ", {b"wtpt": WHITE, b"A2B0": head + ramp * 4 + table + ramp * 3})


def with_chunks(path: Path, picture: Image.Image, **chunks: bytes) -> Path:
    info = PngInfo()
    for name, content in chunks.items():
        info.add(name.encode(), content)
    return saved(path, picture, pnginfo=info)


def chromaticities(values: tuple[float, ...]) -> bytes:
    return struct.pack(">8I", *(round(value * 100_000) for value in values))


def gamma(value: float) -> bytes:
    return struct.pack(">I", round(value * 100_000))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.webp", "a.avif", "a.heic"])
def test_a_green_of_adobe_rgb_is_what_it_is_in_srgb(tmp_path: Path, name: str) -> None:
    picture = Image.new("RGB", (64, 64), (60, 160, 60))
    if name.endswith(".heic"):
        pillow_heif = pytest.importorskip("pillow_heif")
        file = pillow_heif.from_pillow(picture)
        file.info["icc_profile"] = ADOBE
        file.save(tmp_path / name, quality=-1)
    else:
        saved(
            tmp_path / name, picture, icc_profile=ADOBE, **{} if name.endswith((".png", ".tiff")) else {"quality": 100}
        )
    colour = load_image(tmp_path / name)[:, 30, 30] * 255
    assert colour.tolist() == pytest.approx([0, 161, 47], abs=0.01 if name.endswith((".png", ".tiff")) else 4)


@pytest.mark.parametrize(
    ("profile", "matrix", "decode"),
    [(ADOBE, XYZ_OF_ADOBE, lambda v: v**ADOBE_GAMMA), (P3, XYZ_OF_P3, linear)],
    ids=["Adobe RGB", "Display P3"],
)
def test_a_profile_is_converted_as_the_standards_say(
    tmp_path: Path, profile: bytes, matrix: np.ndarray, decode
) -> None:  # type: ignore[no-untyped-def]
    values = noise()
    image = load_image(saved(tmp_path / "a.png", Image.fromarray(values), icc_profile=profile))
    expected = srgb(decode(values / 255) @ matrix.T @ np.linalg.inv(XYZ_OF_SRGB).T)
    assert (image - as_tensor(expected)).abs().max() <= 1.6 / 255


def test_pictures_without_a_profile_are_read_to_the_bit(tmp_path: Path) -> None:
    values = noise()
    for settings in ({}, {"icc_profile": matrix_profile(SRGB, None)}, {"icc_profile": lcms_srgb()}):
        image = load_image(saved(tmp_path / "a.png", Image.fromarray(values), **settings))
        assert torch.equal(image, as_tensor(values / np.float32(255)))


def lcms_srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_transparency_stays_and_colours_are_converted(tmp_path: Path) -> None:
    values = noise(channels=4)
    plain = load_image(saved(tmp_path / "rgb.png", Image.fromarray(values[..., :3].copy()), icc_profile=ADOBE))
    image = load_image(saved(tmp_path / "rgba.png", Image.fromarray(values, "RGBA"), icc_profile=ADOBE))
    alpha = as_tensor(values[..., 3:] / 255)
    torch.testing.assert_close(image, plain * alpha + 1 - alpha, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["P", YCBCR])
def test_pixels_of_other_modes_have_the_profile_of_rgb(tmp_path: Path, mode: str) -> None:
    name = "a.png" if mode == "P" else "a.tiff"
    picture = Image.fromarray(noise()).convert(mode)
    image = load_image(saved(tmp_path / name, picture, icc_profile=ADOBE))
    same = load_image(saved(tmp_path / "rgb.png", picture.convert("RGB"), icc_profile=ADOBE))
    assert torch.equal(image, same) and not torch.equal(
        image, load_image(saved(tmp_path / "b.png", picture.convert("RGB")))
    )


@pytest.mark.parametrize("bits", [8, 16])
def test_greys_are_converted_by_a_profile_of_grey(tmp_path: Path, bits: int) -> None:
    values = noise(channels=1)[..., 0]
    stored = values if bits == 8 else values.astype(np.uint16) * 257
    image = load_image(saved(tmp_path / "a.png", Image.fromarray(stored), icc_profile=grey_profile(1.0)))
    assert (image - torch.from_numpy(srgb(values / 255)).float()).abs().max() <= 1 / 255
    assert torch.equal(image[0], image[1])


def test_a_grey_picture_with_a_profile_of_rgb_is_its_greys(tmp_path: Path) -> None:
    values = noise(channels=1)[..., 0]
    for profile, expected in ((P3, values / 255), (ADOBE, srgb((values / 255) ** ADOBE_GAMMA))):
        image = load_image(saved(tmp_path / "a.jpg", Image.fromarray(values), quality=100, icc_profile=profile))
        grey = load_image(saved(tmp_path / "b.jpg", Image.fromarray(values), quality=100))
        assert (image[0] - image[1]).abs().max() <= 1 / 255
        assert (image[0] - torch.from_numpy(expected)).abs().max() <= 3 / 255
        assert torch.equal(image, grey) == (profile == P3)


@pytest.mark.parametrize("name", ["a.jpg", "a.tiff"])
def test_inks_are_converted_by_their_profile(tmp_path: Path, name: str) -> None:
    """The greys of this profile, not of the complement that a picture without one has; black point compensated."""
    for inks, lightness in (((0, 0, 0, 0), 100.0), ((255, 0, 0, 0), 90.0), ((0, 255, 0, 0), 80.0)):
        settings = {"quality": 100} if name.endswith("jpg") else {}
        picture = Image.new("CMYK", (16, 16), inks)
        image = load_image(saved(tmp_path / name, picture, icc_profile=cmyk_profile(), **settings))[:, 8, 8]
        # L* to linear light, from which the profile's darkest, L* = 5, is black.
        light, darkest = ((level + 16) ** 3 / 116**3 if level > 8 else level / 903.3 for level in (lightness, 5.0))
        expected = float(srgb(np.array((light - darkest) / (1 - darkest))))
        assert image.tolist() == pytest.approx([expected] * 3, abs=2.5 / 255)


def test_the_optional_colours_of_cameras_are_adobe_rgb(tmp_path: Path) -> None:
    """DCF: Adobe RGB without a profile, told by the interoperability index R03."""
    picture = Image.new("RGB", (32, 16), (60, 160, 60))
    for index, expected in (("R03", [0, 161, 47]), ("R98", [60, 160, 60])):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: index}
        image = load_image(saved(tmp_path / "a.jpg", picture, exif=exif, quality=100))
        assert image.shape == (3, 32, 16) and (image[:, 8, 8] * 255).tolist() == pytest.approx(expected, abs=1.5)


def test_gamma_and_primaries_of_a_png_are_followed(tmp_path: Path) -> None:
    values = noise()
    picture = Image.fromarray(values)
    plain = as_tensor(values / np.float32(255))
    same = [
        {"gAMA": gamma(0.45455)},
        {"gAMA": gamma(0.45455), "cHRM": chromaticities(SRGB)},
        {"gAMA": gamma(1.0), "sRGB": b"\0"},
    ]
    for chunks in same:
        assert torch.equal(load_image(with_chunks(tmp_path / "a.png", picture, **chunks)), plain), chunks
    image = load_image(with_chunks(tmp_path / "a.png", picture, gAMA=gamma(1.0)))
    assert (image - as_tensor(srgb(values / 255))).abs().max() <= 1 / 255
    image = load_image(with_chunks(tmp_path / "a.png", picture, gAMA=gamma(0.45455), cHRM=chromaticities(DISPLAY_P3)))
    p3 = load_image(saved(tmp_path / "b.png", picture, icc_profile=P3))
    assert torch.equal(image, p3)
    with pytest.raises(UserError, match=r"a\.png: its gamma 0\.0 and chromaticities .* are damaged"):
        load_image(with_chunks(tmp_path / "a.png", picture, gAMA=gamma(0)))


def broken_profiles(folder: Path) -> dict[Path, str]:
    """Pictures with a profile that is damaged or of another kind, and what is said of them."""
    rgb, grey = Image.fromarray(noise()), Image.fromarray(noise(channels=1)[..., 0])
    torn = folder / "torn.png"
    content = saved(torn, rgb, icc_profile=P3).read_bytes()
    start = content.index(b"iCCP") + 4
    size = int.from_bytes(content[start - 8 : start - 4], "big")
    chunk = content[start : start + size - 20] + bytes(20)
    checked = b"iCCP" + chunk
    torn.write_bytes(
        content[: start - 4] + checked + struct.pack(">I", zlib.crc32(checked)) + content[start + size + 4 :]
    )
    parts = folder / "parts.jpg"
    content = saved(parts, rgb, icc_profile=P3 + bytes(70_000)).read_bytes()
    second = content.index(b"ICC_PROFILE\0\2") - 4
    parts.write_bytes(
        content[:second] + content[second + 2 + int.from_bytes(content[second + 2 : second + 4], "big") :]
    )
    return {
        torn: r"damaged \(a part of it is missing\)",
        parts: r"damaged \(a part of it is missing\)",
        saved(folder / "cut.png", rgb, icc_profile=P3[:300]): "damaged",
        saved(folder / "text.jpg", rgb, icc_profile=b"x" * 300): "damaged",
        saved(folder / "grey.jpg", rgb, icc_profile=grey_profile(2.2)): "one of GRAY, and its pixels are RGB",
        saved(folder / "cmyk.jpg", grey.convert("CMYK"), icc_profile=P3): "one of RGB, and its pixels are CMYK",
    }


def test_a_profile_that_cannot_be_followed_is_an_error(tmp_path: Path) -> None:
    for path, said in broken_profiles(tmp_path).items():
        for read in (load_image, inspect_image):
            with pytest.raises(
                UserError, match=f"{path.name}: its colour profile is {said}.*; save the picture in sRGB"
            ):
                read(path)


def test_masks_have_no_colours(tmp_path: Path) -> None:
    values = noise(channels=1)[..., 0]
    expected = torch.from_numpy(values)[None].float() / 255
    for profile in (grey_profile(1.0), ADOBE, b"x" * 300):
        assert torch.equal(load_mask(saved(tmp_path / "m.png", Image.fromarray(values), icc_profile=profile)), expected)
    assert torch.equal(load_mask(with_chunks(tmp_path / "m.png", Image.fromarray(values), gAMA=gamma(1.0))), expected)


def test_what_is_written_has_no_profile(tmp_path: Path) -> None:
    save_image(load_image(saved(tmp_path / "a.png", Image.fromarray(noise()), icc_profile=P3)), tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as picture:
        assert not {"icc_profile", "gamma", "srgb"} & set(picture.info)


def test_the_profiles_made_here_are_valid() -> None:
    for profile in (ADOBE, P3, matrix_profile(SRGB, None)):
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        assert opened.xcolor_space == "RGB " and opened.device_class == "mntr" and len(profile) % 4 == 0


@pytest.mark.parametrize(("primaries", "curve", "said"), [(9, 16, "of high dynamic range"), (12, 8, "of high dynamic")])
def test_heif_of_high_dynamic_range_is_refused(tmp_path: Path, primaries: int, curve: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_image(heif(tmp_path, primaries, curve))


def test_heif_without_a_profile_has_its_own_primaries(tmp_path: Path) -> None:
    expected = load_image(saved(tmp_path / "a.png", Image.new("RGB", (64, 64), (60, 160, 60)), icc_profile=P3))[:, 0, 0]
    assert (load_image(heif(tmp_path, 12, 13))[:, 30, 30] - expected).abs().max() <= 4 / 255
    plain = load_image(heif(tmp_path, 1, 13))[:, 30, 30] * 255
    assert plain.tolist() == pytest.approx([60, 160, 60], abs=4)


def heif(folder: Path, primaries: int, curve: int) -> Path:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = pillow_heif.from_pillow(Image.new("RGB", (64, 64), (60, 160, 60)))
    settings = {"color_primaries": primaries, "transfer_characteristics": curve, "matrix_coefficients": 6}
    file.save(folder / "a.heic", quality=-1, save_nclx_profile=True, full_range_flag=1, **settings)
    return folder / "a.heic"
