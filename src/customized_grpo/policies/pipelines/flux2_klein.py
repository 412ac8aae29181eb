"""FLUX.2 [klein]: FLUX.2's tokens; a Qwen3 reads the prompt, and guidance is classifier-free, or distilled away."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.policies.pipelines import flux2
from customized_grpo.policies.pipelines.encoded import PROMPT, REFERENCES, EncodedPrompt, Inputs, Sizes, UniformBatch
from customized_grpo.policies.pipelines.resolution import sizes_of
from customized_grpo.types import PromptLengths


class Flux2Klein:
    """A `diffusers_policy.PipelineSpec`."""

    pipeline: Any = Flux2KleinPipeline
    transformer: Any = Flux2Transformer2DModel
    pipeline_names: tuple[str, ...] = ("Flux2KleinPipeline",)
    text_encoders: tuple[str, ...] = ("text_encoder",)
    lora_targets = flux2.LORA_TARGETS
    depends_on: Mapping[str, Inputs] = {"text": (PROMPT,), "negative": (), "reference": (REFERENCES,)}
    max_references = flux2.MAX_REFERENCES
    guidance = 4.0

    def load_components(self, folder: str) -> dict[str, Any]:
        return {}

    def check_guidance(self, pipe: Any, guidance: float | None) -> None:
        """Raise `UserError` for guidance if distillation removed it from the generator."""
        if pipe.config.is_distilled and guidance not in (None, 1.0):
            raise UserError(
                f"policy.pipeline.guidance_scale: this model is distilled and takes none, found {guidance}; leave it "
                "out, or name a base model (FLUX.2-klein-base) in policy.pipeline.model"
            )

    def uses_cfg(self, pipe: Any, guidance: float) -> bool:
        return guidance > 1 and not pipe.config.is_distilled

    def reference_size(self, height: int, width: int, count: int, side: int | None) -> tuple[int, int]:
        return flux2.reference_size(height, width, side)

    def prompt_lengths(self, pipe: Any, prompts: Sequence[str]) -> PromptLengths:
        talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = pipe.tokenizer.apply_chat_template(
            talks, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        return flux2.text_lengths(pipe, texts)

    def encode(
        self, pipe: Any, prompt: str, references: Sequence[Tensor], device: torch.device, *, guided: bool
    ) -> EncodedPrompt:
        most = {"max_sequence_length": flux2.TEXT_TOKENS}
        tensors = {"text": pipe.encode_prompt([prompt], device=device, **most)[0][0]}
        if guided:
            tensors["negative"] = pipe.encode_prompt([""], device=device, **most)[0][0]
        return EncodedPrompt(tensors | {"reference": flux2.reference_tokens(pipe, references)}, sizes_of(references))

    def dummy_inputs(self, config: Any, sizes: Sizes, *, guided: bool) -> dict[str, Tensor]:
        return flux2.dummy_inputs(config, sizes, ["text", "negative"] if guided else ["text"])

    def sigmas(self, pipe: Any, num_steps: int, size: tuple[int, int]) -> Tensor:
        return flux2.pipeline_sigmas(pipe, num_steps, size)

    def velocity(
        self,
        transformer: Any,
        latents: Tensor,
        sigma: Tensor,
        batch: UniformBatch,
        size: tuple[int, int],
        guidance: float,
    ) -> Tensor:
        positive = flux2.predict(transformer, latents, sigma, batch, size, "text", None)
        if "negative" not in batch.tensors:
            return positive
        negative = flux2.predict(transformer, latents, sigma, batch, size, "negative", None)
        return negative + guidance * (positive - negative)

    def decode(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return flux2.decode(pipe, latents, size)
