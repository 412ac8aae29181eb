"""LoRA factors on a diffusers transformer: made from a seed, saved and loaded in diffusers' own format."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from customized_grpo.errors import UserError

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
    return factors


def save_lora(transformer: Any, pipeline: Any, folder: Path) -> None:
    """Write `folder/pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` takes."""
    metadata = transformer.peft_config[NAME].to_dict()
    pipeline.save_lora_weights(
        folder, transformer_lora_layers=_factors(transformer), transformer_lora_adapter_metadata=metadata
    )


def load_lora(transformer: Any, folder: Path) -> None:
    """Read what `save_lora`, or diffusers, wrote. Raises `UserError` where it is of another base, rank or layers."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise UserError(f"{path}: no adapter there; name the folder of a finished run")
    try:
        state = {name.removeprefix(PREFIX): value for name, value in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error})") from error
    expected = _factors(transformer)
    if misfit := _misfit(state, expected):
        raise UserError(
            f"{path}: this adapter does not fit the policy of the run's config ({misfit}); check policy.model and "
            "policy.lora_rank"
        )
    set_peft_model_state_dict(transformer, state, adapter_name=NAME)


def first_line(error: Exception) -> str:
    """What an error says first, short enough for a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _factors(transformer: Any) -> dict[str, Tensor]:
    factors: dict[str, Tensor] = get_peft_model_state_dict(transformer, adapter_name=NAME)
    return factors


def _misfit(state: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        return f"it {'lacks' if missing else 'has'} {(missing or unknown)[0]}"
    for name, value in state.items():
        if value.shape != expected[name].shape:
            return f"{name} is {list(value.shape)}, expected {list(expected[name].shape)}"
    return ""
