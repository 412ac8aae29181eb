"""The average of the trained weights: a plain reference in float64, and weights put in and back to the bit."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from customized_grpo.config.run import Config
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.training.ema import EMA


def walk(seed: int, steps: int) -> npt.NDArray[np.float32]:
    """Weights [steps + 1, 3] on a random walk."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(steps + 1, 3)).cumsum(0).astype(np.float32)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_it_is_the_average_of_its_definition(decay: float) -> None:
    weights = walk(0, 40)
    parameter = nn.Parameter(torch.tensor(weights[0]))
    average, expected = EMA([("w", parameter)], decay), weights[0].astype(np.float64)
    for i in range(1, 41):
        parameter.data = torch.tensor(weights[i])
        average.update(i)
        k = min(decay, (1 + i) / (10 + i))
        expected = k * expected + (1 - k) * weights[i].astype(np.float64)
        np.testing.assert_allclose(average.tensors["w"].numpy(), expected, rtol=2e-6, atol=1e-6)
    assert np.abs(expected - weights[-1]).max() > 1e-2


def test_it_is_kept_in_fp32_and_moves_where_bf16_would_not() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    average = EMA([("w", parameter)], 0.999)
    parameter.data += 1e-2
    for i in range(9000, 9010):
        average.update(i)
    assert average.tensors["w"].dtype == torch.float32
    expected = 1 + (float(parameter.detach()[0]) - 1) * (1 - 0.999**10)
    assert average.tensors["w"].tolist() == pytest.approx([expected] * 2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_put_back_to_the_bit(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype))
    before = parameter.detach().clone()
    average = EMA([("w", parameter)], 0.9)
    average.tensors["w"] += 1 / 3
    with average.swapped():
        assert torch.equal(parameter, average.tensors["w"].to(dtype)) and not torch.equal(parameter, before)
    assert torch.equal(parameter, before)

    def interrupted() -> None:
        with average.swapped():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(parameter, before)


def test_a_signal_between_two_steps_leaves_what_put_back_ends() -> None:
    """As `Terminated` may find the run after the body and before the context manager's own end."""
    parameter = nn.Parameter(torch.ones(3))
    average = EMA([("w", parameter)], 0.9)
    average.tensors["w"] += 1
    swapped = average.swapped()
    swapped.__enter__()
    assert torch.equal(parameter, torch.full((3,), 2.0))
    average.restore()
    assert torch.equal(parameter, torch.ones(3))
    swapped.__exit__(None, None, None)
    assert torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_untuned_generator_is_not_averaged(adapter: str, make_policy: Callable[..., ToyBoxPolicy]) -> None:
    policy = make_policy(adapter=adapter)
    average = EMA(policy.trainable_parameters(), 0.9)
    for tensor in average.tensors.values():
        tensor += 0.05
    condition = policy.encode(["a star on the beach"], [[torch.rand(3, 32, 32)]])
    latents, sigma = torch.randn(1, 3, 32, 32), torch.tensor([0.5])
    with torch.no_grad():
        with policy.base_weights():
            base = policy.velocity(latents, sigma, condition)
        with average.swapped():
            averaged = policy.velocity(latents, sigma, condition)
            with policy.base_weights():
                assert torch.equal(policy.velocity(latents, sigma, condition), base)
        assert torch.equal(policy.velocity(latents, sigma, condition), base) and not torch.equal(averaged, base)


def test_fields_of_an_average_that_is_not_kept_are_refused() -> None:
    with pytest.raises(ValidationError, match="no average without a decay; set decay"):
        Config.model_validate({"ema": {"evaluate": False}})
    with pytest.raises(ValidationError, match="less than 1"):
        Config.model_validate({"ema": {"decay": 1.0}})
    assert not Config.model_validate({"ema": {"decay": 0.9, "evaluate": False}}).ema.evaluate
