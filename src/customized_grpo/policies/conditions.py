"""The cache of encoded prompts and references on disk: what is encoded is kept between runs, and its size is known
before."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.io.files import free_bytes, save_tensors, writing
from customized_grpo.policies.cache_folder import Hold, gigabytes, list_files, mark_used, surplus
from customized_grpo.policies.pipelines.encoded import PROMPT, REFERENCES, EncodedPrompt, Inputs, Sizes
from customized_grpo.policies.pipelines.resolution import sizes_of
from customized_grpo.policies.pipelines.spec import PipelineSpec


@dataclass(frozen=True)
class Planned:
    """A row that is to be encoded: its prompt, the files of its pictures, and the sizes in which these are seen."""

    prompt: str
    pictures: tuple[Path, ...]
    sizes: Sizes


class ConditionCache:
    """Rows on disk. What a row shares with others, as a negative prompt or the tokens of its references, lies in a file
    of its own, which is written and read once.

    A file is named by a hash of the generator, and of what its tensors depend on: the prompt, the references or both.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        depends_on: Mapping[str, Inputs] | None = None,
        limit: float | None = None,
    ) -> None:
        """Open the cache in `folder`.

        `fingerprint` stands for everything else that a row depends on: model, precision, guidance. `depends_on`: for
        each tensor of a row the inputs that it depends on; None puts all tensors into one file. `limit`: the most bytes
        that the folder may take.
        """
        self.folder, self._fingerprint, self._limit = folder, fingerprint, limit
        self._depends_on = depends_on
        self._alive: WeakValueDictionary[tuple[Path, str], Tensor] = WeakValueDictionary()
        self._hold: Hold | None = None

    def paths(self, prompt: str, references: Sequence[Tensor]) -> dict[Inputs, Path]:
        """Return where the parts of the row of `prompt` with its prepared `references` [3, h, w] lie, by what they
        depend on."""
        pictures = hashlib.sha256()
        for reference in references:
            pictures.update(repr(tuple(reference.shape)).encode())
            pictures.update(reference.detach().contiguous().float().numpy().tobytes())
        values = {PROMPT: prompt, REFERENCES: pictures.hexdigest()}
        found = {}
        for inputs in sorted(set((self._depends_on or {"": (PROMPT, REFERENCES)}).values())):
            told = [self._fingerprint, {name: values[name] for name in inputs}]
            name = hashlib.sha256(json.dumps(told).encode()).hexdigest()
            found[inputs] = self.folder / name[:2] / f"{name}.safetensors"
        return found

    def missing(self, prompt: str, references: Sequence[Tensor]) -> set[Inputs]:
        """Return the parts of a row that are not stored yet; stored parts count as used now."""
        paths = self.paths(prompt, references)
        there = {inputs: path for inputs, path in paths.items() if path.is_file()}
        for path in there.values():
            mark_used(path)
        return paths.keys() - there.keys()

    def read(self, prompt: str, references: Sequence[Tensor]) -> EncodedPrompt | None:
        """Return the row, or None if a part is not stored yet.

        Tensors that other rows have, too, are the same objects. Raises `UserError` for a damaged file.
        """
        paths = self.paths(prompt, references)
        if not all(path.is_file() for path in paths.values()):
            return None
        tensors: dict[str, Tensor] = {}
        for path in paths.values():
            tensors |= self._read_part(path)
        return EncodedPrompt(tensors, sizes_of(references))

    def _read_part(self, path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(path, "pt") as file:
                found = {}
                for name in file.keys():  # noqa: SIM118
                    tensor = self._alive.get((path, name))
                    found[name] = self._alive[path, name] = file.get_tensor(name) if tensor is None else tensor
                return found
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: a damaged file of the condition cache ({error}); delete it") from error

    def write(self, prompt: str, references: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Keep the `tensors` of a row, each part whole or not at all; parts that are there already stay as they are.
        Raises `StorageError` where the disk does not take them."""
        for inputs, path in self.paths(prompt, references).items():
            part = {
                name: tensor
                for name, tensor in tensors.items()
                if self._depends_on is None or self._depends_on[name] == inputs
            }
            if not path.is_file():
                with writing(self.folder, sum(tensor.nbytes for tensor in part.values())):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_tensors(part, path)

    def check(self, needed: int) -> int:
        """Return how many bytes the folder takes. Raises `UserError` where the limit, or the disk, has no room for rows
        of `needed` bytes."""
        there = sum(each.bytes for each in list_files(self.folder))
        check_room(self.folder, needed, there, free_bytes(self.folder), self._limit)
        return there

    def reserve(self, needed: int, rows: Callable[[], Iterable[tuple[str, Sequence[Tensor]]]]) -> None:
        """Hold the folder, and make room in it for `rows` (prompts with their prepared references).

        The rows take `needed` bytes, including those already stored. The least recently used files are removed first,
        never one of `rows`. Raises `UserError` as `check` does, and if another run holds files that would have to go.
        """
        there = self.check(needed)
        self._hold = self._hold or Hold(self.folder)
        if self._limit is not None and there + needed > self._limit:
            keep = {path for row in rows() for path in self.paths(*row).values()}
            if gone := surplus(list_files(self.folder), keep, self._limit - needed):
                self._hold.remove(gone)


def check_room(folder: Path, needed: int, there: int, free: int, limit: float | None) -> None:
    """Raise `UserError` if `needed` bytes exceed the `limit` of the cache in `folder`, or the room on its disk.

    The room is the `free` bytes of the disk and the `there` bytes of the cache.
    """
    if limit is not None and needed > limit:
        raise UserError(
            f"policy.pipeline.cache_limit: the prompts and references that are read take about {gigabytes(needed)} in "
            f"{folder}, more than the limit of {gigabytes(limit)}; raise it, leave it out, or plan fewer iterations"
        )
    if needed > there + free:
        raise UserError(
            f"policy.pipeline.cache: the prompts and references that are read take about {gigabytes(needed)} in "
            f"{folder}, where {gigabytes(free)} are free; name a folder on a larger disk, or plan fewer iterations"
        )


def bytes_of_rows(
    family: PipelineSpec, network: Any, dtype: torch.dtype, rows: Sequence[Planned], *, guided: bool
) -> int:
    """Estimate the bytes that `rows` take, shared parts counted once; `network` is the transformer's configuration.

    Exact except for text of varying length, which is taken to have a common length.
    """
    parts: dict[object, int] = {}
    for sizes in {row.sizes for row in rows}:
        example = family.dummy_inputs(network, sizes, guided=guided)
        counts = {name: tensor.numel() * dtype.itemsize for name, tensor in example.items()}
        for row in (row for row in rows if row.sizes == sizes):
            values: dict[str, object] = {PROMPT: row.prompt, REFERENCES: row.pictures}
            for name, count in counts.items():
                parts[name, tuple(values[each] for each in family.depends_on[name])] = count
    return sum(parts.values())
