"""LoRA factors on a diffusers transformer: made from a seed, saved and loaded in diffusers' own format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from customized_grpo.errors import UserError
from customized_grpo.storage import follow_umask

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
NAME = "default"
PREFIX = "transformer."


def add_lora(transformer: Any, targets: str, rank: int, alpha: int, seed: int) -> list[tuple[str, nn.Parameter]]:
    """Add factors, in fp32, to the layers that `targets` matches; returns them by name, in a fixed order.

    `seed` draws their starting point, at which they change nothing.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=NAME)
    factors = [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    for _, parameter in factors:
        parameter.data = parameter.data.float()
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
                factor.__class__ = CastLinear
    return factors


class CastLinear(nn.Linear):
    """A LoRA factor: kept in fp32, multiplied in the precision of what comes in."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


def save_lora(transformer: Any, pipeline: Any, folder: Path) -> None:
    """Write `folder/pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` takes."""
    metadata = transformer.peft_config[NAME].to_dict()
    pipeline.save_lora_weights(
        folder, transformer_lora_layers=_factors(transformer), transformer_lora_adapter_metadata=metadata
    )
    follow_umask(folder / ADAPTER_FILE)


def load_lora(transformer: Any, folder: Path) -> None:
    """Read what `save_lora`, or diffusers, wrote. Raises `UserError` where it is of another base, rank or layers."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise UserError(f"{path}: no adapter there; name the folder of a finished run")
    state, scale = read_lora(path)
    config = transformer.peft_config[NAME]
    if wrong := misfit(state, _factors(transformer)) or _other_scale(scale, config.lora_alpha / config.r):
        raise UserError(
            f"{path}: this adapter does not fit the policy of the run's config ({wrong}); check policy.model, "
            "policy.lora_rank and policy.lora_alpha"
        )
    set_peft_model_state_dict(transformer, state, adapter_name=NAME)


def read_lora(path: Path) -> tuple[dict[str, Tensor], float]:
    """The factors in a safetensors file, without the prefix "transformer.", and the scale of their product: alpha by
    rank, 1 where the file does not say. Raises `UserError` for a damaged file, and for scales layer by layer."""
    try:
        with safe_open(path, "pt") as file:
            state = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path}: damaged, or no safetensors file ({error})") from error
    settings = {name.removeprefix(PREFIX): value for name, value in said.items()}
    odd = [name for name in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora") if settings.get(name)]
    if odd or any(name.endswith(".alpha") or "dora_scale" in name for name in state):
        raise UserError(f"{path}: a LoRA with {', '.join(odd) or 'scales of its own for layers'} is not read here")
    return state, settings["lora_alpha"] / settings["r"] if {"lora_alpha", "r"} <= settings.keys() else 1.0


def _factors(transformer: Any) -> dict[str, Tensor]:
    factors: dict[str, Tensor] = get_peft_model_state_dict(transformer, adapter_name=NAME)
    return factors


def _other_scale(found: float, expected: float) -> str:
    return "" if abs(found - expected) < 1e-6 else f"its alpha is {found:g} times its rank, expected {expected:g}"


def misfit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first thing wrong with `state` where the names and shapes of `expected` are wanted; "" where nothing is."""
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        return f"it {'lacks' if missing else 'has'} {(missing or unknown)[0]}"
    for name, tensor in sorted(expected.items()):
        if state[name].shape != tensor.shape:
            return f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
    return ""
