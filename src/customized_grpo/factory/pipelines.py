"""Registry of the pipelines that can be tuned, and how each is loaded."""

import json

import torch
import torch.distributed as dist

from customized_grpo.config.policy import PipelineConfig, PolicyConfig
from customized_grpo.errors import UserError
from customized_grpo.policies.base_adapter import merge_base_adapter, resolve_adapter
from customized_grpo.policies.cache_folder import GIGABYTE
from customized_grpo.policies.conditions import ConditionCache
from customized_grpo.policies.diffusers_policy import DiffusersPolicy, Settings
from customized_grpo.policies.loading import check_model, fingerprint, load_pipeline, resolve_model
from customized_grpo.policies.pipelines.flux1_kontext import Flux1Kontext
from customized_grpo.policies.pipelines.flux2 import Flux2
from customized_grpo.policies.pipelines.flux2_klein import Flux2Klein
from customized_grpo.policies.pipelines.qwen_image_edit_plus import QwenImageEditPlus
from customized_grpo.policies.pipelines.spec import PipelineSpec
from customized_grpo.policies.pipelines.uno import Uno
from customized_grpo.policies.placement import How
from customized_grpo.policies.quantization import check_quantization, is_quantized, quantize

PIPELINES: dict[str, PipelineSpec] = {
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
an operator of its own, and gives that none; `_flash_3_hub`, of the same kernels, is called directly."""
QUANTIZATION, ENCODER_QUANTIZATION = "policy.pipeline.quantization", "policy.pipeline.text_encoder_quantization"
ROW_FORMAT = 3
"""Of what families leave in the cache; another number where one of them encodes otherwise."""


def load_policy(config: PolicyConfig, seed: int, device: torch.device, *, bf16: bool) -> DiffusersPolicy:
    """Return the policy that `config` describes. Raises `UserError` before the weights are read where it can."""
    settings = config.pipeline
    check_backend(settings.attention_backend, device)
    check_quantization(settings.quantization, QUANTIZATION)
    check_quantization(settings.text_encoder_quantization, ENCODER_QUANTIZATION)
    if device.type == "cuda" and device.index is not None:
        # Kernels of others, FSDP and NCCL take the current device for the one that is meant.
        torch.cuda.set_device(device)
    family = PIPELINES[config.kind]
    model = settings.model or MODELS[config.kind]
    check_model(model, family)  # the cheapest first: a file of a few lines, an adapter, the weights
    adapter = (
        None
        if settings.base_adapter is None
        else resolve_adapter(settings.base_adapter, "policy.pipeline.base_adapter")
    )
    folder = resolve_model(model, family)
    pipe = load_pipeline(folder, family, torch.bfloat16 if bf16 else torch.float32)
    if adapter is not None:
        if is_quantized(pipe.transformer):
            raise UserError(
                f"policy.pipeline.base_adapter: {folder} holds quantized weights, and nothing is merged into those; "
                "name the model before it was quantized, with policy.pipeline.quantization"
            )
        merge_base_adapter(pipe, adapter)
    quantize(pipe.transformer, settings.quantization, QUANTIZATION)
    for name in family.text_encoders:
        if isinstance(part := getattr(pipe, name), torch.nn.Module):
            quantize(part, settings.text_encoder_quantization, ENCODER_QUANTIZATION)
    guided = family.uses_cfg(pipe, family.guidance if settings.guidance_scale is None else settings.guidance_scale)
    encoders = settings.text_encoder_quantization
    stands_for = [
        ROW_FORMAT,
        config.kind,
        fingerprint(folder),
        bf16,
        guided,
        *([encoders] if encoders != "none" else []),
    ]
    depends_on = {name: inputs for name, inputs in family.depends_on.items() if guided or name != "negative"}
    limit = None if settings.cache_limit is None else settings.cache_limit * GIGABYTE
    cache = ConditionCache(settings.cache, json.dumps(stands_for), depends_on, limit)
    return DiffusersPolicy(family, pipe, cache, settings_of(config, device, seed))


def check_backend(name: str | None, device: torch.device) -> None:
    """Raise `UserError` for an attention backend that cannot train, or wants CUDA and the device is another."""
    if name is not None and (name == "_flash_3" or name.startswith(NO_BACKWARD)):
        raise UserError(
            f"policy.pipeline.attention_backend: '{name}' has no backward pass, and trains nothing; use "
            "_native_flash, flash or _flash_3_hub, or leave it out"
        )
    if name is not None and name.startswith(NEEDS_CUDA) and device.type != "cuda":
        raise UserError(
            f"policy.pipeline.attention_backend: '{name}' runs on CUDA, and the device is {device}; leave it out, or "
            "use policy.device=cuda"
        )


def settings_of(config: PolicyConfig, device: torch.device, seed: int) -> Settings:
    """Return the settings of a diffusers policy from `config`."""
    settings = config.pipeline
    return Settings(
        device=device,
        size=(settings.height, settings.width),
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        guidance=settings.guidance_scale,
        reference_side=settings.reference_side,
        offload=settings.text_encoders == "cpu",
        how=_how(settings),
        gradient_checkpointing=settings.gradient_checkpointing,
        keep_every=settings.keep_every,
        compile=settings.compile,
        attention_backend=settings.attention_backend,
        seed=seed,
    )


def _how(settings: PipelineConfig) -> How:
    if settings.block_offload:
        return "offload"
    # A command that runs in one process, such as generate, takes the configuration of a run of several.
    return "fsdp" if settings.fsdp and dist.is_initialized() else "whole"
