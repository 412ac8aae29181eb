"""FLUX.2 [dev], and the parts that it shares with [klein]: several references, separated by the first of four position
axes.

Shape legend: b samples, H x W image in pixels, N = H/16 * W/16 image tokens, S reference tokens, L text tokens, C
channels of a packed latent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor
from transformers import AutoTokenizer

from customized_grpo.policies.pipelines import flux1, schedule
from customized_grpo.policies.pipelines.encoded import PROMPT, REFERENCES, EncodedPrompt, Inputs, Sizes, UniformBatch
from customized_grpo.policies.pipelines.resolution import sizes_of, to_area, token_count
from customized_grpo.types import PromptLengths

LORA_TARGETS = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
MAX_REFERENCES = 10
TEXT_TOKENS = 512
"""Tokens of a prompt in its template that the pipelines take."""
LARGEST_REFERENCE = 1024
"""The pipelines scale references down to the area of a square of this side."""


class Flux2:
    """A `diffusers_policy.PipelineSpec`. Guidance is embedded; a Mistral reads the prompt."""

    pipeline: Any = Flux2Pipeline
    transformer: Any = Flux2Transformer2DModel
    pipeline_names: tuple[str, ...] = ("Flux2Pipeline",)
    text_encoders: tuple[str, ...] = ("text_encoder",)
    lora_targets = LORA_TARGETS
    depends_on: Mapping[str, Inputs] = {"text": (PROMPT,), "reference": (REFERENCES,)}
    max_references = MAX_REFERENCES
    guidance = 4.0

    def load_components(self, folder: str) -> dict[str, Any]:
        # The pipeline's processor can read pictures too, for which it needs torchvision; prompts need its tokenizer.
        return {"tokenizer": AutoTokenizer.from_pretrained(folder, subfolder="tokenizer", trust_remote_code=False)}

    def check_guidance(self, pipe: Any, guidance: float | None) -> None:
        flux1.check_guidance(pipe, guidance)

    def uses_cfg(self, pipe: Any, guidance: float) -> bool:
        return False  # it is embedded

    def reference_size(self, height: int, width: int, count: int, side: int | None) -> tuple[int, int]:
        return reference_size(height, width, side)

    def prompt_lengths(self, pipe: Any, prompts: Sequence[str]) -> PromptLengths:
        talks = format_input(prompts=list(prompts), system_message=pipe.system_message)
        texts = pipe.tokenizer.apply_chat_template(talks, add_generation_prompt=False, tokenize=False)
        return text_lengths(pipe, texts)

    def encode(
        self, pipe: Any, prompt: str, references: Sequence[Tensor], device: torch.device, *, guided: bool
    ) -> EncodedPrompt:
        text, _ = pipe.encode_prompt([prompt], device=device, max_sequence_length=TEXT_TOKENS)
        return EncodedPrompt({"text": text[0], "reference": reference_tokens(pipe, references)}, sizes_of(references))

    def dummy_inputs(self, config: Any, sizes: Sizes, *, guided: bool) -> dict[str, Tensor]:
        return dummy_inputs(config, sizes, ["text"])

    def sigmas(self, pipe: Any, num_steps: int, size: tuple[int, int]) -> Tensor:
        return pipeline_sigmas(pipe, num_steps, size)

    def velocity(
        self,
        transformer: Any,
        latents: Tensor,
        sigma: Tensor,
        batch: UniformBatch,
        size: tuple[int, int],
        guidance: float,
    ) -> Tensor:
        embedded = schedule.embedded_guidance(guidance, latents)
        return predict(transformer, latents, sigma, batch, size, "text", embedded)

    def decode(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return decode(pipe, latents, size)


def reference_size(height: int, width: int, side: int | None) -> tuple[int, int]:
    """Return about the size that the pipelines use: a picture keeps its size, up to the largest area."""
    return to_area(height, width, side**2 if side else min(height * width, LARGEST_REFERENCE**2))


def reference_tokens(pipe: Any, references: Sequence[Tensor]) -> Tensor:
    """Encode pictures [3, h, w] in [0, 1] as tokens [S, C], normalized by the VAE's batch norm."""
    tokens = []
    for reference in references:
        latents = pipe._encode_vae_image((2 * reference[None] - 1).to(pipe.vae.device, pipe.vae.dtype), generator=None)
        tokens.append(pipe._pack_latents(latents)[0])
    return torch.cat(tokens)


def text_lengths(pipe: Any, texts: Sequence[str]) -> PromptLengths:
    """Return the lengths of prompts in their template."""
    tokens = pipe.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return PromptLengths([len(each) for each in tokens], TEXT_TOKENS)


def dummy_inputs(config: Any, sizes: Sizes, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return tensors like those of `encode`, on the meta device."""
    with torch.device("meta"):
        words = {name: torch.empty(TEXT_TOKENS, config.joint_attention_dim) for name in texts}
        return words | {"reference": torch.empty(token_count(sizes), config.in_channels)}


def pipeline_sigmas(pipe: Any, num_steps: int, size: tuple[int, int]) -> Tensor:
    """Return the pipelines' schedule [num_steps + 1], shifted by a fit over image tokens and steps."""
    return schedule.scheduler_sigmas(pipe.scheduler, num_steps, compute_empirical_mu(token_count([size]), num_steps))


def token_ids(size: tuple[int, int], references: Sizes) -> Tensor:
    """Return position ids [N + S, 4]: (time, row, column, text). The image's time is 0, the references' 10, 20, ..."""
    times = range(0, 10 * len(references) + 1, 10)
    grids = [
        torch.cartesian_prod(
            torch.tensor([time]), torch.arange(height // 16), torch.arange(width // 16), torch.tensor([0])
        )
        for time, (height, width) in zip(times, (size, *references), strict=True)
    ]
    return torch.cat(grids)


def predict(
    transformer: Any,
    latents: Tensor,
    sigma: Tensor,
    batch: UniformBatch,
    size: tuple[int, int],
    text: str,
    guidance: Tensor | None,
) -> Tensor:
    """Predict the velocity [b, N, C] of `latents` [b, N, C] at `sigma` [b], given the batch's text named `text`."""
    words = batch[text]
    hidden = torch.cat([latents.to(words.dtype), batch["reference"]], dim=1)
    text_ids = torch.nn.functional.pad(torch.arange(words.shape[1])[:, None], (3, 0))
    predicted: Tensor = transformer(
        hidden_states=hidden,
        timestep=schedule.timestep(sigma, words),
        guidance=guidance,
        encoder_hidden_states=words,
        txt_ids=text_ids.to(latents.device),
        img_ids=token_ids(size, batch.sizes).to(latents.device),
        return_dict=False,
    )[0]
    return predicted[:, : latents.shape[1]]


def decode(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Decode packed latents [b, N, C] to images [b, 3, H, W], about [-1, 1]."""
    norm = pipe.vae.bn
    spread = torch.sqrt(norm.running_var + pipe.vae.config.batch_norm_eps)
    packed = latents.to(pipe.vae.dtype) * spread + norm.running_mean
    grid = packed.transpose(1, 2).unflatten(2, (size[0] // 16, size[1] // 16))
    images: Tensor = pipe.vae.decode(pipe._unpatchify_latents(grid), return_dict=False)[0]
    return images
