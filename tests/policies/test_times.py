"""The time that a transformer is told, seen where it is embedded, beside the sigma that a step is taken with."""

from collections.abc import Callable

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from families import EVERY_FAMILY_OR_FAST
from torch import Tensor

from customized_grpo.algorithm import shift_sigmas
from customized_grpo.policies.diffusers_policy import DiffusersPolicy

SIGMAS = shift_sigmas(25, 3.0)[:-1]
"""The paper's schedule."""


def told(policy: DiffusersPolicy, picture: Callable[..., Tensor]) -> Tensor:
    """The times, in units of 1000, that `policy` is told at SIGMAS."""
    times: list[Tensor] = []

    def watch(module: Timesteps, inputs: tuple[Tensor, ...]) -> None:
        times.append(inputs[0].double() * module.scale)

    embedding = next(each for each in policy._transformer.modules() if isinstance(each, Timesteps))
    hook = embedding.register_forward_pre_hook(watch)
    reference = policy.prepare_reference(picture(64, 64), 1)
    condition = policy.encode(["a cat"], [[reference]]).take(torch.zeros(1, dtype=torch.long))
    latents = torch.zeros(1, *policy.latent_shape)
    found = []
    with torch.no_grad():
        for sigma in SIGMAS:
            times.clear()
            policy.velocity(latents, sigma.view(1), condition)
            found.append(times[0])  # the second, where there is one, is of guidance
    hook.remove()
    return torch.cat(found)


@EVERY_FAMILY_OR_FAST
def test_in_fp32_the_generator_is_told_the_sigma_of_the_step(
    kind: str, load: Callable[..., DiffusersPolicy], picture: Callable[..., Tensor]
) -> None:
    assert (told(load(kind), picture) - 1000 * SIGMAS.double()).abs().max() < 1e-3


@EVERY_FAMILY_OR_FAST
def test_in_bf16_it_is_told_what_the_pipeline_tells_it(
    kind: str, load: Callable[..., DiffusersPolicy], picture: Callable[..., Tensor]
) -> None:
    """The pipelines cast times to bf16, in units of 1000: off by up to 1.9, the published whole numbers by 0.9. Qwen's
    transformer multiplies by 1000 after a second cast."""
    found = told(load(kind, precision="bf16"), picture)
    exact = 1000 * SIGMAS.double()
    off = 2.704 if kind == "qwen-image-edit-plus" else 1.895
    assert (found - exact).abs().max() == pytest.approx(off, abs=0.001)
    published = torch.tensor([int(sigma * 1000) for sigma in SIGMAS.tolist()]).double()
    assert (published - exact).abs().max() == pytest.approx(0.907, abs=0.001)
