"""Pipelines from a local folder or a hub id, checked before hours are spent."""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import httpx2
import torch
from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.errors import HFValidationError as InvalidId

from customized_grpo.errors import UserError, first_line
from customized_grpo.io.connection import check_hub
from customized_grpo.io.files import downloading, is_left_behind

DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What libraries raise on files that are missing, damaged, or not what they are taken for."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""A repository: owner/name."""
SHARDS = "*.safetensors.index.json"
"""Indices of weights in several files."""


def from_hub() -> AbstractContextManager[None]:
    """Guard downloads from the hub: `StorageError` where the disk of its cache is full."""
    return downloading(Path(constants.HF_HUB_CACHE), "HF_HOME")


def check_shards(folder: Path, field: str) -> None:
    """Raise `UserError`, naming the configuration `field`, where an index of weights in `folder` names another thing
    than safetensors files beside it: libraries unpickle what is none, and follow `..`."""
    for path in sorted(each for each in folder.rglob(SHARDS) if not is_left_behind(each.name)):
        try:
            names = {str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{field}: {path} is no index of weights ({first_line(error)}); download it again"
            ) from error
        others = [name for name in sorted(names) if not name.endswith(".safetensors") or {"/", "\\"} & set(name)]
        if others:
            raise UserError(
                f"{field}: {path} names '{others[0]}', expected safetensors files beside it, which alone are read; "
                "name a model that is stored so"
            )


@contextmanager
def forbid_pickles() -> Iterator[None]:
    """Make `torch.load` raise ValueError inside this block.

    A library may turn to it because of an index on the hub or a name in a configuration; no pickle is read either way.
    """

    def refuse(file: Any, *arguments: Any, **settings: Any) -> NoReturn:
        raise ValueError(f"{file} is no safetensors file, and others are never read")

    load = torch.load
    torch.load = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = load


def resolve_file(name: str, field: str) -> Path:
    """Return the safetensors file `name`, downloading `owner/name/file.safetensors` from the hub if needed.

    Raises `UserError`, naming the configuration `field`, if it cannot be found.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_absolute() or name.count("/") < 2 or not name.endswith(".safetensors"):
        raise UserError(
            f"{field}: {name} is neither a file nor owner/name/file.safetensors on the hub; note that only safetensors "
            "files are read"
        )
    return _download_file(name, field)


def download_beside(name: str, beside: str, field: str) -> None:
    """Download the file `beside` from the folder of `owner/name/file` on the hub.

    Raises `UserError`, naming the configuration `field`, if there is none.
    """
    _download_file(f"{name.rpartition('/')[0]}/{beside}", field)


def check_upload(repository: str, field: str) -> None:
    """Raise `UserError`, naming the option `field`, where the user cannot upload to `repository`, owner/name."""
    if not HUB_ID.fullmatch(repository):
        raise UserError(f"{field}: '{repository}' is no name on the hub; give owner/name")
    if get_token() is None:
        raise UserError(f"{field}: no token of the hub is known; log in with `hf auth login`, or set HF_TOKEN")
    check_hub()
    with _uploading(repository, field, "nothing was written"):
        HfApi().whoami()


def upload(folder: Path, repository: str, field: str, *, public: bool) -> str:
    """Upload the files of `folder` to the model `repository` on the hub, made if it is not there; return its address.

    A new one is private unless `public`. Raises `UserError`, naming the option `field`, where the hub refuses.
    """
    with _uploading(repository, field, f"{folder} is written"):
        api = HfApi()
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="An adapter and its card")
        return str(commit.repo_url)


@contextmanager
def _uploading(repository: str, field: str, so_far: str) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, OfflineModeIsEnabled, InvalidId, httpx2.HTTPError, OSError) as error:
        raise UserError(f"{field}: {repository} could not be uploaded to ({first_line(error)}); {so_far}") from error


def _download_file(name: str, field: str) -> Path:
    owner, repository, file = name.split("/", 2)
    check_hub()
    try:
        with from_hub():
            return Path(hf_hub_download(f"{owner}/{repository}", file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, InvalidId, OSError) as error:
        raise UserError(
            f"{field}: {name} is no file here, and could not be had from the hub ({first_line(error)})"
        ) from error
