"""Hashes of the weights that a run starts from, wherever these lie."""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import snapshot_download

from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.factory.policy import init_adapter, policy_weights
from customized_grpo.factory.rewards import model_name
from customized_grpo.io.files import file_sha256, read_header
from customized_grpo.policies.lora_files import PEFT_SETTINGS

CONFIGURATIONS = r"(model_index|config|scheduler_config|preprocessor_config)\.json"
WEIGHTS = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors"
"""Names of the files that libraries load. Whatever else a repository holds decides nothing: other variants, the same
weights in one file, pictures."""
INDEX = "model_index.json"
"""The file of a folder whose parts are folders."""
BLOB = re.compile("[0-9a-f]{64}")
"""How the hub's cache names a large file: by its SHA-256."""
THREADS = 8


def fingerprints(config: Config) -> dict[str, str]:
    """Map the fields that name weights to a hash of what these weights are. All of them must have been loaded."""
    found = {field: fingerprint(name, files) for field, name, files in _named(config) if name is not None}
    return found | {field: _adapter_sha256(path) for field, path in _adapters(config.policy).items()}


def fingerprint(name: str | Path, files: str = f"{CONFIGURATIONS}|{WEIGHTS}") -> str:
    """Return a hash of the `files`, a pattern for their names, in a folder, or in a pipeline's folders; or of one file.

    `name`: a path; or owner/name or owner/name/file of the hub, as its cache has them. Raises `UserError` where no file
    matches.
    """
    place = _place(str(name))
    found = [place] if place.is_file() else sorted(_matching(place, files))
    if not found:
        raise UserError(f"{place}: none of its files is one that a model is loaded from; name the model's folder")
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(_sha256, found))
    # A single file may be renamed; in a folder, names are what libraries look for.
    names = ["" if path == place else path.relative_to(place).as_posix() for path in found]
    return hashlib.sha256("".join(f"{n} {h}\n" for n, h in zip(names, hashes, strict=True)).encode()).hexdigest()


def _named(config: Config) -> Iterator[tuple[str, str | Path | None, str]]:
    """Yield the fields that name weights, what they name, and which files of it decide."""
    policy = config.policy
    either = f"{CONFIGURATIONS}|{WEIGHTS}"
    field, name, files = policy_weights(policy)
    yield field, name, files or either
    for field, score in config.scores.items():
        place = f"{field}.{score.kind}"
        yield f"{place}.model", model_name(score), either
        if score.kind == "hpsv2" and (score.hpsv2.model or "").endswith(".safetensors"):
            yield f"{place}.backbone", score.hpsv2.backbone, CONFIGURATIONS
        if score.kind == "hpsv3":
            yield f"{place}.backbone", score.hpsv3.backbone, CONFIGURATIONS
            yield f"{place}.instruction", score.hpsv3.instruction, either


def _adapters(policy: PolicyConfig) -> dict[str, Path]:
    """Return the LoRA files that training starts from, by field."""
    found = {"policy.init_from": init_adapter(policy)}
    if policy.pipeline.base_adapter is not None:
        from customized_grpo.policies.base_adapter import resolve_adapter

        field = "policy.pipeline.base_adapter"
        found[field] = resolve_adapter(policy.pipeline.base_adapter, field)
    return {field: path for field, path in found.items() if path is not None}


def _adapter_sha256(path: Path) -> str:
    """Return a hash of a LoRA, and of PEFT's settings beside it, which hold its alpha.

    The same LoRA saved again has the entries of its header in another order.
    """
    with path.open("rb") as file:
        digest = hashlib.sha256(json.dumps(read_header(file), sort_keys=True).encode())
        while part := file.read(1 << 20):
            digest.update(part)
    if (settings := path.with_name(PEFT_SETTINGS)).is_file():
        digest.update(settings.read_bytes())
    return digest.hexdigest()


def _place(name: str) -> Path:
    path = Path(name)
    if path.exists():
        return path
    owner, repository, *rest = name.split("/", 2)
    return Path(snapshot_download(f"{owner}/{repository}", local_files_only=True)).joinpath(*rest)


def _matching(folder: Path, names: str) -> Iterator[Path]:
    parts = folder.glob("[!.]*/*") if (folder / INDEX).is_file() else ()
    for path in (*folder.iterdir(), *parts):
        if re.fullmatch(names, path.name) and path.is_file():
            yield path


def _sha256(path: Path) -> str:
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and BLOB.fullmatch(blob.name) else file_sha256(path)
