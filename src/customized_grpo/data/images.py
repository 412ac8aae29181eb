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
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from customized_grpo.data.resampling import resample, to_levels
from customized_grpo.errors import UserError

MAX_PIXELS = 50_000_000
CACHE_BYTES = 512 * 2**20
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

ImageLoader = Callable[[Path, int], Tensor]

_MODES_8BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_MODES_16BIT = ("I;16", "I;16L", "I;16B", "I;16N")
# What Pillow's decoders let through on damaged files.
_BROKEN = (
    OSError,
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
    """The picture at `path`: [3, H, W], EXIF orientation applied, transparency composited on white.

    Of an animation the first frame. Raises UserError, naming the file, when it is missing, not of `FORMATS`,
    broken or truncated, or has more than `max_pixels` (by its header, before anything is decoded).
    """
    image = _decode(Path(path), max_pixels)
    if image.mode in _MODES_16BIT:
        return _pixels_16bit(image).repeat(3, 1, 1)
    if image.has_transparency_data:
        rgba = _pixels(image, "RGBA")
        color, alpha = rgba[:3], rgba[3:]
        return (color * alpha + (1 - alpha)).clamp(0, 1)
    return _pixels(image, "RGB")


def load_mask(path: str | Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The mask at `path`: [1, H, W], 1 on the subject (white, opaque) and 0 elsewhere (black or transparent).

    Raises UserError as `load_image` does, and when no pixel is brighter than 0.5: most often a mask of 0s and
    1s where white is 255.
    """
    image = _decode(Path(path), max_pixels)
    if image.mode in _MODES_16BIT:
        mask = _pixels_16bit(image)
    elif image.has_transparency_data:
        mask = _pixels(image, "L") * _pixels(image, "RGBA")[3:]
    else:
        mask = _pixels(image, "L")
    brightest = float(mask.max())
    if brightest <= 0.5:
        raise UserError(
            f"{path}: the mask is empty: its brightest value is {brightest:.3f} of 1; "
            "draw the subject white (255) on black (0)"
        )
    return mask


def inspect_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the upright picture at `path`, decoded wholly. Raises UserError as `load_image`."""
    width, height = _decode(Path(path), max_pixels).size
    return height, width


def resize_square(image: Tensor, size: int) -> Tensor:
    """[C, H, W] cropped to the square at its centre and resized (bilinear, antialiased) to [C, size, size].

    An image that is already size x size is returned as it is. Raises ValueError for a size below 1.
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

    Resized as Pillow does, on 8-bit levels. `kernel`: one of `resampling.SUPPORT`. An image of that size is returned as
    it is.
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
    """Scale [C, H, W] down to at most `side` pixels on its longer side; a smaller image is returned as it is."""
    height, width = image.shape[-2:]
    longer = max(height, width)
    if longer <= side:
        return image
    return resize(image, (max(1, round(height * side / longer)), max(1, round(width * side / longer))))


def fit(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, H, W] scaled to lie wholly within (height, width) `size`, centred on white."""
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
        """`prepare(load(path, max_pixels), count)`. The tensor is shared: do not write into it."""
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
    """[3, H, W] or [1, H, W] in [0, 1] as an 8-bit picture, values clamped and rounded."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])


def save_image(image: Tensor, path: str | Path) -> None:
    """Write [3, H, W] or [1, H, W] in [0, 1] as an 8-bit PNG, values clamped and rounded, making its folder.

    Raises UserError when the name does not end in .png, ValueError for other shapes and non-finite values.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: images are written as PNG; give a name that ends in .png")
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected an image [3, H, W] or [1, H, W], got {list(image.shape)}")
    if not torch.isfinite(image).all():
        raise ValueError(f"{path}: the image has values that are not finite")
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(image).save(path, format="PNG")


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
    """The first frame, decoded wholly and turned upright."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a file' if os.path.exists(path) else 'no such image file'}")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: the image file is empty")
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(
                    f"{path}: {width}x{height} is {width * height:,} pixels, more than the limit of "
                    f"{max_pixels:,}; scale the image down"
                )
            image.load()
            turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            upright = image.transpose(turn) if turn is not None else image
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image of a known format ({', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: too large ({error}); scale the image down") from error
    except _BROKEN as error:
        raise UserError(f"{path}: broken or truncated image ({error}); replace the file") from error
    if upright.mode not in _MODES_8BIT + _MODES_16BIT:
        raise UserError(f"{path}: cannot read pixels of mode {upright.mode}; save it as RGB or greyscale")
    return upright


def _pixels(image: Image.Image, mode: str) -> Tensor:
    """[C, H, W] in [0, 1] of an 8-bit image converted to `mode`."""
    values = torch.from_numpy(np.array(image.convert(mode)))
    if values.ndim == 2:
        values = values[..., None]
    return values.permute(2, 0, 1).contiguous().float() / 255


def _pixels_16bit(image: Image.Image) -> Tensor:
    """[1, H, W] in [0, 1] of a 16-bit greyscale image, which Pillow's own conversion would clip at 255."""
    return torch.from_numpy(np.array(image).astype(np.float32) / 65535)[None]
