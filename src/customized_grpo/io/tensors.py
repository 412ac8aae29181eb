"""Tensors from a safetensors file that a configuration field names."""

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
