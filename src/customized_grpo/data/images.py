"""Image files to tensors and back. An image is float32 [C, H, W] in [0, 1], upright, RGB or a mask."""

import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor

from customized_grpo.data.color_profiles import ToRgb, to_srgb
from customized_grpo.data.formats import open_picture
from customized_grpo.data.resampling import resample, to_levels
from customized_grpo.errors import UserError
from customized_grpo.io.files import replacing

MAX_PIXELS = 50_000_000
CACHE_BYTES = 512 * 2**20

ImageLoader = Callable[[Path, int], Tensor]

_MODES_8BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_MODES_16BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_WITHOUT_RANGE = {"F": " (floating-point numbers, of no fixed range)", "I": " (whole numbers, of no fixed range)"}
# What Pillow's decoders let through on damaged files.
BROKEN = (
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read the picture at `path`: [3, H, W] in sRGB, EXIF orientation applied, transparency composited on white.

    Colours are converted by the picture's profile; without one they are taken for sRGB. Of an animation the first
    frame. Raises UserError, naming the file, when it is missing, of a format that is not read, broken or truncated, has
    a damaged colour profile, or more than `max_pixels` (by its header, before anything is decoded).
    """
    path = Path(path)
    image = _decode(path, max_pixels)
    convert = _conversion(path, image)
    if image.mode in _MODES_16BIT:
        return _grey_16bit(image, convert)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        color, alpha = _rgb(rgba, convert), _pixels(rgba.getchannel("A"))
        return (color * alpha + (1 - alpha)).clamp(0, 1)
    return _rgb(image, convert)


def load_mask(path: str | Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read the mask at `path`: [1, H, W], 1 on the subject (white, opaque) and 0 elsewhere (black or transparent).

    Its values are no colours: a colour profile changes nothing. Raises UserError as `load_image` does, and when no
    pixel is brighter than 0.5: most often a mask of 0s and 1s where white is 255.
    """
    image = _decode(Path(path), max_pixels)
    if image.mode in _MODES_16BIT:
        mask = _pixels_16bit(image)
    elif image.has_transparency_data:
        mask = _pixels(image.convert("L")) * _pixels(image.convert("RGBA").getchannel("A"))
    else:
        mask = _pixels(image.convert("L"))
    brightest = float(mask.max())
    if brightest <= 0.5:
        raise UserError(
            f"{path}: the mask is empty: its brightest value is {brightest:.3f} of 1; "
            "draw the subject white (255) on black (0)"
        )
    return mask


def inspect_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (height, width) of the upright picture at `path`, decoded as a whole. Raises UserError as `load_image`."""
    path = Path(path)
    image = _decode(path, max_pixels)
    _conversion(path, image)
    width, height = image.size
    return height, width


def image_size(path: str | Path) -> tuple[int, int]:
    """Return (height, width) of the upright picture at `path`, by its header alone.

    Raises `UserError` where the file is no picture that is read.
    """
    try:
        with open_picture(Path(path)) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except BROKEN as error:
        raise UserError(f"{path}: not a picture that can be read ({error})") from error
    return (width, height) if turned else (height, width)


def resize_square(image: Tensor, size: int) -> Tensor:
    """Crop [C, H, W] to the square at its center and resize it (bilinear, antialiased) to [C, size, size].

    An image that is already size x size is returned unchanged. Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side]
    if side == size:
        return square
    return F.interpolate(square[None], (size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)


def resize(image: Tensor, size: tuple[int, int], kernel: str = "bicubic") -> Tensor:
    """Resize [C, H, W] until it covers (height, width) `size`, and crop its centre to that.

    Resized as Pillow does, on 8-bit levels. `kernel`: one of `resampling.SUPPORT`. An image of that size is returned
    unchanged.
    """
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image
    if size[0] * width >= size[1] * height:
        covering = (size[0], size[0] * width // height)
    else:
        covering = (size[1] * height // width, size[1])
    top, left = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    levels = resample(to_levels(image), covering, kernel)
    return levels[:, top : top + size[0], left : left + size[1]].float() / 255


def within(image: Tensor, side: int) -> Tensor:
    """Scale [C, H, W] down to at most `side` pixels on its longer side; a smaller image is returned unchanged."""
    height, width = image.shape[-2:]
    longer = max(height, width)
    if longer <= side:
        return image
    return resize(image, (max(1, round(height * side / longer)), max(1, round(width * side / longer))))


def fit(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale [C, H, W] to fit inside (height, width) `size`, centered on white."""
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image
    scale = min(size[0] / height, size[1] / width)
    inner = (max(1, round(height * scale)), max(1, round(width * scale)))
    scaled = F.interpolate(image[None], inner, mode="bilinear", antialias=True)[0].clamp(0, 1)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    fitted = image.new_ones(image.shape[0], *size)
    fitted[:, top : top + inner[0], left : left + inner[1]] = scaled
    return fitted


Prepare = Callable[[Tensor, int], Tensor]
"""Brings a picture [C, H, W] that is one of so many references into the size in which it is seen."""


class PictureCache:
    """Pictures loaded and prepared; the least recently used go beyond `max_bytes` in all."""

    def __init__(self, max_pixels: int = MAX_PIXELS, max_bytes: int = CACHE_BYTES) -> None:
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._bytes = 0
        self._pictures: OrderedDict[tuple[ImageLoader, Path, Prepare, int], Tensor] = OrderedDict()

    def get(self, load: ImageLoader, path: Path, prepare: Prepare, count: int) -> Tensor:
        """Return `prepare(load(path, max_pixels), count)`. The tensor is shared: do not write into it."""
        key = (load, path, prepare, count)
        if key in self._pictures:
            self._pictures.move_to_end(key)
            return self._pictures[key]
        picture = prepare(load(path, self._max_pixels), count).clone()
        self._pictures[key] = picture
        self._bytes += picture.nbytes
        while self._bytes > self._max_bytes and len(self._pictures) > 1:
            _, oldest = self._pictures.popitem(last=False)
            self._bytes -= oldest.nbytes
        return picture


def to_pil(image: Tensor) -> Image.Image:
    """Return [3, H, W] or [1, H, W] in [0, 1] as an 8-bit picture, values clamped and rounded."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])


def save_image(image: Tensor, path: str | Path) -> None:
    """Write [3, H, W] or [1, H, W] in [0, 1] as an 8-bit PNG, values clamped and rounded, making its folder.

    The file is whole or not there. Raises UserError when the name does not end in .png, StorageError where the disk
    does not take it, ValueError for other shapes and non-finite values.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: images are written as PNG; give a name that ends in .png")
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected an image [3, H, W] or [1, H, W], got {list(image.shape)}")
    if not torch.isfinite(image).all():
        raise ValueError(f"{path}: the image has values that are not finite")
    with replacing(path) as unfinished:
        to_pil(image).save(unfinished, format="PNG")


def image_grid(images: Tensor, columns: int, scale: int = 1, padding: int = 0, background: float = 1.0) -> Tensor:
    """Tile [N, C, H, W], row by row, into one picture [C, H', W'].

    Each pixel is drawn `scale` times larger (nearest neighbour). `padding` is the gap around and between
    tiles, in pixels of the result; it and the places left over in the last row have the level `background`.
    Raises ValueError for no images, and for columns or scale below 1.
    """
    if images.ndim != 4 or len(images) == 0 or columns < 1 or scale < 1 or padding < 0:
        raise ValueError(
            f"expected images [N >= 1, C, H, W], columns >= 1, scale >= 1, padding >= 0; "
            f"got {list(images.shape)}, {columns}, {scale}, {padding}"
        )
    tiles = images.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    count, channels, height, width = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    step_y, step_x = height + padding, width + padding
    grid = tiles.new_full((channels, rows * step_y + padding, columns * step_x + padding), background)
    for index, tile in enumerate(tiles):
        top, left = padding + index // columns * step_y, padding + index % columns * step_x
        grid[:, top : top + height, left : left + width] = tile
    return grid


def _decode(path: Path, max_pixels: int) -> Image.Image:
    """Decode the first frame completely and turn it upright."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a file' if os.path.exists(path) else 'no such image file'}")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: the image file is empty")
    try:
        with open_picture(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"{path}: {width}x{height} is {width * height:,} pixels, more than the limit of "
                    f"{max_pixels:,}; scale the image down"
                )
            image.load()
            turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            upright = image.transpose(turn) if turn is not None else image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: too large ({error}); scale the image down") from error
    except BROKEN as error:
        raise UserError(f"{path}: broken or truncated image ({error}); replace the file") from error
    if upright.mode not in _MODES_8BIT + _MODES_16BIT:
        kind = upright.mode + _WITHOUT_RANGE.get(upright.mode, "")
        raise UserError(f"{path}: cannot read pixels of mode {kind}; save it with 8 bits as RGB or greyscale")
    return upright


def _conversion(path: Path, image: Image.Image) -> ToRgb | None:
    try:
        return to_srgb(image)
    except ValueError as error:
        raise UserError(f"{path}: {error}; save the picture in sRGB, or without a profile") from error


def _rgb(image: Image.Image, convert: ToRgb | None) -> Tensor:
    """Return an 8-bit image as [3, H, W] in [0, 1], without its transparency."""
    return _pixels(image.convert("RGB") if convert is None else convert(image))


def _grey_16bit(image: Image.Image, convert: ToRgb | None) -> Tensor:
    """Return a 16-bit grayscale image as [3, H, W] in [0, 1].

    The image is converted by the 256 levels that its values lie between.
    """
    grey = _pixels_16bit(image)
    if convert is None:
        return grey.repeat(3, 1, 1)
    levels = np.asarray(convert(Image.fromarray(np.arange(256, dtype=np.uint8)[None])), dtype=np.float32)[0] / 255
    places, values = np.arange(256) / 255, grey[0].numpy()
    return torch.from_numpy(np.stack([np.interp(values, places, each).astype(np.float32) for each in levels.T]))


def _pixels(image: Image.Image) -> Tensor:
    """Return an 8-bit image as [C, H, W] in [0, 1]."""
    values = torch.from_numpy(np.array(image))
    if values.ndim == 2:
        values = values[..., None]
    return values.permute(2, 0, 1).contiguous().float() / 255


def _pixels_16bit(image: Image.Image) -> Tensor:
    """Return a 16-bit grayscale image as [1, H, W] in [0, 1]; Pillow's own conversion would clip it at 255."""
    return torch.from_numpy(np.array(image).astype(np.float32) / 65535)[None]
