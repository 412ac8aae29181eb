"""The architectures of the models that the recipes name, so that a dry run needs neither network nor weights.

They are facts of the models' configuration files. Where those files are on the machine, they are read instead.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import try_to_load_from_cache

from customized_grpo.policies.loading import INDEX
from customized_grpo.policies.pipelines.spec import PipelineSpec

FILES = (INDEX, "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
"""What a dry run reads of a pipeline."""
DEV_SCHEDULE = {"shift": 3.0, "use_dynamic_shifting": True}
QWEN_SCHEDULE = {
    "use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Settings of a pipeline's parts, beyond what are defaults of their classes."""

    vae: str
    """Name of its class in diffusers."""
    transformer: Mapping[str, Any] = field(default_factory=dict)
    vae_settings: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    text_encoders: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    """By the part's name: its class in transformers, and settings beyond the defaults of that class's configuration."""


CLIP_L: tuple[str, dict[str, Any]] = (
    "CLIPTextModel",
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
)
T5_XXL: tuple[str, dict[str, Any]] = (
    "T5EncoderModel",
    {
        "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
)  # fmt: skip
QWEN3_4B: tuple[str, dict[str, Any]] = (
    "Qwen3ForCausalLM",
    {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
)  # fmt: skip
QWEN25_VL_7B: tuple[str, dict[str, Any]] = (
    "Qwen2_5_VLForConditionalGeneration",
    {
        "text_config": {
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4,
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        },
        "tie_word_embeddings": False,
    },
)  # fmt: skip
MISTRAL_SMALL_24B: tuple[str, dict[str, Any]] = (
    "Mistral3ForConditionalGeneration",
    {
        "text_config": {
            "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
            "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        },
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 1540, "patch_size": 14,
        },
        "tie_word_embeddings": False,
    },
)  # fmt: skip
_FLUX1 = Architecture(
    "AutoencoderKL",
    {"guidance_embeds": True},
    {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
        "latent_channels": 16, "shift_factor": 0.1159, "scaling_factor": 0.3611, "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    DEV_SCHEDULE,
    {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
)  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {
    "black-forest-labs/FLUX.1-Kontext-dev": _FLUX1,
    "black-forest-labs/FLUX.1-dev": _FLUX1,
    "black-forest-labs/FLUX.2-klein-base-4B": Architecture(
        "AutoencoderKLFlux2",
        {
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        schedule=DEV_SCHEDULE,
        text_encoders={"text_encoder": QWEN3_4B},
    ),
    "black-forest-labs/FLUX.2-dev": Architecture(
        "AutoencoderKLFlux2", schedule=DEV_SCHEDULE, text_encoders={"text_encoder": MISTRAL_SMALL_24B}
    ),
    "Qwen/Qwen-Image-Edit-2511": Architecture(
        "AutoencoderKLQwenImage", {"zero_cond_t": True}, schedule=QWEN_SCHEDULE,
        text_encoders={"text_encoder": QWEN25_VL_7B},
    ),
}  # fmt: skip
"""By hub id."""


def cached_folder(model: str) -> Path | None:
    """Return the folder with the configurations of the hub id `model`, if an earlier download left them all here."""
    paths = [try_to_load_from_cache(model, name) for name in FILES]
    return Path(paths[0]).parent if all(isinstance(path, str) for path in paths) else None  # type: ignore[arg-type]


def outline_known(architecture: Architecture, family: PipelineSpec, dtype: torch.dtype) -> Any:
    """Return the pipeline of `family` with transformer, VAE and text encoders on the meta device."""
    with torch.device("meta"):
        parts = {
            "transformer": family.transformer(**architecture.transformer).to(dtype),
            "vae": getattr(diffusers, architecture.vae)(**architecture.vae_settings).to(dtype),
        }
    for name, (kind, settings) in architecture.text_encoders.items():
        parts[name] = outline_encoder(kind, settings, dtype)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(**architecture.schedule)
    return with_parts(family, parts)


def outline_encoder(kind: str, settings: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return a text encoder on the meta device: of the class `kind` of transformers, with `settings` of its
    configuration."""
    made = getattr(transformers, kind)
    with torch.device("meta"):
        return made(made.config_class.from_dict(dict(settings))).to(dtype)


def with_parts(family: PipelineSpec, parts: Mapping[str, Any], plain: Mapping[str, Any] | None = None) -> Any:
    """Return the pipeline of `family` with `parts` and `plain` settings, and None for every other part that it
    takes."""
    wanted = inspect.signature(family.pipeline.__init__).parameters
    absent = {name: None for name, each in wanted.items() if name != "self" and each.default is each.empty}
    return family.pipeline(**absent | dict(plain or {}) | dict(parts))
