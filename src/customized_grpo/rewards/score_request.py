"""Reads a request for scores, bounded in memory: its pictures are counted by their headers before any is decoded."""

import base64
import io
import json
import math
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from customized_grpo.data.images import BROKEN, MAX_PIXELS
from customized_grpo.errors import first_line
from customized_grpo.types import PromptBatch

HEADER = struct.Struct(">8s4x4sII")
"""How a PNG begins: signature, length of its first chunk, name of that chunk, width and height."""
PNG = (b"\x89PNG\r\n\x1a\n", b"IHDR")
MAX_ASPECT = 32
"""Longer side by shorter side: encoders resize the shorter side to a fixed size, so the longer one grows with this."""
MAX_PROMPT = 2**16
"""Characters of a prompt: tokenizers read all of it, and take many times its memory."""
MAX_REFERENCES = 64
"""References and masks for each image that a server takes at once: a picture of one pixel takes memory as well."""
MAX_VALUES = 2**20
"""Commas and opening brackets of a request. They bound its values: an empty list of 3 bytes takes 64 once parsed."""
DECODING_THREADS = min(8, os.cpu_count() or 1)
"""Threads that decode PNGs; zlib releases the interpreter's lock."""

_Rows = list[list[str]]
"""Base64 of PNGs by group."""


class Refused(Exception):
    """A request that is answered with a status and a reason."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """The most that one request may hold."""

    max_images: int
    """Images to score."""
    max_pixels: int
    """Pixels of all pictures together: images, references and masks."""
    max_bytes: int
    """Bytes of the body."""


def read_request(body: bytearray, limits: Limits) -> tuple[Tensor, PromptBatch]:
    """Return the images [P, G, 3, H, W] in [0, 1] and the task of a request, whose `body` is emptied.

    Raises `Refused` for a body that is no request for scores, or holds more than `limits`.
    """
    try:
        prompts, images, references, masks = _parsed(body)
        width, height = _check_pictures(images, [*references, *(masks or ())], limits)
        decoded = torch.empty(len(images), len(images[0]), 3, height, width)
        places = list(zip(decoded.flatten(0, 1), chain.from_iterable(images), strict=True))
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            # Each goes to its place at once: stacked afterwards, the images would be in memory twice.
            list(pool.map(lambda pair: pair[0].copy_(_decoded(pair[1], "RGB")).div_(255), places))
            batch = PromptBatch(
                prompts,
                _decoded_rows(references, "RGB", pool),
                None if masks is None else _decoded_rows(masks, "L", pool),
            )
    except (*BROKEN, RecursionError, Image.DecompressionBombError) as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"not a request for scores: {first_line(error)[:200]}") from error
    return decoded, batch


def _parsed(body: bytearray) -> tuple[list[str], _Rows, _Rows, _Rows | None]:
    """Return prompts [P], images [P][G], references [P][K] and masks [P][K] or None."""
    if sum(body.count(mark) for mark in b",[{") > MAX_VALUES:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_VALUES} values are not taken at once")
    text = body.decode()
    body.clear()
    request = json.loads(text)
    if not isinstance(request, dict):
        raise ValueError("expected an object with prompts, images, references and masks")
    prompts, masks = request["prompts"], request.get("masks")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts are strings")
    if max(map(len, prompts), default=0) > MAX_PROMPT:
        raise ValueError(f"a prompt has at most {MAX_PROMPT} characters")
    images, references = _rows(request["images"], "images"), _rows(request["references"], "references")
    masks = None if masks is None else _rows(masks, "masks")
    if not len(prompts) == len(images) == len(references) == len(references if masks is None else masks):
        raise ValueError("prompts, images, references and masks differ in number")
    return prompts, images, references, masks


def _rows(found: Any, name: str) -> _Rows:
    if not isinstance(found, list) or not all(isinstance(row, list) for row in found):
        raise ValueError(f"{name}: expected a list of pictures for each prompt")
    if not all(isinstance(text, str) for row in found for text in row):
        raise ValueError(f"{name}: expected the base64 of PNGs")
    return found


def _check_pictures(images: _Rows, others: _Rows, limits: Limits) -> tuple[int, int]:
    """Return width and height of the images. Raises `Refused`, or ValueError, before anything is decoded."""
    count, other_count = sum(map(len, images)), sum(map(len, others))
    for found, most, name in (
        (count, limits.max_images, "images"),
        (other_count, MAX_REFERENCES * limits.max_images, "references and masks"),
    ):
        if found > most:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{found} {name}, and {most} are taken at once")
    sizes = [_size(text) for row in images for text in row]
    if len(set(sizes)) != 1 or len(set(map(len, images))) != 1:
        raise ValueError("expected images, all of one size, and groups of one size")
    pixels = sum(width * height for width, height in chain(sizes, (_size(text) for row in others for text in row)))
    if pixels > limits.max_pixels:
        raise Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"{pixels} pixels in images, references and masks, and {limits.max_pixels} are taken at once",
        )
    return sizes[0]


def _size(text: str) -> tuple[int, int]:
    """Return the width and height of a PNG, from its header."""
    start = base64.b64decode(text[: 4 * math.ceil(HEADER.size / 3)], validate=True)
    if len(start) < HEADER.size or HEADER.unpack_from(start)[:2] != PNG:
        raise ValueError("pictures are PNGs")
    width, height = HEADER.unpack_from(start)[2:]
    if width * height > MAX_PIXELS:
        raise ValueError(f"a picture of {width}x{height}, more than {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"a picture of {width}x{height}; a side is at most {MAX_ASPECT} times the other")
    return width, height


def _decoded(text: str, mode: str) -> Tensor:
    """Return a PNG in Pillow's `mode` as uint8 [C, H, W]."""
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
        if image.size != _size(text):
            raise ValueError("a picture has two headers")
        pixels = torch.from_numpy(np.array(image.convert(mode)))
    return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def _decoded_rows(rows: _Rows, mode: str, pool: ThreadPoolExecutor) -> list[list[Tensor]]:
    """Return pictures as [C, H, W] in [0, 1]."""
    decoded = pool.map(lambda text: _decoded(text, mode).float().div_(255), chain.from_iterable(rows))
    return [[next(decoded) for _ in row] for row in rows]
