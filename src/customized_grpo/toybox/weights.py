"""The shipped ToyBox weights: safetensors in half precision, beside `quality.json`, what was measured of them."""

import json
import textwrap
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from customized_grpo.errors import UserError
from customized_grpo.io.files import check_finite, save_tensors, writing

NetworkT = TypeVar("NetworkT", bound=nn.Module)
LEAKS = ("low", "medium", "high")
IDENTITY_ENCODERS = tuple(f"identity_encoder_{leak}" for leak in LEAKS)
NAMES = ("generator", *IDENTITY_ENCODERS, "prompt_encoder", "judge")
QUALITY = "quality.json"


def shipped_folder() -> Path:
    """Return where the installed package keeps its weights."""
    return Path(str(resources.files("customized_grpo.toybox"))) / "weights"


def save_network(network: nn.Module, folder: Path, name: str) -> Path:
    """Write `folder/name.safetensors` in bfloat16."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_tensors({key: value.bfloat16() for key, value in network.state_dict().items()}, path)
    return path


def load_network(network: NetworkT, name: str, folder: Path | None = None) -> NetworkT:
    """Fill `network` with `name`'s weights, in fp32, for evaluation. Raises `UserError` where they are absent, do
    not fit, or are not finite."""
    path = (folder or shipped_folder()) / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such weights. Make them with: customized-grpo toybox pretrain --output FOLDER")
    try:
        state = load_file(path)
        network.load_state_dict({key: value.float() for key, value in state.items()})
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path}: these are not weights of ToyBox's {name} ({first_misfit(error)}). "
            "Make them with: customized-grpo toybox pretrain --output FOLDER"
        ) from error
    check_finite(state, path)
    return network.requires_grad_(False).eval()


def first_misfit(error: Exception) -> str:
    """Return the first of the tensors that an error of `load_state_dict` lists on lines of their own."""
    lines = [line.strip() for line in str(error).splitlines()]
    return textwrap.shorten(lines[min(1, len(lines) - 1)].rstrip("."), 200, placeholder=" ...")


@cache
def read_quality(folder: Path | None = None) -> dict[str, Any]:
    """Return the measurements of the weights when they were made: see `quality.measure_quality`."""
    path = (folder or shipped_folder()) / QUALITY
    if not path.is_file():
        raise UserError(
            f"{path}: missing; `customized-grpo toybox pretrain --output FOLDER --only '[]'` measures it again"
        )
    quality: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return quality
