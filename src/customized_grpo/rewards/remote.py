"""A reward on another machine: the client, and the small HTTP protocol that `customized-grpo serve-reward` speaks.

`POST /score` takes `{"prompts": [P], "images": [P][G], "references": [P][K], "masks": [P][K] or null}`, every picture
as the base64 of a PNG, and answers `{"values": [P][G], "valid": [P][G]}`; a value that is not valid is null. `GET
/health` answers `{"status": "ok", "reward": NAME, "max_images": N, "max_pixels": N, "max_bytes": N}`, the most that a
request may hold; without the last two it is only limited in images. With a token, both want `Authorization: Bearer
TOKEN`.
"""

import base64
import hashlib
import io
import json
import math
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customized_grpo.data.images import to_pil, within
from customized_grpo.errors import UserError, first_line
from customized_grpo.rewards.http import Refused, Scoring, Transport, Unavailable
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.rewards.splitting import UNLIMITED, Part, RequestSize, split
from customized_grpo.types import PromptBatch, References

TOKEN = "CUSTOMIZED_GRPO_REWARD_TOKEN"
"""Environment variable of the token, on both sides."""
REFERENCE_SIDE = 1024
"""References with a longer side are scaled down to it before they are sent, to a reward or to a judge: encoders look at
a fourth of that or less, and a request stays small."""
COMPRESS_LEVEL = 1
"""Of zlib. Photographs of 1024 x 1024 take 86 ms and 1.78 MB, with Pillow's usual level 6 285 ms and 1.75 MB."""
ENCODING_THREADS = min(8, os.cpu_count() or 1)
"""Threads that encode PNGs; zlib releases the interpreter's lock."""
ENVELOPE = 128
"""Bytes of a request besides its prompts and pictures: for one group at most so many, for each further one fewer."""


