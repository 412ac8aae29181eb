"""Kinds of picture files: those that are read, and what to do with the others."""

from pathlib import Path

from PIL import Image, TiffImagePlugin, UnidentifiedImageError, features

from customized_grpo.errors import UserError

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Pillow's names of what it opens here. HEIF is opened by pillow-heif, where that is installed."""
_HEIF, _AVIF = (".heic", ".heif", ".hif"), (".avif",)
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(*_AVIF, *_HEIF),
)
"""Of the names of files that are read."""
_RAW = (
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".rwl", ".pef"),
    *(".srw", ".x3f", ".3fr", ".iiq", ".raw"),
)
_OTHERS = (
    *(".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".psd", ".psb", ".xcf", ".svg", ".svgz", ".eps", ".pdf", ".exr", ".hdr"),
    *(".tga", ".ppm", ".pgm", ".pnm", ".ico", ".dds"),
)
_REDUCED, _SAMPLE_FORMAT, _DNG_VERSION = 254, 339, 50706
_SIGNED = 2
_SIGNATURES = {
    b"\x00\x00\x00\x0cJXL ": ".jxl", b"\xff\x0a": ".jxl", b"\x00\x00\x00\x0cjP  ": ".jp2", b"\xff\x4f\xff\x51": ".j2k",
}  # fmt: skip
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_picture(path: Path) -> bool:
    """Tell whether the name of a file is the name of a picture that is read."""
    return path.suffix.lower() in SUFFIXES and remedy(path.suffix) is None


def remedy(suffix: str) -> str | None:
    """Say what to do with pictures of a kind that is not read; None where it is read, or no picture."""
    suffix = suffix.lower()
    if suffix in _HEIF and not _reads_heif():
        return "HEIC pictures are read with pip install 'customized-grpo[heif]'; or save it as JPEG or PNG"
    if suffix in _AVIF and not features.check("avif"):
        return "this Pillow reads no AVIF; install one that does (pip install --upgrade pillow), or save it as PNG"
    if suffix in _RAW:
        return "raw files of cameras are not read; export it as JPEG, PNG or TIFF"
    if suffix in _OTHERS:
        return f"{suffix[1:].upper()} files are not read; save it as PNG or JPEG"
    return None


def open_picture(path: Path) -> Image.Image:
    """Open the picture at `path`, by what is in it rather than by its name; its pixels are not decoded yet.

    Raises `UserError` for a kind that is not read, with the remedy, and what Pillow raises for damaged files.
    """
    with path.open("rb") as file:
        head = file.read(64)
    kind = _kind(head)
    if kind is not None and (text := remedy(kind)):
        raise UserError(f"{path}: {text}")
    if kind in _HEIF:
        from pillow_heif import HeifImageFile

        return HeifImageFile(path)
    try:
        image = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: {_unidentified(path, head)}") from error
    if isinstance(image, TiffImagePlugin.TiffImageFile) and (problem := _problem_of_tiff(image, path)):
        image.close()
        raise UserError(f"{path}: {problem}")
    return image


def _reads_heif() -> bool:
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        return False
    return True


def _kind(head: bytes) -> str | None:
    """Return the suffix of the format that the first bytes of a file show; None for formats that are left to Pillow."""
    if head[4:8] == b"ftyp":
        size = int.from_bytes(head[:4], "big")
        brands = {head[place : place + 4] for place in (8, *range(16, min(size, len(head)), 4))}
        if brands & {b"avif", b"avis"}:
            return ".avif"
        if brands & {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}:
            return ".heic"
        return ".cr3" if b"crx " in brands else None
    return next((suffix for signature, suffix in _SIGNATURES.items() if head.startswith(signature)), None)


def _unidentified(path: Path, head: bytes) -> str:
    if head.startswith(_TIFF) and path.suffix.lower() not in _RAW:
        return "a TIFF of a kind that is not read, such as one of floating-point numbers; save it with 8 bits as RGB"
    return remedy(path.suffix) or f"not an image of a known format ({', '.join(FORMATS)}, HEIF)"


def _problem_of_tiff(image: TiffImagePlugin.TiffImageFile, path: Path) -> str | None:
    """Return why a TIFF cannot be read: raw files are TIFFs too, whose first image is a thumbnail."""
    tags = image.tag_v2
    if path.suffix.lower() in _RAW or _DNG_VERSION in tags or tags.get(_REDUCED, 0) & 1:
        return remedy(_RAW[0])
    formats = tags.get(_SAMPLE_FORMAT, ())
    if image.mode not in ("I", "F") and _SIGNED in (formats if isinstance(formats, tuple) else (formats,)):
        return "its numbers have a sign, and no known range; save it with 8 bits as RGB or greyscale"
    return None
