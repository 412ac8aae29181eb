"""Masks beside photographs that EXIF turns: which way round they lie."""

from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags
from torch import Tensor

from customized_grpo.data.formats import open_picture
from customized_grpo.data.images import BROKEN, MAX_PIXELS, load_mask
from customized_grpo.errors import UserError

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Header:
    """Size of the pixels as they are stored, and the EXIF orientation, None where the file has none."""

    stored: Size
    orientation: int | None

    @property
    def upright(self) -> Size:
        return self.stored[::-1] if self.orientation in (5, 6, 7, 8) else self.stored


def read_header(path: Path) -> Header:
    """Read the size and the orientation of a picture without decoding it. Raises `UserError` for damaged files."""
    try:
        with open_picture(path) as image:
            width, height = image.size
            return Header((height, width), image.getexif().get(ExifTags.Base.Orientation))
    except BROKEN as error:
        raise UserError(f"{path}: broken or truncated image ({error}); replace the file") from error


def load_mask_of(picture: Path, mask: Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Load the mask [1, H, W] of the picture at `picture`, upright as that; it may be of another resolution.

    Raises `UserError` as `load_mask` and `orientation_of_mask`.
    """
    pixels = load_mask(mask, max_pixels)
    return turned(pixels, orientation_of_mask(picture, mask))


def orientation_of_mask(picture: Path, mask: Path) -> int:
    """Return the EXIF orientation that turns a mask, as `load_mask` reads it, as its upright picture lies.

    A mask with an orientation of its own is upright by that. One without, beside a picture that is turned, was drawn on
    the upright picture or on its stored pixels, and its shape tells which. Raises `UserError` for a shape that is
    neither, and for one that is both: of a square, or of a picture that is mirrored or upside down.
    """
    of_picture, of_mask = read_header(picture), read_header(mask)
    fits = _fitting(of_picture, of_mask)
    if not fits:
        raise UserError(
            f"{mask}: the mask is {_told(of_mask.upright)} but its picture {picture} is {_told(of_picture.upright)}; "
            "expected a mask of its shape"
        )
    if len(fits) > 1:
        raise UserError(_both(picture, of_picture, mask))
    return fits[0]


def misfit(picture: Path, mask: Path) -> str | None:
    """Say why a mask in a data folder is not of the size of its upright picture, or may be drawn on its stored pixels.

    Raises `UserError` for damaged files.
    """
    of_picture, of_mask = read_header(picture), read_header(mask)
    if of_mask.upright == of_picture.upright:
        return _both(picture, of_picture, mask) if len(_fitting(of_picture, of_mask)) > 1 else None
    different = f"the mask is {_told(of_mask.upright)} but its reference {picture.name} is {_told(of_picture.upright)}"
    if of_mask.orientation is None and of_mask.stored == of_picture.stored:
        return f"{mask}: {different} as EXIF turns it; turn the mask as well, or let `customized-grpo prepare` do it"
    return f"{mask}: {different}; expected the same size"


def _fitting(of_picture: Header, of_mask: Header) -> list[int]:
    """Return the orientations that bring the mask to the shape of the upright picture."""
    shape, orientation = of_mask.upright, of_picture.orientation
    if of_mask.orientation is not None or orientation is None or not 2 <= orientation <= 8:
        return [1] if _alike(shape, of_picture.upright) else []
    sizes = {1: of_picture.upright, orientation: of_picture.stored}
    exact = [turn for turn, size in sizes.items() if shape == size]
    return exact or [turn for turn, size in sizes.items() if _alike(shape, size)]


def _both(picture: Path, of_picture: Header, mask: Path) -> str:
    return (
        f"{mask}: the mask fits its picture {picture}, which EXIF turns (orientation {of_picture.orientation}), both "
        "as stored and as shown; save the picture upright, without an orientation, and a mask that fits it"
    )


def turned(image: Tensor, orientation: int) -> Tensor:
    """Turn [C, H, W] by an EXIF orientation, 1 to 8, so that it is upright."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(-1, -2)
    flips = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}
    return image.flip(flips.get(orientation, ())).contiguous()


def _alike(one: Size, other: Size) -> bool:
    """Tell whether one size is the other at some scale, but for less than a pixel a side."""
    (height, width), (other_height, other_width) = one, other
    smallest = max((height - 1) / other_height, (width - 1) / other_width)
    return smallest < min((height + 1) / other_height, (width + 1) / other_width)


def _told(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
