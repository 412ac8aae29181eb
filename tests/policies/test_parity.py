"""Parity with diffusers: our deterministic sampler, with a pipeline's own schedule, draws the pipeline's own image."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from torch import Tensor

from customized_grpo.algorithm import ode_step
from customized_grpo.data.images import to_pil
from customized_grpo.factory.pipelines import PIPELINES
from customized_grpo.policies.diffusers_policy import DiffusersPolicy
from customized_grpo.policies.pipelines.qwen_image_edit_plus import _seen_by_text_encoder

Load = Callable[..., DiffusersPolicy]
PROMPT = "a toy cat on the beach"
SIZE = (64, 96)
STEPS = 3
CLOSE = {"atol": 1e-4, "rtol": 0.0}


def draw(policy: DiffusersPolicy, references: Sequence[Tensor], noise: Tensor) -> Tensor:
    """An image [1, 3, H, W] by plain Euler steps down the generator's own schedule."""
    prepared = [policy.prepare_reference(reference, len(references)) for reference in references]
    condition = policy.encode([PROMPT], [prepared])
    x = noise
    with torch.no_grad():
        for sigma, sigma_next in pairwise(policy.sigmas(STEPS, None)):
            x = ode_step(x, policy.velocity(x, sigma.expand(1), condition), sigma, sigma_next)
    return policy.decode(x)


def plain_pipeline(kind: str, folder: Path) -> Any:
    family = PIPELINES[kind]
    return family.pipeline.from_pretrained(folder, **family.load_components(str(folder)))


def with_token_types(encoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    types = (kwargs["input_ids"] == encoder.config.image_token_id).int()
    assert types.sum() > 1
    return args, kwargs | {"mm_token_type_ids": types}


def noise_for(policy: DiffusersPolicy) -> Tensor:
    return torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(3))


