"""Reading LoRA files as PEFT, diffusers, kohya, DiffSynth and UNO write them."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from customized_grpo.errors import UserError, first_line
from customized_grpo.io.files import check_finite

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
NAME = "default"
"""PEFT's name of the adapter that is trained."""
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings in the header of its file."""
PREFIXES = (
    "base_model.model.", "transformer.", "diffusion_model.", "pipe.dit.", "dit.", "lora_unet_", "lora_transformer_",
)  # fmt: skip
"""What stands before the name of a layer in the files of different trainers."""
TEXT_ENCODERS = ("text_encoder", "lora_te", "text_model", "clip_l", "t5xxl")
OTHER_METHODS = {
    "DoRA": r"\.(dora_scale|lora_magnitude_vector)",
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_",
    "OFT": r"\.b?oft_",
    "IA3": r"\.ia3_",
    "VeRA": r"\.vera_",
    "LoCon with a core tensor": r"\.lora_mid",
    "a LoRA of embeddings": r"\.lora_embedding_",
    "a LoRA with differences of whole weights": r"\.diff(_b)?$",
    "a LoRA with biases": r"\.lora_(A|B|up|down)(\.[^.]+)?\.bias$",
}
"""Patterns in tensor names by the method that writes them."""
UNREAD_SETTINGS = (
    "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication", "trainable_token_indices",
    "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
"""PEFT settings under which an adapter is more than a product of two factors."""
OTHER_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Values of PEFT's `init_lora_weights` that change the base model's weights, too."""
_FACTOR = re.compile(
    r"(?P<layer>.+?)\.(lora_(?P<letter>[AB])(\.(?P<adapter>[^.]+))?|lora[._](?P<side>down|up)|(?P<bare>down|up))\.weight"
)


