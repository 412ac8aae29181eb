"""Tensors from a safetensors file, and what is wrong with them."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from customized_grpo.errors import UserError


def read_tensors(path: Path, field: str) -> dict[str, Tensor]:
    """The tensors in the file `path` by name. Raises `UserError`, naming the configuration `field`, for a damaged
    one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{field}: {path} is damaged, or no safetensors file ({error})") from error


def misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first thing wrong with `found` where the names and shapes of `expected` are wanted; None where nothing is."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        return f"it lacks {missing[0]}" if missing else f"it has {unknown[0]}"
    for name, tensor in sorted(expected.items()):
        if found[name].shape != tensor.shape:
            return f"{name} is {list(found[name].shape)}, expected {list(tensor.shape)}"
    return None
