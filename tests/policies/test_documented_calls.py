"""docs/models.md says how a plain pipeline draws as the run did: those very lines, on tiny models, give our picture."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from torch import Tensor

from customized_grpo.algorithm import ode_step
from customized_grpo.data.images import to_pil
from customized_grpo.factory.pipelines import PIPELINES
from customized_grpo.policies.diffusers_policy import DiffusersPolicy

Load = Callable[..., DiffusersPolicy]
PROMPT = "a toy cat on the beach"
SIDE, STEPS, SHIFT = 64, 3, 3.0
CLOSE = {"atol": 3e-4, "rtol": 0.0}
CALLS = {"flux1-kontext": "_auto_resize=False", "flux2-klein": "FLUX.2 [klein]", "flux2": "FLUX.2 [klein]",
         "qwen-image-edit-plus": "VAE_IMAGE_SIZE"}  # fmt: skip
"""What only the lines for a kind say, or stands before them."""
PREPARED = "pipe.scheduler = "


@pytest.fixture
def section(repository: Path) -> str:
    """The section, its sizes and steps replaced by those of tiny models."""
    text = (repository / "docs" / "models.md").read_text().partition("## Draw as trained")[2].partition("\n## ")[0]
    tiny = text.replace("512", str(SIDE)).replace("num_inference_steps=25", f"num_inference_steps={STEPS}")
    return tiny.replace("prompt=prompt,", "prompt=prompt, latents=noise, output_type='pt',")


def code(section: str, sign: str) -> str:
    """The code block that has `sign` in it, or in the paragraph before it."""
    parts = re.split(r"```(?:python)?\n", section)
    paragraphs, blocks = (part.strip().split("\n\n")[-1] for part in parts[::2]), parts[1::2]
    (found,) = [block for before, block in zip(paragraphs, blocks, strict=False) if sign in block or sign in before]
    return found


def ours(policy: DiffusersPolicy, reference: Tensor, noise: Tensor) -> Tensor:
    condition = policy.encode([PROMPT], [[policy.prepare_reference(reference, 1)]])
    x = noise
    with torch.no_grad():
        for sigma, sigma_next in pairwise(policy.sigmas(STEPS, SHIFT)):
            x = ode_step(x, policy.velocity(x, sigma.expand(1), condition), sigma, sigma_next)
    return policy.decode(x)[0]


def with_token_types(encoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    types = (kwargs["input_ids"] == encoder.config.image_token_id).int()
    return args, kwargs | {"mm_token_type_ids": types}


@pytest.mark.parametrize("kind", CALLS)
def test_the_documented_call_draws_as_the_run_did(
    kind: str, section: str, load: Load, tiny_models: dict[str, Path], picture: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 1024 * 1024)  # put back in the end
    policy, reference, family = (
        load(kind, height=SIDE, width=SIDE, reference_side=SIDE),
        picture(SIDE, SIDE),
        PIPELINES[kind],
    )
    noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    expected = ours(policy, reference, noise)
    pipe = family.pipeline.from_pretrained(tiny_models[kind], **family.load_components(str(tiny_models[kind])))
    pipe.set_progress_bar_config(disable=True)
    if kind == "qwen-image-edit-plus":
        pipe.text_encoder.register_forward_pre_hook(with_token_types, with_kwargs=True)
    grid = noise.transpose(1, 2).unflatten(2, (SIDE // 16, SIDE // 16))
    known = {
        "pipe": pipe, "reference": to_pil(reference), "prompt": PROMPT, "noise": grid if "flux2" in kind else noise,
    }  # fmt: skip
    exec(code(section, PREPARED), known)
    exec(code(section, CALLS[kind]), known)
    image = known["image"]
    assert isinstance(image, Tensor) and image.shape == (3, SIDE, SIDE) and image.std() > 0.05
    assert torch.allclose(image, expected, **CLOSE)


def test_every_kind_with_a_pipeline_is_told(section: str) -> None:
    assert set(CALLS) == set(PIPELINES) - {"uno"}
    assert "generate" in section and section.count("```python") == 4


@pytest.mark.parametrize("left_out", ["_auto_resize=False,", "pipe.scheduler"])
def test_a_plain_call_draws_otherwise(
    left_out: str, section: str, load: Load, tiny_models: dict[str, Path], picture: Callable[..., Tensor]
) -> None:
    """What the section says is needed is needed."""
    policy, reference = load("flux1-kontext", height=SIDE, width=SIDE, reference_side=SIDE), picture(SIDE, SIDE)
    noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    pipe = PIPELINES["flux1-kontext"].pipeline.from_pretrained(tiny_models["flux1-kontext"])
    pipe.set_progress_bar_config(disable=True)
    known = {"pipe": pipe, "reference": to_pil(reference), "prompt": PROMPT, "noise": noise}
    if left_out != "pipe.scheduler":
        exec(code(section, PREPARED), known)
    exec(code(section, CALLS["flux1-kontext"]).replace(left_out, ""), known)
    assert not torch.allclose(known["image"], ours(policy, reference, noise), **CLOSE)
