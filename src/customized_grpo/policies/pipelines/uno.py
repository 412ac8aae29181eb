"""UNO (arXiv 2504.02160) on FLUX.1-dev: several references, each placed where the last one ended on both axes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from torch import Tensor

from customized_grpo.policies.pipelines import flux1, schedule
from customized_grpo.policies.pipelines.encoded import EncodedPrompt, Inputs, Sizes, UniformBatch
from customized_grpo.policies.pipelines.resolution import to_longer_side
from customized_grpo.types import PromptLengths


class Uno:
    """A `diffusers_policy.PipelineSpec`. FLUX.1-dev has Kontext's components, so Kontext's pipeline holds them."""

    pipeline: Any = FluxKontextPipeline
    transformer: Any = FluxTransformer2DModel
    pipeline_names: tuple[str, ...] = ("FluxPipeline",)
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    lora_targets = flux1.LORA_TARGETS
    depends_on: Mapping[str, Inputs] = flux1.DEPENDS_ON
    max_references = 4
    guidance = 4.0
    reference_side = 512
    several_side = 320
    """UNO's own longer side of one reference, and of each of several."""

    def load_components(self, folder: str) -> dict[str, Any]:
        return {}

    def check_guidance(self, pipe: Any, guidance: float | None) -> None:
        flux1.check_guidance(pipe, guidance)

    def uses_cfg(self, pipe: Any, guidance: float) -> bool:
        return False  # it is embedded

    def reference_size(self, height: int, width: int, count: int, side: int | None) -> tuple[int, int]:
        return to_longer_side(height, width, side or (self.reference_side if count == 1 else self.several_side))

    def prompt_lengths(self, pipe: Any, prompts: Sequence[str]) -> PromptLengths:
        return flux1.prompt_lengths(pipe, prompts)

    def encode(
        self, pipe: Any, prompt: str, references: Sequence[Tensor], device: torch.device, *, guided: bool
    ) -> EncodedPrompt:
        return flux1.encode(pipe, prompt, references, device)

    def dummy_inputs(self, config: Any, sizes: Sizes, *, guided: bool) -> dict[str, Tensor]:
        return flux1.dummy_inputs(config, sizes)

    def sigmas(self, pipe: Any, num_steps: int, size: tuple[int, int]) -> Tensor:
        # UNO counts an image token for every 16 x 16 *latent* pixels, which shifts less than FLUX does.
        mu = calculate_shift(size[0] // 8 * (size[1] // 8) // 256, 256, 4096, 0.5, 1.15)
        return schedule.scheduler_sigmas(pipe.scheduler, num_steps, mu)

    def velocity(
        self,
        transformer: Any,
        latents: Tensor,
        sigma: Tensor,
        batch: UniformBatch,
        size: tuple[int, int],
        guidance: float,
    ) -> Tensor:
        return flux1.velocity(transformer, latents, sigma, batch, diagonal_ids(size, batch.sizes), guidance)

    def decode(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return flux1.decode(pipe, latents, size)


def diagonal_ids(size: tuple[int, int], references: Sizes) -> Tensor:
    """Return position ids [N + S, 3]: each reference begins, on both axes, at the end of the one before (`pe=d`)."""
    ids, row, column = [], 0, 0
    for height, width in (size, *references):
        ids.append(flux1.grid_ids(height, width, row=row, column=column))
        row, column = row + height // 16, column + width // 16
    return torch.cat(ids)


def is_fused(state: dict[str, Tensor]) -> bool:
    """Return whether `state` is a whole FLUX.1 transformer in the names of its first release, such as a merged UNO."""
    return "double_blocks.0.img_attn.qkv.weight" in state


def fused_to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a whole transformer, UNO merged in, in diffusers' names."""
    converted: dict[str, Tensor] = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    return converted
