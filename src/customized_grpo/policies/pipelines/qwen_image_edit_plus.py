"""Qwen-Image-Edit-Plus: several references, read by the text encoder too; classifier-free guidance, renormalised.

Shape legend: b samples, H x W image in pixels, N = H/16 * W/16 image tokens, S reference tokens, L text tokens, C
channels of a packed latent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE, calculate_dimensions
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from customized_grpo.data.images import to_pil
from customized_grpo.policies.pipelines import schedule
from customized_grpo.policies.pipelines.encoded import PROMPT, REFERENCES, EncodedPrompt, Inputs, Sizes, UniformBatch
from customized_grpo.policies.pipelines.resolution import sizes_of, to_area, token_count
from customized_grpo.runtime.qwen_vl import ImageTextProcessor

NEGATIVE_PROMPT = " "
PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"
"""Stands before the prompt for each reference."""


class QwenImageEditPlus:
    """A `diffusers_policy.PipelineSpec`."""

    pipeline: Any = QwenImageEditPlusPipeline
    transformer: Any = QwenImageTransformer2DModel
    pipeline_names: tuple[str, ...] = ("QwenImageEditPlusPipeline",)
    text_encoders: tuple[str, ...] = ("text_encoder",)
    lora_targets = (
        r"transformer_blocks\.\d+\.attn\."
        r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    )
    # The text encoder sees the references beside either prompt.
    depends_on: Mapping[str, Inputs] = {
        "text": (PROMPT, REFERENCES), "negative": (REFERENCES,), "reference": (REFERENCES,),
    }  # fmt: skip
    max_references = 3
    guidance = 4.0
    reference_side = 1024

    def load_components(self, folder: str) -> dict[str, Any]:
        tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer", trust_remote_code=False)
        pictures = Qwen2VLImageProcessorPil.from_pretrained(folder, subfolder="processor")
        return {"tokenizer": tokenizer, "processor": ImageTextProcessor(pictures, tokenizer)}

    def check_guidance(self, pipe: Any, guidance: float | None) -> None:
        """Accept any guidance: it is classifier-free, and 1 switches it off."""

    def uses_cfg(self, pipe: Any, guidance: float) -> bool:
        return guidance > 1

    def reference_size(self, height: int, width: int, count: int, side: int | None) -> tuple[int, int]:
        return to_area(height, width, (side or self.reference_side) ** 2, multiple=32)

    def prompt_lengths(self, pipe: Any, prompts: Sequence[str]) -> None:
        """Return None: the pipeline truncates nothing."""

    def encode(
        self, pipe: Any, prompt: str, references: Sequence[Tensor], device: torch.device, *, guided: bool
    ) -> EncodedPrompt:
        pictures = [_seen_by_text_encoder(pipe, reference) for reference in references]
        tensors = {"text": _embed(pipe, prompt, pictures, device)}
        if guided:
            tensors["negative"] = _embed(pipe, NEGATIVE_PROMPT, pictures, device)
        tokens = torch.cat([_reference_tokens(pipe, reference) for reference in references])
        return EncodedPrompt(tensors | {"reference": tokens}, sizes_of(references))

    def dummy_inputs(self, config: Any, sizes: Sizes, *, guided: bool) -> dict[str, Tensor]:
        # A reference takes about 188 tokens of the text encoder's, a prompt some 60.
        length = 188 * len(sizes) + 60
        with torch.device("meta"):
            words = {
                name: torch.empty(length, config.joint_attention_dim)
                for name in (["text", "negative"] if guided else ["text"])
            }
            return words | {"reference": torch.empty(token_count(sizes), config.in_channels)}

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
        positive = _predict(transformer, latents, sigma, batch, size, "text")
        if "negative" not in batch.tensors:
            return positive
        negative = _predict(transformer, latents, sigma, batch, size, "negative")
        combined = negative + guidance * (positive - negative)
        return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def decode(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Decode packed latents [b, N, C] to images [b, 3, H, W], about [-1, 1]."""
        grid = pipe._unpack_latents(latents.to(pipe.vae.dtype), *size, pipe.vae_scale_factor)
        mean, std = (
            torch.tensor(values, dtype=grid.dtype, device=grid.device).view(1, -1, 1, 1, 1)
            for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        images: Tensor = pipe.vae.decode(grid * std + mean, return_dict=False)[0][:, :, 0]
        return images


def _seen_by_text_encoder(pipe: Any, reference: Tensor) -> Any:
    """Return a picture in the size in which the pipeline shows it to the text encoder."""
    width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, reference.shape[-1] / reference.shape[-2])
    return pipe.image_processor.resize(to_pil(reference), height, width)


def _embed(pipe: Any, prompt: str, pictures: Sequence[Any], device: torch.device) -> Tensor:
    """Return a prompt after its pictures as the text encoder's last states [L, D], without those of the instruction.

    The pipeline's `encode_prompt` does the same but for the tokens' types, which it does not hand on: without them the
    encoder takes a picture's tokens for words in a row, where the weights were trained with rows and columns
    (https://github.com/huggingface/diffusers/issues/14194).
    """
    shown = "".join(PICTURE.format(number) for number in range(1, len(pictures) + 1))
    text = pipe.prompt_template_encode.format(shown + prompt)
    inputs = pipe.processor(text=[text], images=list(pictures), return_tensors="pt").to(device)
    states: Tensor = pipe.text_encoder(**inputs, output_hidden_states=True).hidden_states[-1]
    return states[0, pipe.prompt_template_encode_start_idx :]


def _reference_tokens(pipe: Any, reference: Tensor) -> Tensor:
    """Return a picture [3, h, w] in [0, 1] as tokens [h/16 * w/16, C]."""
    pixels = (2 * reference[None, :, None] - 1).to(pipe.vae.device, pipe.vae.dtype)
    latents = pipe._encode_vae_image(pixels, generator=None)
    return pipe._pack_latents(latents, 1, latents.shape[1], *latents.shape[3:])[0]


def _predict(
    transformer: Any, latents: Tensor, sigma: Tensor, batch: UniformBatch, size: tuple[int, int], text: str
) -> Tensor:
    """Return velocity [b, N, C] under the text named `text` of the batch."""
    words = batch[text]
    grids = [(1, height // 16, width // 16) for height, width in (size, *batch.sizes)]
    predicted: Tensor = transformer(
        hidden_states=torch.cat([latents.to(words.dtype), batch["reference"]], dim=1),
        timestep=schedule.timestep(sigma, words),
        encoder_hidden_states=words,
        img_shapes=[grids] * len(latents),
        return_dict=False,
    )[0]
    return predicted[:, : latents.shape[1]]
