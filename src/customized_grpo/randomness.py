"""Randomness is a function: every draw has a fresh generator, named by what the draw is for.

A draw is named by (seed, iteration, prompt index, sample index, purpose) and by nothing else, so it does not depend
on the number of ranks, workers or micro-batches, on the order of draws, or on a run having been resumed. Draws are
made on the CPU in float32 whatever the device of the policy.

torch's CPU generator keeps 32 bits of its seed, so two names share a stream with probability 2^-32: about 5e-4 that
any two of the 2,000 draws of a large iteration coincide.
"""

import hashlib
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

Key = SupportsIndex | str


def stream_seed(seed: int, *key: Key) -> int:
    """Return the 64-bit seed of the stream named `(seed, *key)`: blake2b of an encoding that no two names share.

    A key is an integer (Python's, NumPy's, or a 0-d tensor) or a string; 1 and "1" differ. Raises TypeError for any
    other key.
    """
    digest = hashlib.blake2b(b"".join(_encode(part) for part in (seed, *key)), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def generator(seed: int, *key: Key) -> torch.Generator:
    """Return a fresh CPU generator at the start of the stream `(seed, *key)`, e.g. `generator(0, 12, "steps")`."""
    return torch.Generator().manual_seed(stream_seed(seed, *key))


def batched_normal(
    seed: int,
    iteration: int,
    prompt_indices: Sequence[int],
    sample_indices: Sequence[int],
    purpose: str,
    shape: Sequence[int],
) -> Tensor:
    """Return standard normal noise [N, *shape], float32 on the CPU, for N samples.

    Row n is `torch.randn(shape, generator=generator(seed, iteration, prompt_indices[n], sample_indices[n],
    purpose))`, whatever the other rows are. Equal indices give equal rows: that is how a group shares its initial
    noise. Raises ValueError when the two index sequences differ in length.
    """
    if len(prompt_indices) != len(sample_indices):
        raise ValueError(f"{len(prompt_indices)} prompt indices but {len(sample_indices)} sample indices")
    noise = torch.empty(len(prompt_indices), *shape)
    stream = torch.Generator()
    for row, prompt, sample in zip(noise, prompt_indices, sample_indices, strict=True):
        row.normal_(generator=stream.manual_seed(stream_seed(seed, iteration, prompt, sample, purpose)))
    return noise


def _encode(part: Key) -> bytes:
    if isinstance(part, str):
        text = part.encode("utf-8")
        return b"s%d:%s" % (len(text), text)
    if isinstance(part, bool):
        raise TypeError("a key of a random stream is an integer or a string, not a bool")
    return b"i%d;" % operator.index(part)
