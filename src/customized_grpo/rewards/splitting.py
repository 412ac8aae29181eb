"""Splits the images of groups into requests that a reward server takes.

Every image is scored by itself, with its group's prompt and references, so neither the other groups of a request nor
the other images of its group change its score.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RequestSize:
    """What a request holds, or the most that it may hold."""

    images: float = 0
    """Images to score; references and masks are not among them."""
    pixels: float = 0
    """Height times width, summed over all pictures: images, references and masks."""
    bytes: float = 0
    """Bytes of the body."""

    def __add__(self, other: "RequestSize") -> "RequestSize":
        return RequestSize(self.images + other.images, self.pixels + other.pixels, self.bytes + other.bytes)

    def fits(self, limit: "RequestSize") -> bool:
        """Return whether a request of this size is within `limit`."""
        return self.images <= limit.images and self.pixels <= limit.pixels and self.bytes <= limit.bytes


UNLIMITED = math.inf
"""The limit of a server that names none."""
Part = tuple[range, range]
"""Groups and, within each of them, images: the content of one request."""


def split(shared: Sequence[RequestSize], images: Sequence[Sequence[RequestSize]], limit: RequestSize) -> Iterator[Part]:
    """Yield consecutive parts of P groups of G images, each within `limit` and as large as it can be.

    `shared` [P]: size of a group's prompt, references and masks, which each of its requests repeats. `images` [P][G]:
    size of each image. A group above the limit is split alone. A single image above the limit gets its own part.
    """
    start, held = 0, RequestSize()
    for p, sizes in enumerate(images):
        group = sum(sizes, shared[p])
        if start < p and not (held + group).fits(limit):
            yield range(start, p), range(len(sizes))
            start, held = p, RequestSize()
        if not group.fits(limit):
            for columns in _split_group(shared[p], sizes, limit):
                yield range(p, p + 1), columns
            start = p + 1
        else:
            held += group
    if start < len(images):
        yield range(start, len(images)), range(len(images[start]))


def _split_group(shared: RequestSize, sizes: Sequence[RequestSize], limit: RequestSize) -> Iterator[range]:
    start, held = 0, shared
    for g, size in enumerate(sizes):
        if start < g and not (held + size).fits(limit):
            yield range(start, g)
            start, held = g, shared
        held += size
    yield range(start, len(sizes))
