"""Resumable checkpoints: trained tensors, optimiser state and the iteration, in safetensors and JSON.

A checkpoint is a folder named after its iteration. It is written under another name, flushed to disk and renamed, so
a folder of that name is complete. Nothing random is stored: every draw is a function of the seed and the iteration.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from customized_grpo.errors import UserError

TENSORS = "state.safetensors"
MANIFEST = "manifest.json"
PARAMETER, MOMENT = "parameter/", "optimizer/"


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written: torn, changed, or with a part missing."""


def save_checkpoint(
    folder: Path,
    iteration: int,
    config: dict[str, Any],
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Write `folder/<iteration>` and remove all but the newest `keep`. `config` is what must be equal on resuming."""
    target = folder / f"{iteration:06d}"
    temporary = folder / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    named = list(parameters)
    tensors: dict[str, Tensor] = {PARAMETER + name: parameter.detach() for name, parameter in named}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{MOMENT}{named[index][0]}/{key}": torch.as_tensor(value) for key, value in state.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
    manifest = {
        "iteration": iteration,
        "config": config,
        "sha256": {TENSORS: _sha256(temporary / TENSORS)},
    }
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    _flush(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit() and (path / MANIFEST).is_file())


def load_checkpoint(
    path: Path,
    config: dict[str, Any],
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Bring `parameters` and `optimizer` back to where `path` left them; returns the iterations done.

    Raises `DamagedCheckpoint` when a file is damaged, and `UserError` when `config` is not the one the checkpoint was
    made with, naming the fields.
    """
    manifest = _read_manifest(path)
    changed = sorted(key for key in {*config, *manifest["config"]} if config.get(key) != manifest["config"].get(key))
    if changed:
        fields = "; ".join(f"{key}: {manifest['config'].get(key)} -> {config.get(key)}" for key in changed)
        raise UserError(
            f"{path}: cannot resume with another configuration ({fields}). Restore it, or use a new --output"
        )
    if not (path / TENSORS).is_file() or _sha256(path / TENSORS) != manifest["sha256"][TENSORS]:
        raise DamagedCheckpoint(f"{path / TENSORS}: damaged (not what the manifest's hash is of) or missing")
    tensors = load_file(path / TENSORS)
    moments: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():
        for index, (name, parameter) in enumerate(parameters):
            parameter.copy_(tensors[PARAMETER + name])
            prefix = f"{MOMENT}{name}/"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                moments[index] = state
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    iteration: int = manifest["iteration"]
    return iteration


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST}: damaged ({error})") from error
    if not isinstance(manifest, dict) or not {"iteration", "config", "sha256"} <= manifest.keys():
        raise DamagedCheckpoint(f"{path / MANIFEST}: damaged (parts are missing)")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
