"""Resumable checkpoints: trained tensors, optimiser state, their average and the iteration, in safetensors and JSON.

A checkpoint is a folder named after its iteration. It is written under another name, flushed to disk and renamed, so
a folder of that name is complete. Nothing random is stored, and no position in the data, the window or the schedule:
all of them are functions of the seed and the iteration.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from customized_grpo.errors import UserError, describe_changes, first_line
from customized_grpo.io.files import file_sha256, save_tensors, writing
from customized_grpo.io.tensors import mismatch
from customized_grpo.runtime.environment import library_versions
from customized_grpo.training.ema import EMA
from customized_grpo.training.optimizer import moment_like, moments, restore_moments

TENSORS = "state.safetensors"
MANIFEST = "manifest.json"
PARAMETER, MOMENT, AVERAGE = "parameter/", "optimizer/", "average/"
PARTIAL = ".partial"
FORMAT = 3
"""Version of what is written here. A checkpoint of another one is no damage, and must not be passed over as such."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class CorruptCheckpointError(UserError):
    """A checkpoint that is not what was written: torn, changed, or with a part missing."""


class Hashes(BaseModel):
    """What the contents hash to."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    config: Sha256
    tensors: Sha256


class Format(BaseModel):
    """What even a later manifest says."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: int = Field(FORMAT, ge=1)


