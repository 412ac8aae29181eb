"""Convert the colors of a picture from its profile to sRGB, in which all pictures are seen.

A picture without a profile is taken for sRGB. ICC profiles are converted by relative colorimetric intent with black-
point compensation, which leaves the values of sRGB profiles unchanged: measured, none differs by more than a level of
255.
"""

import io
import struct
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, ImageCms

ToRgb = Callable[[Image.Image], Image.Image]
"""A picture without transparency, in the mode in which it is stored or in RGB -> RGB, in sRGB."""
Chromaticities = tuple[float, float, float, float, float, float, float, float]
"""x and y of white, red, green and blue."""

SRGB: Chromaticities = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
ADOBE_RGB: Chromaticities = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
DISPLAY_P3: Chromaticities = (0.3127, 0.3290, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
ADOBE_GAMMA = 563 / 256
_GREY = ("1", "L", "LA", "I;16", "I;16L", "I;16B", "I;16N")
_PRIMARIES = {1: None, 2: None, 12: DISPLAY_P3}
"""Of HEIF files (ITU-T H.273): BT.709, unknown, Display P3."""
_CURVES = (1, 2, 6, 13)
"""BT.709, unknown, BT.601 and sRGB; the others are of high dynamic range, linear, or rare."""
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_srgb(image: Image.Image) -> ToRgb | None:
    """Return what converts the colours of `image` to sRGB; None where they are sRGB, or it does not tell.

    Raises ValueError, with what is wrong, for a profile that is damaged or of another kind of pixels.
    """
    profile = _profile_of(image)
    if profile is None:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        stored = "GRAY" if image.mode in _GREY else "CMYK" if image.mode == "CMYK" else "RGB"
        # A grey picture with a profile of RGB is the greys of that.
        if space != stored and (stored, space) != ("GRAY", "RGB"):
            raise ValueError(f"its colour profile is one of {space}, and its pixels are {stored}")
        mode = {"GRAY": "L", "CMYK": "CMYK", "RGB": "RGB"}[space]
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB",
            # For greys the optimization interpolates, and is 10 levels off in the darks of a linear profile.
            ImageCms.Intent.RELATIVE_COLORIMETRIC, flags | ImageCms.Flags.NOOPTIMIZE if mode == "L" else flags,
        )  # fmt: skip
    except (OSError, ImageCms.PyCMSError) as error:
        raise ValueError(f"its colour profile is damaged ({error})") from error

    def convert(picture: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(picture if picture.mode == mode else picture.convert(mode), transform)
        assert converted is not None  # it is None in place alone
        return converted

    if mode != "L":
        return convert
    levels = np.asarray(convert(Image.fromarray(np.arange(256, dtype=np.uint8)[None])))[0]
    return lambda picture: Image.fromarray(levels[np.asarray(picture.convert("L"))])


def matrix_profile(chromaticities: Chromaticities, gamma: float | None) -> bytes:
    """Return an ICC profile of RGB with these primaries and the curve value ** gamma; None is the curve of sRGB.

    ICC.1:2010, with the white adapted to D50 by Bradford's matrix (its annex E).
    """
    white, *primaries = (np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in np.reshape(chromaticities, (4, 2)))
    colours = np.stack(primaries, axis=1)
    colours = colours * np.linalg.solve(colours, white)
    scale = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white))
    colours = np.linalg.inv(_BRADFORD) @ scale @ _BRADFORD @ colours

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))

    if gamma is None:
        numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        curve = b"para\0\0\0\0" + struct.pack(">HH5i", 3, 0, *(round(number * 65536) for number in numbers))
    else:
        curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    tags = {b"wtpt": xyz(_D50)}
    tags |= {name: xyz(colours[:, place]) for place, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    offset = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content
    head = struct.pack(">I4xI4s4s4s12x4s", offset + len(data), 0x04200000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061) + bytes(48) + table + data


def _profile_of(image: Image.Image) -> bytes | None:
    """Return the ICC profile of a picture, or a profile equal to the color space that its metadata name; None for
    sRGB."""
    if "icc_profile" in image.info:
        if not image.info["icc_profile"]:
            raise ValueError("its colour profile is damaged (a part of it is missing)")
        profile: bytes = image.info["icc_profile"]
        return profile
    if "nclx_profile" in image.info:
        return _of_heif(image.info["nclx_profile"])
    # Cameras that photograph in Adobe RGB without a profile: the "optional" colour space of DCF 2.0.
    if _interoperability(image.info.get("exif", b"")) == "R03":
        return matrix_profile(ADOBE_RGB, ADOBE_GAMMA)
    if "srgb" not in image.info and ("gamma" in image.info or "chromaticity" in image.info):
        return _of_png(image.info.get("gamma", 1 / 2.2), image.info.get("chromaticity", SRGB))
    return None


def _interoperability(exif: bytes) -> str | None:
    """Return the index of the interoperability rules that EXIF data name."""
    found = Image.Exif()
    try:
        found.load(exif)
    except SyntaxError:  # damaged data tell nothing
        return None
    if ExifTags.IFD.Interop not in found.get_ifd(ExifTags.IFD.Exif):  # Pillow before 13 fails where there is none
        return None
    return found.get_ifd(ExifTags.IFD.Interop).get(1)


def _of_png(gamma: float, chromaticities: Chromaticities) -> bytes | None:
    """Return the profile that the chunks gAMA and cHRM describe; near those of sRGB they mean sRGB (PNG
    specification, 3rd edition, 13.13)."""
    if not 0.1 <= gamma <= 10 or not all(0 < y < 1 for y in chromaticities[1::2]):
        raise ValueError(f"its gamma {gamma} and chromaticities {chromaticities} are damaged")
    near = abs(gamma * 2.2 - 1) < 0.05
    if near and np.allclose(chromaticities, SRGB, rtol=0, atol=0.01):
        return None
    return matrix_profile(chromaticities, None if near else 1 / gamma)


def _of_heif(numbers: dict[str, int]) -> bytes | None:
    primaries, curve = int(numbers["color_primaries"]), int(numbers["transfer_characteristics"])
    if primaries not in _PRIMARIES or curve not in _CURVES:
        raise ValueError(
            f"its colours have primaries {primaries} and transfer {curve} (ITU-T H.273), as of high dynamic range"
        )
    chromaticities = _PRIMARIES[primaries]
    return None if chromaticities is None else matrix_profile(chromaticities, None)
