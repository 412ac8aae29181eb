"""The families of diffusers pipelines by the names that configurations have for them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from customized_grpo.config.policy import PolicyConfig
from customized_grpo.distributed.env import processes_here
from customized_grpo.errors import UserError
from customized_grpo.policies.base_adapter import locate_adapter, merge_base_adapter
from customized_grpo.policies.cache_folder import GIGABYTE
from customized_grpo.policies.conditions import ConditionCache
from customized_grpo.policies.diffusers_policy import DiffusersPolicy, Settings
from customized_grpo.policies.loading import check_model, fingerprint, load_pipeline, locate
from customized_grpo.policies.lora_files import adapter_file
from customized_grpo.policies.pipelines.flux1_kontext import Flux1Kontext
from customized_grpo.policies.pipelines.flux2 import Flux2
from customized_grpo.policies.pipelines.flux2_klein import Flux2Klein
from customized_grpo.policies.pipelines.qwen_image_edit_plus import QwenImageEditPlus
from customized_grpo.policies.pipelines.spec import Family
from customized_grpo.policies.pipelines.uno import Uno
from customized_grpo.policies.policy import Policy
from customized_grpo.runtime.device import CPU, check_precision, keep_freed_memory, resolve_device, resolve_precision
from customized_grpo.runtime.libraries import quiet
from customized_grpo.toybox.policy import ADAPTER_FILE, ToyBoxPolicy, save_weights

FAMILIES: dict[str, Family] = {
    "flux1-kontext": Flux1Kontext(),
    "uno": Uno(),
    "flux2-klein": Flux2Klein(),
    "flux2": Flux2(),
    "qwen-image-edit-plus": QwenImageEditPlus(),
}
MODELS = {
    "flux1-kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "uno": "black-forest-labs/FLUX.1-dev",
    "flux2-klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux2": "black-forest-labs/FLUX.2-dev",
    "qwen-image-edit-plus": "Qwen/Qwen-Image-Edit-2511",
}
"""What a family uses where the configuration names no model."""
NEEDS_CUDA = ("flash", "_flash", "_native_cudnn", "_native_flash", "xformers")
"""How the names of diffusers' attention backends begin that run on CUDA only."""

NO_BACKWARD = ("sage", "_sage")
"""How the names of those begin that have no backward pass. One more is `_flash_3`: diffusers wraps FlashAttention 3 in
an operator of its own, and gives that none; `_flash_3_hub`, of the same kernels, is called as it is."""
ROW_FORMAT = 3
"""Of what families leave in the cache; another number where one of them encodes otherwise."""


def load_policy(config: PolicyConfig, seed: int, device: torch.device, *, bf16: bool) -> DiffusersPolicy:
    """The policy that `config` describes. Raises `UserError` before the weights are read where it can."""
    check_backend(config.attention_backend, device)
    if device.type == "cuda" and device.index is not None:
        # Kernels of others, FSDP and NCCL take the current device for the one that is meant.
        torch.cuda.set_device(device)
    family = FAMILIES[config.kind]
    model = config.model or MODELS[config.kind]
    check_model(model, family)  # the cheapest first: a file of a few lines, an adapter, the weights
    adapter = None if config.base_adapter is None else locate_adapter(config.base_adapter, "policy.base_adapter")
    folder = locate(model, family)
    pipe = load_pipeline(folder, family, torch.bfloat16 if bf16 else torch.float32)
    if adapter is not None:
        merge_base_adapter(pipe, adapter)
    guided = family.is_guided(pipe, family.guidance if config.guidance is None else config.guidance)
    stands_for = json.dumps([ROW_FORMAT, config.kind, fingerprint(folder), bf16, guided])
    depends_on = {name: inputs for name, inputs in family.depends_on.items() if guided or name != "negative"}
    limit = None if config.cache_limit is None else config.cache_limit * GIGABYTE
    cache = ConditionCache(config.cache, stands_for, depends_on, limit)
    return DiffusersPolicy(family, pipe, cache, settings_of(config, device, seed))