def from_pipeline(pipe: Any, references: Sequence[Tensor], noise: Tensor, **more: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    images: Tensor = pipe(
        image=[to_pil(reference) for reference in references], prompt=PROMPT, height=SIZE[0], width=SIZE[1],
        num_inference_steps=STEPS, latents=noise, output_type="pt", **more,
    ).images  # fmt: skip
    return images


def test_flux1_kontext(load: Load, tiny_models: dict[str, Path], picture: Callable[..., Tensor]) -> None:
    policy, reference = load("flux1-kontext"), picture(64, 64)
    noise = noise_for(policy)
    pipe = plain_pipeline("flux1-kontext", tiny_models["flux1-kontext"])
    image = from_pipeline(pipe, [reference], noise, max_area=SIZE[0] * SIZE[1], _auto_resize=False)
    assert image.std() > 0.05
    assert torch.allclose(draw(policy, [reference], noise), image, **CLOSE)


@pytest.mark.parametrize("guidance", [2.0, 5.0])
def test_guidance_is_the_pipelines(
    guidance: float, load: Load, tiny_models: dict[str, Path], picture: Callable[..., Tensor]
) -> None:
    policy, reference = load("flux1-kontext", guidance_scale=guidance), picture(64, 64)
    noise = noise_for(policy)
    pipe = plain_pipeline("flux1-kontext", tiny_models["flux1-kontext"])
    settings = {"max_area": SIZE[0] * SIZE[1], "_auto_resize": False}
    image = from_pipeline(pipe, [reference], noise, guidance_scale=guidance, **settings)
    assert torch.allclose(draw(policy, [reference], noise), image, **CLOSE)
    other = from_pipeline(pipe, [reference], noise, guidance_scale=guidance + 1, **settings)
    assert not torch.allclose(image, other, **CLOSE)


@pytest.mark.parametrize("kind", ["flux2", "flux2-klein"])
@pytest.mark.parametrize("sizes", [[(64, 64)], [(64, 96), (80, 64)]], ids=["one", "two"])
def test_flux2(
    kind: str,
    sizes: list[tuple[int, int]],
    load: Load,
    tiny_models: dict[str, Path],
    picture: Callable[..., Tensor],
) -> None:
    policy = load(kind, reference_side=None)
    references = [picture(*size, seed) for seed, size in enumerate(sizes)]
    noise = noise_for(policy)
    # The pipeline wants the noise as a grid [1, C, H/16, W/16].
    grid = noise.transpose(1, 2).unflatten(2, (SIZE[0] // 16, SIZE[1] // 16))
    image = from_pipeline(plain_pipeline(kind, tiny_models[kind]), references, grid)
    assert image.std() > 0.05
    assert torch.allclose(draw(policy, references, noise), image, **CLOSE)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("count", [1, 2])
def test_qwen_image_edit_plus(
    count: int,
    guidance: float,
    load: Load,
    tiny_models: dict[str, Path],
    picture: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    policy = load("qwen-image-edit-plus", guidance_scale=guidance)
    references = [picture(64, 64, seed) for seed in range(count)]
    noise = noise_for(policy)
    pipe = plain_pipeline("qwen-image-edit-plus", tiny_models["qwen-image-edit-plus"])
    # The pipeline forgets to say which tokens are a picture's (huggingface/diffusers#14194).
    pipe.text_encoder.register_forward_pre_hook(with_token_types, with_kwargs=True)
    more = {"true_cfg_scale": guidance, "negative_prompt": " "} if guidance > 1 else {"true_cfg_scale": 1.0}
    image = from_pipeline(pipe, references, noise, **more)
    assert image.std() > 0.05
    assert torch.allclose(draw(policy, references, noise), image, **CLOSE)


def test_qwen_reads_pictures_by_rows_and_columns(
    load: Load, tiny_models: dict[str, Path], picture: Callable[..., Tensor]
) -> None:
    """The image hardly shows it at this size."""
    policy, references = load("qwen-image-edit-plus"), [picture(64, 64), picture(48, 64, 1)]
    pipe = plain_pipeline("qwen-image-edit-plus", tiny_models["qwen-image-edit-plus"])
    seen = [_seen_by_text_encoder(pipe, reference) for reference in references]
    read = policy.encode([PROMPT], [references]).rows[0].tensors["text"]
    with torch.no_grad():
        in_a_row = pipe.encode_prompt(PROMPT, image=seen)[0][0]
        pipe.text_encoder.register_forward_pre_hook(with_token_types, with_kwargs=True)
        in_place = pipe.encode_prompt(PROMPT, image=seen)[0][0]
    assert torch.allclose(read, in_place, atol=1e-5)
    assert (read - in_a_row).abs().max() > 0.1


@pytest.mark.parametrize("sizes", [[(64, 64)], [(64, 48), (32, 64)]], ids=["one", "two"])
def test_uno(
    sizes: list[tuple[int, int]], load: Load, tiny_models: dict[str, Path], picture: Callable[..., Tensor]
) -> None:
    """Against UNO's sampler written out: reference tokens after the image's, ids on from its lower right corner."""
    policy = load("uno", reference_side=64)
    references = [picture(*size, seed) for seed, size in enumerate(sizes)]
    noise = noise_for(policy)
    pipe = FluxKontextPipeline.from_pretrained(tiny_models["uno"])
    text, pooled, text_ids = pipe.encode_prompt(PROMPT)
    ids, tokens, start = [_grid(*SIZE, 0, 0)], [], [SIZE[0] // 16, SIZE[1] // 16]
    for reference in references:
        latent = pipe.vae.encode(2 * reference[None] - 1).latent_dist.mode()
        latent = (latent - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        height, width = latent.shape[2] // 2, latent.shape[3] // 2
        split = latent.reshape(1, -1, height, 2, width, 2)
        tokens.append(split.permute(0, 2, 4, 1, 3, 5).reshape(1, height * width, -1))
        ids.append(_grid(*reference.shape[1:], *start))
        start = [start[0] + height, start[1] + width]
    # UNO's mu of 64 x 96 pixels: 8 x 12 latent pixels, an integer share of 16 x 16 ones.
    shift = torch.tensor(0.5 - 256 * (1.15 - 0.5) / (4096 - 256)).exp()
    sigmas = torch.linspace(1, 0, STEPS + 1)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    x = noise
    with torch.no_grad():
        for sigma, sigma_next in pairwise(sigmas):
            velocity = pipe.transformer(
                hidden_states=torch.cat([x, *tokens], 1), timestep=sigma[None], guidance=torch.tensor([4.0]),
                pooled_projections=pooled, encoder_hidden_states=text, txt_ids=text_ids, img_ids=torch.cat(ids),
                return_dict=False,
            )[0][:, : x.shape[1]]  # fmt: skip
            x = x + (sigma_next - sigma) * velocity
    assert torch.allclose(policy.sigmas(STEPS, None), sigmas, atol=1e-6)
    assert torch.allclose(draw(policy, references, noise), policy.decode(x), **CLOSE)


def _grid(height: int, width: int, row: int, column: int) -> Tensor:
    places = [[0.0, row + i, column + j] for i in range(height // 16) for j in range(width // 16)]
    return torch.tensor(places)