class Manifest(Format):
    """What is said of a checkpoint: iterations done, the settings that pin the result, library versions, hashes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    iteration: int = Field(ge=0)
    config: dict[str, Any]
    libraries: dict[str, str]
    sha256: Hashes

    def other_libraries(self) -> list[str]:
        """Return the libraries whose versions changed, as 'name found -> now'."""
        now = library_versions()
        names = sorted({*self.libraries, *now})
        pairs = [(name, self.libraries.get(name, "none"), now.get(name, "none")) for name in names]
        return [f"{name} {before} -> {after}" for name, before, after in pairs if before != after]


@dataclass(frozen=True)
class State:
    """What training changes: trained parameters by name, their optimiser, and their average where one is kept."""

    parameters: Sequence[tuple[str, nn.Parameter]]
    optimizer: torch.optim.Optimizer
    average: EMA | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state by name."""
        found: dict[str, Tensor] = {PARAMETER + name: parameter.detach() for name, parameter in self.parameters}
        for name, parameter in self.parameters:
            found |= {f"{MOMENT}{name}/{key}": value for key, value in moments(self.optimizer, parameter).items()}
        if self.average is not None:
            found |= {AVERAGE + name: tensor for name, tensor in self.average.tensors.items()}
        return found

    def mismatch(self, tensors: dict[str, Tensor]) -> str:
        """Return why `tensors` do not fit this state; empty if they do."""
        own = dict(self.parameters)
        expected: dict[str, Tensor] = {PARAMETER + name: parameter for name, parameter in own.items()}
        if self.average is not None:
            expected |= {AVERAGE + name: parameter for name, parameter in own.items()}
        if any(name.startswith(MOMENT) for name in tensors):  # there are none before the first step
            for name, parameter in own.items():
                kept = moment_like(self.optimizer, parameter)
                expected |= {f"{MOMENT}{name}/{key}": value for key, value in kept.items()}
        return _mismatch(tensors, expected)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` of another such state gave."""
        for name, parameter in self.parameters:
            parameter.copy_(tensors[PARAMETER + name])
        restore_moments(self.optimizer, [_under(f"{MOMENT}{name}/", tensors) for name, _ in self.parameters])
        for name, tensor in (self.average.tensors if self.average is not None else {}).items():
            tensor.copy_(tensors[AVERAGE + name])


def save_checkpoint(folder: Path, iteration: int, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write `folder/<iteration>`, whole or not at all. `config` is what must be equal on resuming; `tensors` are those
    of `State.tensors`.

    Raises `StorageError` where the disk does not take it; the checkpoints before it stay as they are.
    """
    target = folder / f"{iteration:06d}"
    temporary = folder / f".{target.name}{PARTIAL}"
    try:
        with writing(folder, sum(tensor.nbytes for tensor in tensors.values())):
            for left in folder.glob(f".*{PARTIAL}"):
                _clear(left)
            temporary.mkdir(parents=True)
            save_tensors(tensors, temporary / TENSORS)
            with ThreadPoolExecutor(1) as pool:  # both take seconds at full size, and neither needs the other
                flushed = pool.submit(_flush, temporary / TENSORS)
                sha256 = file_sha256(temporary / TENSORS)
                flushed.result()
            hashes = Hashes(config=_config_sha256(config), tensors=sha256)
            manifest = Manifest(iteration=iteration, config=config, libraries=library_versions(), sha256=hashes)
            (temporary / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
            for path in (temporary / MANIFEST, temporary):
                _flush(path)
            remove_checkpoint(target)
            temporary.rename(target)
            _flush(folder)
    finally:
        _clear(temporary)
    return target


def prune_checkpoints(folder: Path, newest: int, keep_last: int, keep_every: int | None) -> None:
    """Remove checkpoints but for the last `keep_last` up to iteration `newest`, which is whole, and all of every
    `keep_every`-th iteration.

    What comes after `newest` is not counted: it was passed over as damaged, and must not push out what is whole.
    """
    known = [path for path in list_checkpoints(folder) if int(path.name) <= newest]
    for path in known[:-keep_last]:
        if keep_every is None or int(path.name) % keep_every != 0:
            remove_checkpoint(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, damaged ones too, oldest first."""
    if not folder.is_dir():
        return []
    numbered = (path for path in folder.iterdir() if path.name.isascii() and path.name.isdecimal())
    return sorted((path for path in numbered if path.is_dir()), key=lambda path: int(path.name))


def load_checkpoint(path: Path, config: dict[str, Any], state: State) -> Manifest:
    """Bring `state` back to where `path` left it; returns what is said of the checkpoint.

    Raises `CorruptCheckpointError` when a file is damaged, and `UserError` when `config` is not the one the checkpoint
    was made with, naming the fields. `state` is then as it was.
    """
    manifest = read_manifest(path)
    if changed := describe_changes(manifest.config, config, {*config, *manifest.config}):
        raise UserError(
            f"{path}: cannot resume with another configuration ({changed}). Restore it, or use a new --output"
        )
    tensors = _read_tensors(path / TENSORS, manifest.sha256.tensors)
    if mismatch := state.mismatch(tensors):
        raise CorruptCheckpointError(f"{path / TENSORS}: damaged (not the tensors of this run: {mismatch})")
    state.restore(tensors)
    return manifest


def load_weights(
    path: Path, config: dict[str, Any], parameters: Iterable[tuple[str, nn.Parameter]], *, average: bool
) -> None:
    """Give trained `parameters` the values that the checkpoint `path` has for them, or for their average.

    Raises what `read_weights` does. `parameters` are then as they were.
    """
    found, own = read_weights(path, config, average=average), dict(parameters)
    if mismatch := _mismatch(found, own):
        raise CorruptCheckpointError(f"{path / TENSORS}: damaged (not the tensors of this run: {mismatch})")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])


def read_weights(path: Path, config: dict[str, Any], *, average: bool) -> dict[str, Tensor]:
    """Return the trained tensors of the checkpoint `path` by name, or their average.

    Raises `CorruptCheckpointError` if a file is damaged, and `UserError` if the checkpoint has no average, or belongs
    to another generator than the run with `config`.
    """
    manifest = read_manifest(path)
    # What a field names may lie elsewhere by now; hashes of that are for going on.
    policy = [key for key in manifest.config if key.startswith("policy.") and key in config]
    if changed := describe_changes(manifest.config, config, policy):
        raise UserError(f"{path}: of another generator than the run's ({changed}); name a checkpoint of this run")
    tensors = _read_tensors(path / TENSORS, manifest.sha256.tensors)
    kind = AVERAGE if average else PARAMETER
    found = _under(kind, tensors)
    if average and not found:
        raise UserError(f"--ema: {path} holds no averaged weights: train keeps them where ema.decay is set")
    return found


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint in the folder `path`.

    Raises `CorruptCheckpointError` if it is missing or damaged, `UserError` if a later version wrote it.
    """
    place = path / MANIFEST
    try:
        content = place.read_bytes()
        if (found := Format.model_validate_json(content).format) > FORMAT:
            raise UserError(f"{place}: of format {found}, written by a later version; this one reads {FORMAT}")
        if found < FORMAT:
            raise UserError(
                f"{place}: of format {found}, written by an earlier version; this one reads {FORMAT}. Finish the run "
                "with the version that began it, or start a new --output"
            )
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CorruptCheckpointError(f"{place}: damaged ({where}: {first['msg']})") from error
    except OSError as error:
        raise CorruptCheckpointError(f"{place}: damaged or missing ({error.strerror})") from error
    if _config_sha256(manifest.config) != manifest.sha256.config:
        raise CorruptCheckpointError(f"{place}: damaged (config is not what its hash is of)")
    named = path.name if path.name.isascii() and path.name.isdecimal() else None
    if named is not None and int(named) != manifest.iteration:
        raise CorruptCheckpointError(f"{place}: damaged (iteration is {manifest.iteration} in the folder {named})")
    return manifest


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        if file_sha256(path) != sha256:
            raise CorruptCheckpointError(f"{path}: damaged (not what the manifest's hash is of)")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptCheckpointError(f"{path}: damaged or missing ({first_line(error)})") from error


def remove_checkpoint(path: Path) -> None:
    """Remove `path` if it exists. It is renamed first, so a kill never leaves half a checkpoint."""
    if path.exists():
        rubbish = path.with_name(f".{path.name}.old{PARTIAL}")
        with writing(path.parent):
            _clear(rubbish)
            path.rename(rubbish)
            _clear(rubbish)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _clear(path: Path) -> None:
    """Remove a folder or a symlink to one, ignoring errors."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _mismatch(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return why `tensors` have not the names, shapes and types of those that are `expected`, or are not finite; empty
    where all is well."""
    if expected.keys() != tensors.keys():
        return mismatch(tensors, expected)
    for name, tensor in tensors.items():
        like = expected[name]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            return f"{name} is {_described(tensor)}, expected {_described(like)}"
        if not tensor.isfinite().all():
            return f"{name} has numbers that are not finite"
    return ""


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _config_sha256(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
