"""Tensors from a safetensors file that a configuration field names."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from customized_grpo.errors import UserError


def read_tensors(path: Path, field: str) -> dict[str, Tensor]:
    """Return the tensors in the file `path` by name.

    Raises `UserError`, naming the configuration `field`, for a damaged one.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{field}: {path} is damaged, or no safetensors file ({error})") from error


def mismatch(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return the first difference between `state` and the names and shapes of `expected`; "" if there is none."""
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        return f"it {'lacks' if missing else 'has'} {(missing or unknown)[0]}"
    for name, tensor in sorted(expected.items()):
        if state[name].shape != tensor.shape:
            return f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
    return ""
