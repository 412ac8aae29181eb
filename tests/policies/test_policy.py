"""The policy protocol: what a class gets that defines its abstract members alone."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from customized_grpo.algorithm import shift_sigmas
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.policies.policy import Policy
from customized_grpo.policies.sampling import sample_ode
from customized_grpo.types import References


@dataclass
class Colors:
    """The mean color of each prompt's first reference, [B, 3]."""

    values: Tensor

    def take(self, index: Tensor) -> "Colors":
        return Colors(self.values[index])


class Painter(Policy[Colors]):
    """Draws the mean color of the reference, times a trained gain."""

    size = (4, 4)
    latent_shape = torch.Size((3, 4, 4))
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.gain = torch.nn.Parameter(torch.ones(()))

    def check(self, prompt: str, num_references: int) -> None:
        pass

    def prepare_reference(self, picture: Tensor, count: int) -> Tensor:
        return picture

    def encode(self, prompts: Sequence[str], references: References) -> Colors:
        return Colors(torch.stack([row[0].mean((1, 2)) for row in references]))

    def sigmas(self, num_steps: int, shift: float | None) -> Tensor:
        return shift_sigmas(num_steps, shift or 1.0)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Colors) -> Tensor:
        target = self.gain * condition.values[..., None, None]
        return (latents - target) / sigma.view(-1, 1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(0, 1)

    def trainable_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return [("gain", self.gain)]

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        yield

    def save_adapter(self, folder: Path) -> None:
        pass

    def load_adapter(self, place: Path) -> None:
        pass


def test_a_policy_is_a_class_with_the_abstract_members() -> None:
    policy, reference = Painter(), torch.full((3, 8, 8), 0.25)
    condition = policy.encode(["a", "b"], [[reference], [reference * 2]])
    images = sample_ode(policy, condition, torch.randn(2, 3, 4, 4), policy.sigmas(4, None), 2)
    assert torch.allclose(images, torch.tensor([0.25, 0.5]).view(2, 1, 1, 1).expand(2, 3, 4, 4), atol=1e-6)


def test_further_members_do_nothing() -> None:
    policy = Painter()
    assert policy.prompt_lengths(["a" * 1000]) is None

    def unread(number: int) -> Sequence[Tensor]:
        raise AssertionError("nothing is to be read")

    policy.precompute([], unread, [0], print)
    with policy.lockstep(DistributedGroup()):
        pass


def test_an_incomplete_policy_is_refused_by_the_name_of_what_is_missing() -> None:
    class Unfinished(Painter):
        decode = Policy.decode

    with pytest.raises(TypeError, match="decode"):
        Unfinished()
