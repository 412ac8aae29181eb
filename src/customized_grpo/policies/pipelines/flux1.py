"""What FLUX.1's generators share: text, latents and the transformer's call.

Shape legend: b samples, H x W image in pixels, N = H/16 * W/16 image tokens, S reference tokens, L text tokens, C
channels of a packed latent.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.policies.pipelines import schedule
from customized_grpo.policies.pipelines.encoded import PROMPT, REFERENCES, EncodedPrompt, Inputs, Sizes, UniformBatch
from customized_grpo.policies.pipelines.resolution import sizes_of, token_count
from customized_grpo.types import PromptLengths

LORA_TARGETS = (
    r"(transformer_blocks|single_transformer_blocks)\.\d+\."
    r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)|proj_out)"
)
"""The projections of all attentions, and of a single block its output: those that UNO's and the paper's LoRA change.

Theirs has one `down` factor for query, key and value; here each has its own."""
DEPENDS_ON: dict[str, Inputs] = {"text": (PROMPT,), "pooled": (PROMPT,), "reference": (REFERENCES,)}
TEXT_TOKENS = 512
"""Tokens of T5 that the pipelines take."""


def check_guidance(pipe: Any, guidance: float | None) -> None:
    """Raise `UserError` for guidance of a transformer that embeds none."""
    if guidance is not None and not pipe.transformer.config.guidance_embeds:
        raise UserError(
            f"policy.pipeline.guidance_scale: this model embeds no guidance, found {guidance}; leave it out, or name "
            "a model that does"
        )


def prompt_lengths(pipe: Any, prompts: Sequence[str]) -> PromptLengths:
    """Return lengths in tokens of T5. CLIP, which reads 77 of its own tokens, only adds a summary."""
    tokens = pipe.tokenizer_2(list(prompts), verbose=False)["input_ids"]
    return PromptLengths([len(each) for each in tokens], TEXT_TOKENS)


def encode(pipe: Any, prompt: str, references: Sequence[Tensor], device: torch.device) -> EncodedPrompt:
    """Encode `text` [L, D] by T5, `pooled` [D'] by CLIP, and the `reference` tokens [S, C]."""
    text, pooled, _ = pipe.encode_prompt(prompt=[prompt], device=device, max_sequence_length=TEXT_TOKENS)
    tokens = torch.cat([_reference_tokens(pipe, reference) for reference in references])
    return EncodedPrompt({"text": text[0], "pooled": pooled[0], "reference": tokens}, sizes_of(references))


def _reference_tokens(pipe: Any, reference: Tensor) -> Tensor:
    """Encode a picture [3, h, w] in [0, 1] as tokens [h/16 * w/16, C]: the VAE's latent mode, scaled and packed."""
    pixels = (2 * reference[None] - 1).to(pipe.vae.device, pipe.vae.dtype)
    latents = pipe._encode_vae_image(pixels, generator=None)
    return pipe._pack_latents(latents, 1, *latents.shape[1:])[0]


def dummy_inputs(config: Any, sizes: Sizes) -> dict[str, Tensor]:
    """Return tensors like those of `encode`, on the meta device."""
    tokens = token_count(sizes)
    with torch.device("meta"):
        return {
            "text": torch.empty(TEXT_TOKENS, config.joint_attention_dim),
            "pooled": torch.empty(config.pooled_projection_dim),
            "reference": torch.empty(tokens, config.in_channels),
        }


def grid_ids(height: int, width: int, *, first: int = 0, row: int = 0, column: int = 0) -> Tensor:
    """Return position ids [h * w, 3] float32 of a grid of tokens of `height` x `width` pixels, whose corner is at
    (`first`, `row`, `column`)."""
    ids = FluxKontextPipeline._prepare_latent_image_ids(1, height // 16, width // 16, "cpu", torch.float32)
    return ids + torch.tensor([float(first), float(row), float(column)])


def velocity(
    transformer: Any, latents: Tensor, sigma: Tensor, batch: UniformBatch, ids: Tensor, guidance: float
) -> Tensor:
    """Predict the velocity [b, N, C] of `latents` [b, N, C] at `sigma` [b].

    `ids` [N + S, 3] are the positions of the image's tokens and of the references' tokens, which follow them.
    """
    text = batch["text"]
    embedded = schedule.embedded_guidance(guidance, latents) if transformer.config.guidance_embeds else None
    predicted: Tensor = transformer(
        hidden_states=torch.cat([latents.to(text.dtype), batch["reference"]], dim=1),
        timestep=schedule.timestep(sigma, text),
        guidance=embedded,
        pooled_projections=batch["pooled"],
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3, device=latents.device),
        img_ids=ids.to(latents.device),
        return_dict=False,
    )[0]
    return predicted[:, : latents.shape[1]]


def decode(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Decode packed latents [b, N, C] to images [b, 3, H, W], about [-1, 1]."""
    config = pipe.vae.config
    unpacked = pipe._unpack_latents(latents.to(pipe.vae.dtype), *size, pipe.vae_scale_factor)
    images: Tensor = pipe.vae.decode(unpacked / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    return images
