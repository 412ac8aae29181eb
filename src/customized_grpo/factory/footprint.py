"""What rewards and metrics hold in memory, by the headers of their files: nothing is loaded and nothing downloaded."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from customized_grpo.config.rewards import PRETRAINED, TOYBOX_KINDS, VLM_KINDS, ScoreConfig
from customized_grpo.errors import UserError
from customized_grpo.factory.rewards import RewardLoader, model_name
from customized_grpo.io.files import read_header
from customized_grpo.toybox.weights import shipped_folder

NOTHING = (*VLM_KINDS, "remote", "texture")
"""Kinds that hold nothing in memory here."""
PARAMETERS = {
    "facebook/dinov2-base": 86_580_480,
    "openai/clip-vit-base-patch32": 151_277_313,
    "google/siglip-base-patch16-224": 203_155_970,
    "yuvalkirstain/PickScore_v1": 986_109_441,
}
"""Of models that are used where none is named, by hub id: counted without their files."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def score_bytes(
    scores: Mapping[str, ScoreConfig], device: torch.device, loader: RewardLoader, toybox_weights: Path | None
) -> tuple[dict[str, float], list[str]]:
    """Return the weights that the `scores`, by field, keep on `device`: bytes by field, and the scores not counted.

    A model that several share counts once. A score is not counted if its files are not on this machine, and its model
    is none of `PARAMETERS`.
    """
    counted: dict[str, float] = {}
    unknown: list[str] = []
    seen: set[tuple[object, ...]] = set()
    for field, score in scores.items():
        if score.kind in NOTHING or (score.kind in PRETRAINED and loader.device(field, score) != device):
            continue
        name, files, bf16 = f"{field} ({score.kind})", _files(score, toybox_weights), loader.bf16(field, score)
        known = PARAMETERS.get(model_name(score) or "")
        numbers = sum(map(_numbers, files)) if files else known
        if numbers is None:
            unknown.append(name)
        elif (what := (*files, known, bf16)) not in seen:
            seen.add(what)
            counted[name] = float(numbers * (2 if bf16 else 4))
    return counted, unknown


def _files(score: ScoreConfig, toybox_weights: Path | None) -> list[Path]:
    """Return the safetensors files of a score that are on this machine; none where one of them is not."""
    if score.kind in TOYBOX_KINDS:
        identity = f"identity_encoder_{score.toybox_identity.leak}"
        encoder = "prompt_encoder" if score.kind == "toybox_prompt" else identity
        return _there([(toybox_weights or shipped_folder()) / f"{encoder}.safetensors"])
    name = model_name(score)
    if name is None:
        return []  # of one's own
    if score.kind == "hpsv3":
        return _single(name)
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
