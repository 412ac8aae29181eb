"""FLUX.1 Kontext: one reference, whose tokens follow the image's and whose ids have 1 on their first axis."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from torch import Tensor

from customized_grpo.policies.pipelines import flux1, schedule
from customized_grpo.policies.pipelines.encoded import EncodedPrompt, Inputs, Sizes, UniformBatch
from customized_grpo.policies.pipelines.resolution import to_area, token_count
from customized_grpo.types import PromptLengths


class Flux1Kontext:
    """A `diffusers_policy.PipelineSpec`."""

    pipeline: Any = FluxKontextPipeline
    transformer: Any = FluxTransformer2DModel
    pipeline_names: tuple[str, ...] = ("FluxKontextPipeline",)
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    lora_targets = flux1.LORA_TARGETS
    depends_on: Mapping[str, Inputs] = flux1.DEPENDS_ON
    max_references = 1
    guidance = 3.5
    reference_side = 1024

    def load_components(self, folder: str) -> dict[str, Any]:
        return {}

    def check_guidance(self, pipe: Any, guidance: float | None) -> None:
        flux1.check_guidance(pipe, guidance)

    def uses_cfg(self, pipe: Any, guidance: float) -> bool:
        return False  # it is embedded

    def reference_size(self, height: int, width: int, count: int, side: int | None) -> tuple[int, int]:
        return to_area(height, width, (side or self.reference_side) ** 2)

    def prompt_lengths(self, pipe: Any, prompts: Sequence[str]) -> PromptLengths:
        return flux1.prompt_lengths(pipe, prompts)

    def encode(
        self, pipe: Any, prompt: str, references: Sequence[Tensor], device: torch.device, *, guided: bool
    ) -> EncodedPrompt:
        return flux1.encode(pipe, prompt, references, device)

    def dummy_inputs(self, config: Any, sizes: Sizes, *, guided: bool) -> dict[str, Tensor]:
        return flux1.dummy_inputs(config, sizes)

    def sigmas(self, pipe: Any, num_steps: int, size: tuple[int, int]) -> Tensor:
        return schedule.pipeline_sigmas(pipe, num_steps, token_count([size]))

    def velocity(
        self,
        transformer: Any,
        latents: Tensor,
        sigma: Tensor,
        batch: UniformBatch,
        size: tuple[int, int],
        guidance: float,
    ) -> Tensor:
        ids = torch.cat([flux1.grid_ids(*size), flux1.grid_ids(*batch.sizes[0], first=1)])
        return flux1.velocity(transformer, latents, sigma, batch, ids, guidance)

    def decode(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return flux1.decode(pipe, latents, size)
