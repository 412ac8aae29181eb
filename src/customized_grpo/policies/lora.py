"""LoRA factors on a diffusers transformer: made from a seed, saved and loaded in diffusers' own format."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from customized_grpo.errors import UserError
from customized_grpo.io.files import follow_umask
from customized_grpo.policies.lora_files import (
    DIFFUSERS_FILE,
    NAME,
    PEFT_FILE,
    Factors,
    adapter_file,
    read_lora,
    saved_name,
)
from customized_grpo.policies.lora_layers import place_factors


def lora_config(targets: str, rank: int, alpha: int) -> LoraConfig:
    """Return PEFT's settings of factors for the layers that the regular expression `targets` matches."""
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")


def add_lora(transformer: Any, targets: str, rank: int, alpha: int, seed: int) -> list[tuple[str, nn.Parameter]]:
    """Add factors, in fp32, to the layers that `targets` matches; returns them by name, in a fixed order.

    `seed` draws their starting point, at which they change nothing.
    """
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Of layers in 8 bits, into which PEFT cannot merge. Nothing here does.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated", category=UserWarning)
        torch.manual_seed(seed)
        transformer.add_adapter(lora_config(targets, rank, alpha), adapter_name=NAME)
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


def save_lora(pipeline: Any, config: LoraConfig, factors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write `folder/pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` takes.

    `factors` are named as `add_lora` names them; `pipeline` is the class that knows the format, and `config` what the
    factors were made with.
    """
    layers = {saved_name(name): tensor.detach().contiguous() for name, tensor in factors}
    pipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
    )
    follow_umask(folder / DIFFUSERS_FILE)


@torch.no_grad()
def load_lora(transformer: Any, place: Path) -> None:
    """Give the factors of `transformer` the values in a LoRA file of any layout that is read.

    `place` is the file or its folder. Raises `UserError` where it is of another base, rank, alpha or other layers.
    """
    lora = read_lora(adapter_file(place, (DIFFUSERS_FILE, PEFT_FILE)))
    found = place_factors(lora, transformer)
    own: dict[str, Any] = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, LoraLayer)}
    config = transformer.peft_config[NAME]
    if wrong := _mismatch(found, own.keys(), config.r, config.lora_alpha):
        raise UserError(f"{lora.path}: this adapter does not fit the policy of the configuration: {wrong}")
    for name, layer in own.items():
        layer.lora_A[NAME].weight.copy_(found[name].down)
        layer.lora_B[NAME].weight.copy_(found[name].up)


def _mismatch(found: Mapping[str, Factors], layers: Iterable[str], rank: int, alpha: int) -> str:
    """Return why factors of other layers, rank or scale cannot be trained further, and which setting to change."""
    wanted = set(layers)
    missing, unknown = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    if missing or unknown:
        return (
            f"it {'lacks' if missing else 'has'} factors for {(missing or unknown)[0]}: it fits "
            f"{len(wanted) - len(missing)} of the {len(wanted)} layers that are trained, and has {len(unknown)} more; "
            "check policy.pipeline.model, or merge it with policy.pipeline.base_adapter"
        )
    shapes = {(each.rank, round(each.scale * each.rank, 6)) for each in found.values()}
    if shapes == {(rank, float(alpha))}:
        return ""
    if len(shapes) > 1:
        return (
            "its layers have several ranks or scales, and the policy's one; merge it with policy.pipeline.base_adapter"
        )
    (their_rank, their_alpha) = shapes.pop()
    if not their_alpha.is_integer():
        return (
            f"it has rank {their_rank} and alpha {their_alpha:g}, and policy.lora_alpha is a whole number; merge it "
            "with policy.pipeline.base_adapter"
        )
    return (
        f"it has rank {their_rank} and alpha {their_alpha:g}, and the policy rank {rank} and alpha {alpha}; set "
        f"policy.lora_rank={their_rank} and policy.lora_alpha={their_alpha:g}"
    )
