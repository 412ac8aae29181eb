"""What rewards hold in memory, by the headers of their files: nothing is loaded and nothing downloaded."""

import json
import math
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from customized_grpo.config.rewards import ENCODERS, RewardsConfig
from customized_grpo.errors import UserError
from customized_grpo.io.files import read_header
from customized_grpo.toybox.weights import shipped_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ELSEWHERE = ("vlm_judge", "remote")
"""Rewards of other machines: nothing of them is here."""


def reward_bytes(
    config: RewardsConfig, device: torch.device, toybox_weights: Path | None
) -> tuple[dict[str, float], list[str]]:
    """Return the weights that the rewards keep on `device`, in bytes by the reward's field, and the uncounted rewards.

    A reward is not counted if its files are not on this machine.
    """
    counted: dict[str, float] = {}
    unknown = []
    for side, kind in (("prompt", config.prompt), ("identity", config.identity)):
        if kind in ELSEWHERE:
            continue
        name = f"rewards.{side} ({kind})"
        files = _files(side, kind, config, toybox_weights)
        if not files:
            unknown.append(name)
        else:
            bf16 = config.local.precision == "bf16" or (
                config.local.precision == "auto" and kind == "hpsv3" and device.type == "cuda"
            )
            counted[name] = float(sum(_numbers(path) for path in files) * (2 if bf16 else 4))
    return counted, unknown


def _files(side: str, kind: str, config: RewardsConfig, toybox_weights: Path | None) -> list[Path]:
    """Return the safetensors files of a reward that are on this machine; none where one of them is not."""
    if kind == "toybox":
        name = "prompt_encoder" if side == "prompt" else f"identity_encoder_{config.toybox.identity_leak}"
        return _there([(toybox_weights or shipped_folder()) / f"{name}.safetensors"])
    if kind == "hpsv3":
        from customized_grpo.rewards.hpsv3 import WEIGHTS as PUBLISHED

        return _single(config.hpsv3.model or PUBLISHED)
    if kind not in ENCODERS:
        return []  # of one's own
    from customized_grpo.rewards.pretrained import MODELS

    name = config.model_of(kind) or MODELS.get(kind, "")
    if name.endswith(".safetensors"):
        return _single(name)
    index = _part(name, INDEX)
    if index is not None:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return _there([_part(name, shard) for shard in sorted(shards)])
    return _there([_part(name, WEIGHTS)])


def _single(name: str) -> list[Path]:
    """Return a safetensors file, or owner/name/file of the hub."""
    path = Path(name)
    if path.is_file() or name.count("/") < 2:
        return _there([path])
    owner, repository, file = name.split("/", 2)
    return _there([_part(f"{owner}/{repository}", file)])


def _part(model: str, file: str) -> Path | None:
    """Return a file of a folder, or of a model of the hub that was downloaded before; None where it is not there."""
    if Path(model).is_dir():
        path = Path(model) / file
        return path if path.is_file() else None
    if model.count("/") != 1:
        return None
    found = try_to_load_from_cache(model, file)
    return Path(found) if isinstance(found, str) else None


def _there(paths: list[Path | None]) -> list[Path]:
    found = [path for path in paths if path is not None and path.is_file()]
    return found if len(found) == len(paths) else []


def _numbers(path: Path) -> int:
    """Return how many numbers a safetensors file holds, by its header."""
    try:
        with path.open("rb") as file:
            header = read_header(file)
        return sum(math.prod(each["shape"]) for name, each in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: damaged, or no safetensors file ({error})") from error
