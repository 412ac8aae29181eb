"""Encoded prompts and references: rows that every step of every sample shares, kept on disk between runs."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.storage import save_tensors, writing

Sizes = tuple[tuple[int, int], ...]
"""(height, width) of references, in pixels."""


@dataclass(frozen=True)
class Row:
    """One prompt with its references, encoded: tensors by name, without a batch axis, and the references' sizes."""

    tensors: Mapping[str, Tensor]
    sizes: Sizes


@dataclass(frozen=True)
class Batch:
    """Rows of equal shapes, stacked: `tensors` [b, ...] by name. `places` [b]: where they stand among the samples."""

    tensors: Mapping[str, Tensor]
    sizes: Sizes
    places: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class Conditions:
    """`rows`, one per prompt, on the CPU, and for each of B samples the `index` [B] of its row: taking copies none."""

    rows: tuple[Row, ...]
    index: Tensor

    def take(self, index: Tensor) -> "Conditions":
        """See `policies.Condition.take`."""
        return Conditions(self.rows, self.index[index])

    def groups(self) -> list[list[int]]:
        """The places of samples of equal shapes, a list for each."""
        places: dict[object, list[int]] = {}
        for place, source in enumerate(self.index.tolist()):
            row = self.rows[source]
            shapes = tuple((name, tensor.shape) for name, tensor in row.tensors.items())
            places.setdefault((row.sizes, shapes), []).append(place)
        return list(places.values())

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """The samples in batches of equal shapes, on `device`.

        References of other sizes and prompts of other lengths make other token sequences; they go through the
        generator apart, so that nothing is padded and nothing masked.
        """
        sources = self.index.tolist()
        moved = {source: self._moved(source, device) for source in dict.fromkeys(sources)}
        for batch in self.groups():
            rows = [moved[sources[place]] for place in batch]
            # Stacked even where all rows are one: matrix products of expanded tensors take another path, and round
            # otherwise.
            tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            yield Batch(tensors, self.rows[sources[batch[0]]].sizes, torch.tensor(batch))

    def _moved(self, source: int, device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.rows[source].tensors.items()}


class ConditionCache:
    """Rows on disk, one safetensors file each, named by a hash of the generator, the prompt and the references."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """`fingerprint` stands for everything else that a row depends on: model, precision, guidance."""
        self._folder, self._fingerprint = folder, fingerprint

    def path(self, prompt: str, references: Sequence[Tensor]) -> Path:
        """Where the row of `prompt` with its prepared `references` [3, h, w] lies."""
        digest = hashlib.sha256(json.dumps([self._fingerprint, prompt]).encode())
        for reference in references:
            digest.update(repr(tuple(reference.shape)).encode())
            digest.update(reference.detach().contiguous().float().numpy().tobytes())
        name = digest.hexdigest()
        return self._folder / name[:2] / f"{name}.safetensors"

    def read(self, prompt: str, references: Sequence[Tensor]) -> Row | None:
        """The row, or None where there is none yet. Raises `UserError` for a damaged file."""
        path = self.path(prompt, references)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                sizes = tuple((height, width) for height, width in json.loads(file.metadata()["sizes"]))
                return Row({name: file.get_tensor(name) for name in file.keys()}, sizes)  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: a damaged file of the condition cache ({error}); delete it") from error

    def write(self, prompt: str, references: Sequence[Tensor], row: Row) -> None:
        """Keep `row`, whole or not at all. Raises `StorageError` where the disk does not take it."""
        path = self.path(prompt, references)
        with writing(self._folder, sum(tensor.nbytes for tensor in row.tensors.values())):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(row.tensors, path, metadata={"sizes": json.dumps(row.sizes)})
