"""Build the generator that a configuration names."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from customized_grpo.config.messages import format_validation_error
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.distributed.env import processes_here
from customized_grpo.errors import UserError
from customized_grpo.policies.lora_files import adapter_file
from customized_grpo.policies.policy import Policy
from customized_grpo.runtime.device import CPU, check_precision, keep_freed_memory, resolve_device, resolve_precision
from customized_grpo.runtime.libraries import silence_libraries
from customized_grpo.toybox.policy import ADAPTER_FILE, ToyBoxPolicy, save_weights
from customized_grpo.toybox.weights import shipped_folder


def resolve_policy_config(config: PolicyConfig) -> PolicyConfig:
    """Return `config` with the precision that this machine uses."""
    return config.model_copy(update={"precision": resolve_precision(config.precision, policy_device(config))})


def build_policy(config: PolicyConfig, seed: int) -> Policy[Any]:
    """Build the generator to be tuned; `seed` draws the LoRA factors."""
    device = policy_device(config)
    precision = resolve_precision(config.precision, device)
    if config.kind != "toybox":
        check_precision(precision, device)
        silence_libraries()
        from customized_grpo.factory.pipelines import load_policy

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
        silence_libraries()
        from customized_grpo.policies.base_adapter import resolve_adapter

        return resolve_adapter(config.init_from, "policy.init_from")
    try:
        return adapter_file(Path(config.init_from), [ADAPTER_FILE])
    except UserError as error:
        raise UserError(f"policy.init_from: {error}") from error


def policy_weights(config: PolicyConfig) -> tuple[str, str | Path, str | None]:
    """Return the field that names the generator's weights, what it names, and the pattern of the files that count.

    The pattern is None for a model as libraries load it.
    """
    if config.kind == "toybox":
        return "policy.toybox.weights", config.toybox.weights or shipped_folder(), r".*\.safetensors"
    from customized_grpo.factory.pipelines import MODELS

    return "policy.pipeline.model", config.pipeline.model or MODELS[config.kind], None


def with_guidance(config: PolicyConfig, guidance_scale: float | None, usual: float) -> PolicyConfig:
    """Return the settings of a benchmark's generator: with this `guidance_scale`, or the `usual` one if it is unset.

    Raises `UserError` where a generator without guidance is asked for some.
    """
    if config.kind == "toybox":
        if guidance_scale is not None:
            raise UserError("guidance_scale: ToyBox has none; leave it out")
        return config
    if guidance_scale is None and config.kind != "flux2-klein":  # its distilled models take none
        guidance_scale = usual
    return config.model_copy(update={"pipeline": config.pipeline.model_copy(update={"guidance_scale": guidance_scale})})


def policy_with(config: PolicyConfig, **changes: Any) -> PolicyConfig:
    """Return the settings of a run's generator with `changes` of its fields, or of the fields of its pipeline.

    None changes nothing. Raises `UserError` for settings that the generator does not take, as options of a command.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    pipeline = {name: given.pop(name) for name in list(given) if name in type(config.pipeline).model_fields}
    settings = config.model_dump()
    try:
        return PolicyConfig.model_validate(settings | given | {"pipeline": settings["pipeline"] | pipeline})
    except ValidationError as error:
        told = format_validation_error(error).replace("pipeline: ", "").replace("pipeline.", "")
        raise UserError(f"--{told}") from error


def save_adapter(config: PolicyConfig, parameters: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write trained `parameters` of the generator of `config`, by name, as it would itself; it is not loaded."""
    if config.kind == "toybox":
        lora = (config.lora_rank, config.lora_alpha) if config.toybox.adapter == "lora" else None
        save_weights(parameters, folder, lora)
        return
    silence_libraries()
    from customized_grpo.factory.pipelines import PIPELINES
    from customized_grpo.policies.lora import lora_config, save_lora

    family = PIPELINES[config.kind]
    save_lora(
        family.pipeline, lora_config(family.lora_targets, config.lora_rank, config.lora_alpha), parameters, folder
    )


def check_shard(config: PolicyConfig, world: int) -> None:
    """Raise `UserError` where `world` processes are asked to spread the generator's weights, and cannot."""
    if not config.pipeline.fsdp:
        return
    if world == 1:
        raise UserError(
            "policy.pipeline.fsdp: a single process has no other to share the frozen weights with; start several "
            "(--num_processes, torchrun), or leave it out"
        )
    device = policy_device(config)
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"policy.pipeline.fsdp: weights are gathered on cuda or cpu, and the device is {device}; leave it out"
        )


def load_toybox(config: PolicyConfig, precision: Literal["fp32", "bf16"], seed: int) -> ToyBoxPolicy:
    keep_freed_memory()
    return ToyBoxPolicy.load(
        config.toybox.weights,
        adapter=config.toybox.adapter,
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