class RemoteReward(Reward):
    """Asks a server for scores, with as many images at once as it takes."""

    def __init__(self, transport: Transport, *, masks: bool = False) -> None:
        """Raise `UserError` if no reward server answers. `masks`: it receives the masks of the references."""
        self._transport, self._masks = transport, masks
        self._limit = _limits(transport)

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        """See `Reward.score`: what the server could not score in time is invalid."""
        sent = batch if self._masks else batch.without_masks()
        work = _Work(_EncodedBatch.of(images, sent), self._transport.scoring())
        shared, each = work.batch.sizes()
        for group, sizes in zip(shared, each, strict=True):
            self._check(group, sizes)
        values, valid = self._ask_each(work, split(shared, each, self._limit), images.shape[:2])
        return Scores(values, valid, work.reason)

    def _check(self, group: RequestSize, images: Sequence[RequestSize]) -> None:
        """Raise `UserError` for an image that is above the server's limit by itself."""
        largest = group + max(images, key=lambda size: size.bytes)
        for name in ("pixels", "bytes"):
            wanted, limit = getattr(largest, name), getattr(self._limit, name)
            if wanted > limit:
                raise UserError(
                    f"{self._transport.field_name}: the server takes {limit:,} {name} at once, and an image with its "
                    f"references has {wanted:,}; start it with a larger --max_{name}"
                )

    def _ask_each(self, work: "_Work", parts: Iterable[Part], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return values and their validity, of the `shape` [P, G], of consecutive parts: whole groups, or pieces of
        one."""
        found = [self._ask(work, part) for part in parts]
        values, valid = (
            torch.cat([part.flatten() for part in column]).view(*shape) for column in zip(*found, strict=True)
        )
        return values, valid

    def _ask(self, work: "_Work", part: Part) -> tuple[Tensor, Tensor]:
        """Return values and their validity of one part.

        What is refused is asked again in parts, down to single images: one that cannot be scored leaves the others
        their scores.
        """
        rows, columns = part
        shape = (len(rows), len(columns))
        missing = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        if work.scoring.is_over():
            return missing
        try:
            return parsed(self._transport.post("/score", work.batch.payload(part), work.scoring), shape)
        except Refused as error:
            self._probe(work, error)
            if shape != (1, 1):
                groups = [(range(p, p + 1), columns) for p in rows]
                single = [(rows, range(g, g + 1)) for g in columns]
                return self._ask_each(work, groups if len(rows) > 1 else single, shape)
            work.reason = str(error)
        except (Unavailable, ValueError) as error:
            redacted = self._transport.redact(str(error))
            work.reason = redacted if isinstance(error, Unavailable) else f"{self._transport.field_name}: {redacted}"
        return missing

    def _probe(self, work: "_Work", refusal: Refused) -> None:
        """Find out, once a scoring, whether these images are refused or all are: ask about a grey one. Raises
        `UserError` where that is refused too."""
        if work.probed:
            return
        work.probed = True
        image = work.batch.images[0][0]
        grey = encoded(torch.full_like(image, 0.5))
        masks = None if work.batch.batch.masks is None else [[encoded(torch.ones_like(image[:1]))]]
        payload = {"prompts": ["a grey picture"], "images": [[grey]], "references": [[grey]], "masks": masks}
        try:
            self._transport.post("/score", payload, work.scoring)
        except Refused as error:
            raise UserError(f"{refusal}; a trial image, all grey, was refused too: {error}") from error
        except Unavailable:
            pass  # it is busy, which says nothing of the refusal


@dataclass(frozen=True)
class _Picture:
    """A picture as sent."""

    text: str
    pixels: int

    @classmethod
    def of(cls, picture: Tensor) -> "_Picture":
        return cls(encoded(picture), picture.shape[-2] * picture.shape[-1])

    def size(self, images: int = 0) -> RequestSize:
        # Two quotes, a comma and a space.
        return RequestSize(images, self.pixels, len(self.text) + 4)


_Rows = list[list[_Picture]]


@dataclass(frozen=True)
class _EncodedBatch:
    """Images and their task, with every picture encoded once, however many groups and requests hold it."""

    images: Tensor
    """[P, G, 3, H, W]"""
    batch: PromptBatch
    image_rows: _Rows
    """[P][G]"""
    reference_rows: _Rows
    """[P][K]"""
    mask_rows: _Rows | None
    """[P][K]"""

    @classmethod
    def of(cls, images: Tensor, batch: PromptBatch) -> "_EncodedBatch":
        with ThreadPoolExecutor(ENCODING_THREADS) as pool:
            found = pool.map(_Picture.of, images.flatten(0, 1))
            shared = _SharedPictures(pool)
            references, masks = shared.rows(batch.references), None if batch.masks is None else shared.rows(batch.masks)
            return cls(images, batch, [[next(found) for _ in group] for group in images], references, masks)

    def payload(self, part: Part) -> dict[str, Any]:
        """Return the body of the POST to /score for `part`."""
        rows, columns = part

        def texts(pictures: _Rows, columns: slice = slice(None)) -> list[list[str]]:
            return [[picture.text for picture in pictures[p][columns]] for p in rows]

        return {
            "prompts": [self.batch.prompts[p] for p in rows],
            "images": texts(self.image_rows, slice(columns.start, columns.stop)),
            "references": texts(self.reference_rows),
            "masks": None if self.mask_rows is None else texts(self.mask_rows),
        }

    def sizes(self) -> tuple[list[RequestSize], list[list[RequestSize]]]:
        """Return the sizes in a request of the parts that a group shares [P], and of its images [P][G]."""
        prompts = self.batch.prompts
        masks = self.mask_rows if self.mask_rows is not None else [[] for _ in prompts]
        shared = []
        for prompt, *rows in zip(prompts, self.reference_rows, masks, strict=True):
            # Escaped, a prompt is at least as long as in UTF-8.
            rest = RequestSize(bytes=ENVELOPE + len(json.dumps(prompt)))
            shared.append(sum((picture.size() for row in rows for picture in row), rest))
        return shared, [[image.size(images=1) for image in row] for row in self.image_rows]


@dataclass
class _Work:
    """One scoring under way: the patience that its requests share, and why some scores are missing."""

    batch: _EncodedBatch
    scoring: Scoring
    probed: bool = False
    """Whether the trial image was asked about."""
    reason: str | None = None
    """Of the last score that is missing."""


class _SharedPictures:
    """Encodes the references and masks of several groups, each picture once."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool, self._known = pool, dict[tuple[torch.Size, bytes], Future[_Picture]]()
        # Pictures may be read from files one by one: few are in memory at once.
        self._room = threading.Semaphore(2 * ENCODING_THREADS)

    def rows(self, pictures: References) -> _Rows:
        found = [[self._begun(within(picture, REFERENCE_SIDE)) for picture in row] for row in pictures]
        return [[future.result() for future in row] for row in found]

    def _begun(self, picture: Tensor) -> "Future[_Picture]":
        content = hashlib.blake2b(picture.contiguous().cpu().numpy().data, digest_size=16).digest()
        key = (picture.shape, content)
        if key not in self._known:
            self._room.acquire()
            self._known[key] = self._pool.submit(_Picture.of, picture)
            self._known[key].add_done_callback(lambda _: self._room.release())
        return self._known[key]


def encoded(image: Tensor, side: int | None = None) -> str:
    """Return a picture [C, H, W] in [0, 1] as the base64 of a PNG, scaled down to `side` pixels if it is larger."""
    image = image if side is None else within(image, side)
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", compress_level=COMPRESS_LEVEL)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def parsed(answer: Any, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Parse a server's answer as values and validity [P, G]. Raises ValueError if it is not one."""
    try:
        values = [[_number(value) for value in row] for row in answer["values"]]
        valid = torch.tensor([[_flag(value) for value in row] for row in answer["valid"]])
        found = torch.tensor(values, dtype=torch.float32)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"no scores in the answer ({type(error).__name__}: {first_line(error)})") from error
    if found.shape != shape or valid.shape != shape:
        raise ValueError(f"scores of {list(found.shape)} for {list(shape)} images")
    known = valid & found.isfinite()
    return torch.where(known, found, 0.0), known


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a value is a {type(value).__name__}, expected a number or null")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"a validity is a {type(value).__name__}, expected true or false")
    return value


def _limits(transport: Transport) -> RequestSize:
    """Return the server's limits. Raises `UserError` if its /health is not a reward server's."""
    health = transport.get("/health")
    if isinstance(health, dict) and "max_images" in health:
        # Servers of an earlier version name no pixels and no bytes.
        found = [health.get(f"max_{name}", UNLIMITED) for name in ("images", "pixels", "bytes")]
        if all(limit is UNLIMITED or (type(limit) is int and limit >= 1) for limit in found):
            return RequestSize(*found)
    told = transport.redact(repr(health))
    raise UserError(
        f"{transport.field_name}: {transport.url} is no reward server (its /health answered {told:.100}); "
        "start one with: customized-grpo serve-reward NAME"
    )
