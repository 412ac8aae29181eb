"""Pipelines from a local folder or a hub id, checked before hours are spent."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.errors import HFValidationError as InvalidId
from safetensors import SafetensorError

from customized_grpo.errors import UserError, first_line
from customized_grpo.io.connection import check_hub
from customized_grpo.io.hub import DAMAGED, check_shards, forbid_pickles, from_hub
from customized_grpo.policies.pipelines.spec import PipelineSpec

INDEX = "model_index.json"


def resolve_model(model: str, family: PipelineSpec, *, weights: bool = True) -> Path:
    """Return the folder of the pipeline `model`, downloading a hub id if needed, with its `weights` or only its
    configurations.

    Raises `UserError` if there is none, if it holds another pipeline, or if a part is missing.
    """
    index = check_model(model, family)
    folder = Path(model) if Path(model).is_dir() else _download(model, weights)
    missing = [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and value[0] and not (folder / name).is_dir()
    ]
    if missing:
        raise UserError(
            f"policy.pipeline.model: {folder} lacks {', '.join(missing)}, which its {INDEX} lists; download it again"
        )
    return folder


def check_model(model: str, family: PipelineSpec) -> dict[str, Any]:
    """Read the index of `model`, a folder or a hub id; no other file of a hub id is downloaded.

    Raises `UserError` if there is none, or if it is another pipeline's.
    """
    folder = Path(model)
    if folder.is_dir():
        index = read_index(folder)
    elif folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise UserError(f"policy.pipeline.model: {model} is neither a folder nor a hub id (owner/name)")
    else:
        index = read_index(_fetch(model, lambda: Path(hf_hub_download(model, INDEX)).parent))
    if index.get("_class_name") not in family.pipeline_names:
        raise UserError(
            f"policy.pipeline.model: {model} holds a {index.get('_class_name')}, but policy.kind takes a "
            f"{' or '.join(family.pipeline_names)}; name another model or kind"
        )
    kind = index.get("transformer", [None, None])[1]
    if kind != family.transformer.__name__:
        raise UserError(
            f"policy.pipeline.model: the transformer in {model} is a {kind}, but policy.kind takes a "
            f"{family.transformer.__name__}; name another model or kind"
        )
    return index


def load_pipeline(folder: Path, family: PipelineSpec, dtype: torch.dtype) -> Any:
    """Load the pipeline in `folder` on the CPU. Raises `UserError` if a part is damaged or of another class."""
    check_shards(folder, "policy.pipeline.model")
    try:
        with forbid_pickles():
            pipe = family.pipeline.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, **family.load_components(str(folder))
            )
    except (*DAMAGED, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"policy.pipeline.model: {folder} could not be loaded: {first_line(error)}") from error
    if pipe.transformer.dtype != dtype:
        raise UserError(
            f"policy.pipeline.model: {folder} was loaded as {pipe.transformer.dtype}, not as {dtype}; update diffusers"
        )
    return pipe


def fingerprint(folder: Path) -> str:
    """Return a hash of all that encodes in the pipeline in `folder`.

    It covers the place, names, sizes and times of the files except the transformer's, and the versions of the
    libraries.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for library in (diffusers, transformers):
        digest.update(f"{library.__name__} {library.__version__}".encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).parts[0] != "transformer":
            about = path.stat()
            digest.update(f"{path.relative_to(folder)} {about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()


def _download(model: str, weights: bool) -> Path:
    if not weights:
        return _fetch(model, lambda: Path(snapshot_download(model, allow_patterns=["*.json"])))
    return _fetch(model, lambda: Path(DiffusionPipeline.download(model, use_safetensors=True)))


def _fetch(model: str, download: Callable[[], Path]) -> Path:
    """Return the result of `download` for the hub's `model`. Raises `UserError` if it fails."""
    check_hub()
    try:
        with from_hub():
            return download()
    except RemoteEntryNotFoundError as error:
        raise UserError(f"policy.pipeline.model: {model} holds no diffusers pipeline: it has no {INDEX}") from error
    except GatedRepoError as error:
        raise UserError(
            f"policy.pipeline.model: {model} is gated: accept its licence on its page, then log in with `hf auth "
            "login`, or set HF_TOKEN"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, InvalidId, OSError) as error:
        raise UserError(
            f"policy.pipeline.model: {model} is no folder here, and could not be had from the hub "
            f"({first_line(error)}). Check the name and the network, or download it and name its folder"
        ) from error


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"policy.pipeline.model: {folder} holds no diffusers pipeline: it has no {INDEX}")
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"policy.pipeline.model: {path} is damaged ({error}); download it again") from error
    return index