@dataclass(frozen=True)
class Factors:
    """The update of one linear layer: `scale * up @ down`, with `down` [rank, inputs] and `up` [outputs, rank]."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True)
class LoraFile:
    """The factors in a file by the names that the file has for the layers, without a prefix."""

    path: Path
    layers: Mapping[str, Factors]


@dataclass
class _Parts:
    """The tensors of one layer as they are found."""

    factors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None


def adapter_file(place: Path, names: Sequence[str]) -> Path:
    """Return the safetensors file `place`, or the one of `names` in the folder `place`. Raises `UserError` where it is
    missing, or where two are there."""
    if place.is_file():
        return place
    found = [place / name for name in names if (place / name).is_file()]
    if not found:
        raise UserError(
            f"{place / names[0]}: no adapter there; name the folder of a finished run, or of an exported adapter"
        )
    if len(found) > 1:
        raise UserError(
            f"{place}: holds two adapters ({', '.join(path.name for path in found)}); name one of the files"
        )
    return found[0]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file and the text in its header.

    Raises `UserError` for a damaged file, and for a number in it that is not finite.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, or no safetensors file ({error})") from error
    check_finite(tensors, path)
    return tensors, header


def read_lora(path: Path) -> LoraFile:
    """Read the LoRA in the safetensors file `path`.

    The scale of a layer is alpha / rank (alpha / sqrt(rank) with PEFT's `use_rslora`); alpha is a tensor beside the
    factors, or a setting in the file's header or in `adapter_config.json` beside the file; without any, the scale is 1.
    Raises `UserError` for other methods than LoRA, and for a file whose scale cannot be known.
    """
    tensors, header = read_tensors(path)
    return parse_lora(path, tensors, header)


def parse_lora(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> LoraFile:
    """Parse LoRA tensors that are already in memory; see `read_lora`."""
    parts = _by_layer(path, tensors)
    settings = _settings(path, header, has_alphas=any(part.alpha is not None for part in parts.values()))
    layers = {}
    for name, part in parts.items():
        if part.factors.keys() != {"down", "up"}:
            raise UserError(f"{path}: damaged: of layer '{name}' it holds only {', '.join(part.factors) or 'alpha'}")
        down, up = part.factors["down"], part.factors["up"]
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
            raise UserError(
                f"{path}: the factors of '{name}' are {list(down.shape)} and {list(up.shape)}, expected [rank, inputs] "
                "and [outputs, rank]; only LoRAs of linear layers are read"
            )
        layers[name] = Factors(down, up, _scale(path, name, part.alpha, len(down), settings))
    return LoraFile(path, layers)


def header_settings(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's settings in the header of the file `path`; empty if it has none."""
    with _as_settings(path):
        return {without_prefix(name): value for name, value in json.loads(header.get(METADATA, "{}")).items()}


def saved_name(parameter: str) -> str:
    """Return the name of a trained factor in a file: without the adapter's name, "default"."""
    name = parameter.removesuffix(f".{NAME}.weight")
    return parameter if name == parameter else f"{name}.weight"


def without_prefix(name: str) -> str:
    """Return the name of a layer or tensor without the prefix that its trainer gave it."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def _by_layer(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, _Parts]:
    _refuse_others(path, tensors)
    parts: dict[str, _Parts] = {}
    adapters = set()
    for name, tensor in tensors.items():
        if name.endswith(".alpha") and tensor.numel() == 1:
            parts.setdefault(without_prefix(name.removesuffix(".alpha")), _Parts()).alpha = float(tensor)
            continue
        match = _FACTOR.fullmatch(name)
        if match is None or not tensor.is_floating_point():
            raise UserError(
                f"{path}: '{name}' is no tensor of a LoRA that is read here; expected names such as "
                "transformer_blocks.0.attn.to_q.lora_A.weight, or kohya's lora_unet_... .lora_down.weight"
            )
        adapters.add(match["adapter"])
        side = match["side"] or match["bare"] or {"A": "down", "B": "up"}[match["letter"]]
        parts.setdefault(without_prefix(match["layer"]), _Parts()).factors[side] = tensor
    if len(adapters) > 1:
        names = ", ".join(sorted(str(adapter) for adapter in adapters))
        raise UserError(f"{path}: holds several adapters ({names}); save the one that is wanted alone")
    if not parts:
        raise UserError(f"{path}: holds no LoRA: there is no tensor in it")
    return parts


def _refuse_others(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for method, pattern in OTHER_METHODS.items():
        found = [name for name in tensors if re.search(pattern, name)]
        if found:
            raise UserError(
                f"{path}: this is {method} ('{found[0]}'), and only plain LoRA is read; merge it into the model with "
                "the tool that made it, and name the merged model in policy.pipeline.model"
            )
    encoders = [name for name in tensors if without_prefix(name).startswith(TEXT_ENCODERS)]
    if encoders:
        raise UserError(
            f"{path}: {len(encoders)} of its tensors change a text encoder ('{encoders[0]}'), and text encoders stay "
            "as they are here; take a LoRA of the transformer alone, or remove these tensors"
        )


def _settings(path: Path, header: Mapping[str, str], *, has_alphas: bool) -> dict[str, Any]:
    """Return PEFT's settings of the file, from its header or from the file beside it; empty if there are none."""
    beside = path.with_name(PEFT_SETTINGS)
    if METADATA in header:
        settings = header_settings(path, header)
    elif has_alphas:
        return {}
    elif beside.is_file():
        with _as_settings(beside):
            settings = dict(json.loads(beside.read_text(encoding="utf-8")))
        path = beside
    elif path.name == PEFT_FILE:
        raise UserError(
            f"{path}: PEFT keeps alpha in {PEFT_SETTINGS}, and there is none beside it; put it there: without it the "
            "scale is not known"
        )
    else:
        return {}
    kind, init = str(settings.get("peft_type", "LORA")).upper(), str(settings.get("init_lora_weights", True)).lower()
    unread = [name for name in UNREAD_SETTINGS if settings.get(name)]
    if settings.get("bias") not in (None, "none"):
        unread.append("bias")
    if kind.rpartition(".")[2] != "LORA":
        raise UserError(f"{path}: this is {kind} (peft_type), and only plain LoRA is read")
    if init.startswith(OTHER_BASES):
        raise UserError(
            f"{path}: init_lora_weights={init} changed the base model, too; save it as a plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if unread:
        raise UserError(f"{path}: a LoRA with {', '.join(unread)} is not read here; only plain LoRA is")
    if has_alphas:
        raise UserError(f"{path}: tells alpha twice, as tensors and in its header; remove one of them")
    return settings


@contextmanager
def _as_settings(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: the settings of the LoRA are damaged ({first_line(error)})") from error


def _scale(path: Path, layer: str, alpha: float | None, rank: int, settings: Mapping[str, Any]) -> float:
    if alpha is not None:
        return alpha / rank
    if not {"r", "lora_alpha"} <= settings.keys():
        return 1.0
    with _as_settings(path):
        ranks, alphas = dict(settings.get("rank_pattern") or {}), dict(settings.get("alpha_pattern") or {})
        told = int(ranks.get(get_pattern_key(list(ranks), layer), settings["r"]))
        alpha = float(alphas.get(get_pattern_key(list(alphas), layer), settings["lora_alpha"]))
    if told != rank:
        raise UserError(
            f"{path}: the factors of '{layer}' have rank {rank}, and the LoRA's settings say {told}: they are of "
            "another file"
        )
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
