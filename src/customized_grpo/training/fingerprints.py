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
from customized_grpo.factory.policy import init_adapter
from customized_grpo.io.files import file_sha256, read_header
from customized_grpo.policies.lora_files import PEFT_SETTINGS
from customized_grpo.toybox.weights import shipped_folder

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
    """The fields that name weights, what they name, and which files of it decide."""
    policy, rewards = config.policy, config.rewards
    either = f"{CONFIGURATIONS}|{WEIGHTS}"
    if policy.kind == "toybox":
        yield "policy.weights", policy.weights or shipped_folder(), r".*\.safetensors"
    else:
        from customized_grpo.factory.pipelines import MODELS

        yield "policy.model", policy.model or MODELS[policy.kind], either
    for side, kind, model in (
        ("prompt", rewards.prompt, rewards.prompt_model),
        ("identity", rewards.identity, rewards.identity_model),
    ):
        yield f"rewards.{side}_model", _reward_model(kind, model), either
    if rewards.prompt == "hpsv2" and (rewards.prompt_model or "").endswith(".safetensors"):
        yield "rewards.hpsv2.backbone", rewards.hpsv2.backbone, CONFIGURATIONS
    if rewards.prompt == "hpsv3":
        yield "rewards.hpsv3.backbone", rewards.hpsv3.backbone, CONFIGURATIONS
        yield "rewards.hpsv3.instruction", rewards.hpsv3.instruction, either


def _adapters(policy: PolicyConfig) -> dict[str, Path]:
    """The LoRA files that training starts from, by field."""
    found = {"policy.init_from": init_adapter(policy)}
    if policy.base_adapter is not None:
        from customized_grpo.policies.base_adapter import resolve_adapter

        found["policy.base_adapter"] = resolve_adapter(policy.base_adapter, "policy.base_adapter")
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


def _reward_model(kind: str, model: str | None) -> str | None:
    """The weights of a reward of this kind; None if it has none of its own here."""
    if kind in ("toybox", "vlm_judge", "remote") or kind.startswith("python:"):
        return None
    if kind == "hpsv3":
        from customized_grpo.rewards.hpsv3 import WEIGHTS

        return model or WEIGHTS
    from customized_grpo.rewards.pretrained import MODELS

    return model or MODELS[kind]


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
