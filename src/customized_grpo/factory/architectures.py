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
    ),
    "black-forest-labs/FLUX.2-dev": Architecture("AutoencoderKLFlux2", schedule=DEV_SCHEDULE),
    "Qwen/Qwen-Image-Edit-2511": Architecture(
        "AutoencoderKLQwenImage", {"zero_cond_t": True}, schedule=QWEN_SCHEDULE
    ),
}  # fmt: skip
"""By hub id."""


def cached_folder(model: str) -> Path | None:
    """Return the folder with the configurations of the hub id `model`, if an earlier download left them all here."""
    paths = [try_to_load_from_cache(model, name) for name in FILES]
    return Path(paths[0]).parent if all(isinstance(path, str) for path in paths) else None  # type: ignore[arg-type]


def outline_known(architecture: Architecture, family: PipelineSpec, dtype: torch.dtype) -> Any:
    """Return the pipeline of `family` with transformer and VAE on the meta device, and without its text encoders."""
    with torch.device("meta"):
        transformer = family.transformer(**architecture.transformer).to(dtype)
        vae = getattr(diffusers, architecture.vae)(**architecture.vae_settings).to(dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(**architecture.schedule)
    return with_parts(family, {"transformer": transformer, "vae": vae, "scheduler": scheduler})


def with_parts(family: PipelineSpec, parts: Mapping[str, Any], plain: Mapping[str, Any] | None = None) -> Any:
    """Return the pipeline of `family` with `parts` and `plain` settings, and None for every other part that it
    takes."""
    wanted = inspect.signature(family.pipeline.__init__).parameters
    absent = {name: None for name, each in wanted.items() if name != "self" and each.default is each.empty}
    return family.pipeline(**absent | dict(plain or {}) | dict(parts))