def check_backend(name: str | None, device: torch.device) -> None:
    """Raise `UserError` for an attention backend that cannot train, or wants CUDA and the device is another."""
    if name is not None and (name == "_flash_3" or name.startswith(NO_BACKWARD)):
        raise UserError(
            f"policy.attention_backend: '{name}' has no backward pass, and trains nothing; use _native_flash, flash or "
            "_flash_3_hub, or leave it out"
        )
    if name is not None and name.startswith(NEEDS_CUDA) and device.type != "cuda":
        raise UserError(
            f"policy.attention_backend: '{name}' runs on CUDA, and the device is {device}; leave it out, or use "
            "policy.device=cuda"
        )


def settings_of(config: PolicyConfig, device: torch.device, seed: int) -> Settings:
    """What of `config` a diffusers policy rests on."""
    return Settings(
        device=device,
        size=(config.height, config.width),
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        guidance=config.guidance,
        reference_side=config.reference_side,
        offload=config.offload,
        # A command that runs in one process, such as generate, takes the configuration of a run of several.
        shard=config.shard and dist.is_initialized(),
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
        attention_backend=config.attention_backend,
        seed=seed,
    )


def resolved_policy(config: PolicyConfig) -> PolicyConfig:
    """The same of a generator alone."""
    return config.model_copy(update={"precision": resolve_precision(config.precision, policy_device(config))})


def build_policy(config: PolicyConfig, seed: int) -> Policy[Any]:
    """The generator, ready to be tuned; `seed` draws the LoRA factors."""
    device = policy_device(config)
    precision = resolve_precision(config.precision, device)
    if config.kind != "toybox":
        check_precision(precision, device)
        quiet()
        from customized_grpo.factory.policy import load_policy

        return load_policy(config, seed, device, bf16=precision == "bf16")
    return load_toybox(config, precision, seed)


def build_start(config: PolicyConfig, seed: int) -> Policy[Any]:
    """Build the generator as training starts from it: its trained values are those of `policy.init_from`, if given.

    Raises `UserError`, before the generator is loaded where it can, for an adapter that is missing or does not fit.
    """
    adapter = init_adapter(config)
    policy = build_policy(config, seed)
    if adapter is not None:
        try:
            policy.load_adapter(adapter)
        except UserError as error:
            raise UserError(f"policy.init_from: {error}") from error
    return policy


def init_adapter(config: PolicyConfig) -> Path | None:
    """Return the file that `policy.init_from` names, downloaded where need be; None where it names none."""
    if config.init_from is None:
        return None
    if config.kind != "toybox":
        quiet()
        from customized_grpo.policies.base_adapter import locate_adapter

        return locate_adapter(config.init_from, "policy.init_from")
    try:
        return adapter_file(Path(config.init_from), [ADAPTER_FILE])
    except UserError as error:
        raise UserError(f"policy.init_from: {error}") from error


def save_adapter(config: PolicyConfig, parameters: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write trained `parameters` of the generator of `config`, by name, as it would itself; it is not loaded."""
    if config.kind == "toybox":
        lora = (config.lora_rank, config.lora_alpha) if config.adapter == "lora" else None
        save_weights(parameters, folder, lora)
        return
    quiet()
    from customized_grpo.factory.policy import FAMILIES
    from customized_grpo.policies.lora import lora_config, save_lora

    family = FAMILIES[config.kind]
    save_lora(
        family.pipeline, lora_config(family.lora_targets, config.lora_rank, config.lora_alpha), parameters, folder
    )


def check_shard(config: PolicyConfig, world: int) -> None:
    """Raise `UserError` where `world` processes are asked to spread the generator's weights, and cannot."""
    if not config.shard:
        return
    if world == 1:
        raise UserError(
            "policy.shard: a single process has no other to share the frozen weights with; start several "
            "(--num_processes, torchrun), or leave it out"
        )
    device = policy_device(config)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"policy.shard: weights are gathered on cuda or cpu, and the device is {device}; leave it out")


def load_toybox(config: PolicyConfig, precision: Literal["fp32", "bf16"], seed: int) -> ToyBoxPolicy:
    keep_freed_memory()
    return ToyBoxPolicy.load(
        config.weights,
        adapter=config.adapter,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        precision=precision,
        seed=seed,
    )


def policy_device(config: PolicyConfig) -> torch.device:
    if config.kind == "toybox":
        return CPU
    device = resolve_device(config.device)
    if config.device.startswith("cuda:") and processes_here() > 1:
        raise UserError(
            f"policy.device: '{config.device}' is one GPU, and each process of this machine wants its own; use cuda"
        )
    return device
