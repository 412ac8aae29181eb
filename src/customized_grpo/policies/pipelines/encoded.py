"""Encoded prompts and references: the rows of a condition, and batches of equal shapes from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Sizes = tuple[tuple[int, int], ...]
"""(height, width) of references, in pixels."""
Inputs = tuple[str, ...]
"""What an encoded tensor depends on, beside the generator: some of PROMPT and REFERENCES, in this order."""
PROMPT, REFERENCES = "prompt", "references"


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt with its references, encoded: tensors by name, without a batch axis, and the references' sizes."""

    tensors: Mapping[str, Tensor]
    sizes: Sizes


@dataclass(frozen=True)
class UniformBatch:
    """Rows of equal shapes, stacked: `tensors` [b, ...] by name. `indices` [b]: where they stand among the samples."""

    tensors: Mapping[str, Tensor]
    sizes: Sizes
    indices: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class EncodedBatch:
    """`rows`, one per prompt, on the CPU, and for each of B samples the `index` [B] of its row: `take` copies no
    tensors."""

    rows: tuple[EncodedPrompt, ...]
    index: Tensor
    _batches: dict[torch.device, tuple[UniformBatch, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def take(self, index: Tensor) -> "EncodedBatch":
        """See `policies.Condition.take`."""
        return EncodedBatch(self.rows, self.index[index])

    def batches(self, device: torch.device) -> tuple[UniformBatch, ...]:
        """Return the samples in batches of equal shapes on `device`, moved there once.

        References of other sizes and prompts of other lengths make other token sequences; they go through the
        generator apart, so that nothing is padded and nothing masked. The batches stay on `device` as long as this
        object lives: what `take` leaves for a micro-batch serves all its steps.
        """
        if device not in self._batches:
            self._batches[device] = self._move(device)
        return self._batches[device]

    def _move(self, device: torch.device) -> tuple[UniformBatch, ...]:
        sources = self.index.tolist()
        moved: dict[int, Tensor] = {}
        for source in dict.fromkeys(sources):
            for tensor in self.rows[source].tensors.values():
                if id(tensor) not in moved:  # rows share tensors
                    moved[id(tensor)] = tensor.to(device, non_blocking=True)
        found = []
        for places in self._groups():
            rows = [
                {name: moved[id(tensor)] for name, tensor in self.rows[sources[place]].tensors.items()}
                for place in places
            ]
            # Stacked even where all rows are one: matrix products of expanded tensors take another path, and round
            # otherwise.
            tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            found.append(UniformBatch(tensors, self.rows[sources[places[0]]].sizes, torch.tensor(places)))
        return tuple(found)

    def _groups(self) -> list[list[int]]:
        """Return the places of samples of equal shapes, a list for each."""
        places: dict[object, list[int]] = {}
        for place, source in enumerate(self.index.tolist()):
            row = self.rows[source]
            shapes = tuple((name, tensor.shape) for name, tensor in row.tensors.items())
            places.setdefault((row.sizes, shapes), []).append(place)
        return list(places.values())
