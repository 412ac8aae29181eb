"""Weights and advantages as a configuration names them; the maths is tested in tests/algorithm."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from customized_grpo.algorithm import combine_advantages
from customized_grpo.config.advantages import AdvantagesConfig
from customized_grpo.errors import UserError
from customized_grpo.rewards.scoring import GroupRewards
from customized_grpo.training.advantages import PAIR, compute_advantages, step_weights
from customized_grpo.training.rollout import Plan

PLAN = Plan(torch.linspace(1, 0, 11), tuple(range(9)), (1, 4, 7))


def paper_weight(i: int, num_steps: int) -> float:
    """The prompt's weight at true step i, written from the paper."""
    u = 25 * i / num_steps
    if u < 6:
        return 0.7
    return 0.3 + 0.4 * (1 - 1 / (1 + math.exp(-0.8 * (u - 10)))) if u < 22 else 0.5


def drawn(*names: str) -> GroupRewards:
    values = torch.randn(2, 4, len(names), generator=torch.Generator().manual_seed(0))
    return GroupRewards(names, values, torch.ones_like(values, dtype=torch.bool))


def computed(rewards: GroupRewards, weights: Tensor, **settings: Any) -> Tensor:
    return compute_advantages(AdvantagesConfig(**settings), rewards, weights, PLAN, seed=3, iteration=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weights": "constant", "constant": (0.4, 0.6)}, [(0.4, 0.6)] * 4),
        ({"weights": "table", "table": ((1, 0), (0, 1), (2, 2), (0, 0))}, [(1, 0), (0, 1), (2, 2), (0, 0)]),
        ({}, [(paper_weight(i, 4), 1 - paper_weight(i, 4)) for i in range(4)]),
    ],
)
def test_step_weights_by_name(settings: dict[str, Any], expected: list[tuple[float, float]]) -> None:
    config, table = AdvantagesConfig(**settings), torch.tensor(expected).float()
    assert torch.allclose(step_weights(config, 4, PAIR), table, atol=1e-6)
    assert torch.allclose(step_weights(config, 4, ("identity", "prompt")), table.flip(1), atol=1e-6)


def test_a_reward_without_a_weight_is_refused() -> None:
    with pytest.raises(UserError, match="no weight for the reward 'style'; weights are given to prompt and identity"):
        step_weights(AdvantagesConfig(), 4, ("prompt", "style"))


def test_the_order_of_the_rewards_changes_nothing() -> None:
    """Weights and thresholds go by name."""
    rewards = drawn("prompt", "identity")
    turned = GroupRewards(("identity", "prompt"), rewards.values.flip(-1), rewards.valid)
    found = [
        computed(each, step_weights(AdvantagesConfig(), 10, each.names), thresholds=(None, 0.2))
        for each in (rewards, turned)
    ]
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], computed(rewards, step_weights(AdvantagesConfig(), 10, PAIR)))


def test_advantages_of_three_rewards() -> None:
    rewards, weights = drawn("prompt", "identity", "style"), torch.rand(10, 3)
    expected = combine_advantages(rewards.values, weights=weights[[1, 4, 7]])
    assert torch.equal(computed(rewards, weights), expected)
