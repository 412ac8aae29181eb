"""LoRAs to start from, found and merged into a pipeline before training."""

from pathlib import Path
from typing import Any

from customized_grpo.errors import UserError, first_line
from customized_grpo.io.hub import download_beside, resolve_file
from customized_grpo.policies.lora_files import (
    DIFFUSERS_FILE,
    PEFT_FILE,
    PEFT_SETTINGS,
    adapter_file,
    parse_lora,
    read_tensors,
)
from customized_grpo.policies.lora_layers import merge_factors, place_factors
from customized_grpo.policies.pipelines import uno


def resolve_adapter(name: str, field: str) -> Path:
    """Return the LoRA file `name`: a file, the one in a folder, or `owner/name/file.safetensors` of the hub.

    PEFT's settings beside a file on the hub are downloaded, too. Raises `UserError`, naming the configuration `field`,
    if there is no such file.
    """
    try:
        if Path(name).is_dir():
            return adapter_file(Path(name), (DIFFUSERS_FILE, PEFT_FILE))
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    path = resolve_file(name, field)
    if path.name == PEFT_FILE and not Path(name).is_file():
        download_beside(name, PEFT_SETTINGS, field)
    return path


def merge_base_adapter(pipe: Any, path: Path) -> None:
    """Merge the LoRA in the safetensors file `path` into the transformer, so that training starts from it.

    It is in one of the layouts that `read_lora` reads, or a whole FLUX.1 transformer in the names of its first release,
    UNO merged in. Raises `UserError` where it does not fit, or where a layer that it names would not change.
    """
    try:
        tensors, header = read_tensors(path)
        if uno.is_fused(tensors):
            pipe.transformer.load_state_dict(uno.fused_to_diffusers(tensors))
            return
        merge_factors(pipe.transformer, place_factors(parse_lora(path, tensors, header), pipe.transformer), path)
    except UserError as error:
        raise UserError(f"policy.pipeline.base_adapter: {error}") from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"policy.pipeline.base_adapter: {path} does not fit the transformer ({first_line(error)}); name one that "
            "was made for this model"
        ) from error
