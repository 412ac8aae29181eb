"""Weights and advantages as a configuration names them; the maths is tested in tests/algorithm."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from customized_grpo.algorithm import combine_advantages, hold_constraints
from customized_grpo.config.run import Config
from customized_grpo.rewards.scoring import GroupRewards
from customized_grpo.training.advantages import compute_advantages, step_weights
from customized_grpo.training.rollout import Plan

PLAN = Plan(torch.linspace(1, 0, 11), tuple(range(9)), (1, 4, 7))
PROMPT = {"kind": "toybox_prompt", "schedule": "early"}
IDENTITY = {"kind": "toybox_identity", "schedule": "late"}


def paper_weight(i: int, num_steps: int) -> float:
    """The prompt's weight at true step i, written from the paper."""
    u = 25 * i / num_steps
    if u < 6:
        return 0.7
    return 0.3 + 0.4 * (1 - 1 / (1 + math.exp(-0.8 * (u - 10)))) if u < 22 else 0.5


def of(rewards: dict[str, Any], steps: int = 10, **advantages: Any) -> Config:
    return Config.model_validate({"rewards": rewards, "rollout": {"num_steps": steps}, "advantages": advantages})


def drawn(*names: str) -> GroupRewards:
    values = torch.randn(2, 4, len(names), generator=torch.Generator().manual_seed(0))
    return GroupRewards(names, values, torch.ones_like(values, dtype=torch.bool))


def computed(config: Config, rewards: GroupRewards, weights: Tensor | None = None) -> Tensor:
    return compute_advantages(config, rewards, step_weights(config) if weights is None else weights, PLAN, iteration=0)


TDW = [(paper_weight(i, 4), 1 - paper_weight(i, 4)) for i in range(4)]


@pytest.mark.parametrize(
    ("rewards", "settings", "expected"),
    [
        ({"prompt": PROMPT, "identity": IDENTITY}, {}, TDW),
        ({"b": IDENTITY, "a": PROMPT}, {}, [(late, early) for early, late in TDW]),
        ({"a": {"kind": "toybox_prompt"}, "b": {"kind": "toybox_identity", "weight": 3}}, {}, [(0.25, 0.75)] * 4),
        ({"one": {"kind": "toybox_prompt", "weight": 7}}, {}, [(1.0,)] * 4),
        (
            {"a": PROMPT, "b": PROMPT | {"weight": 3}, "c": IDENTITY, "d": {"kind": "toybox_prompt", "weight": 0.2}},
            {},
            [(0.8 * e / 4, 0.8 * e * 3 / 4, 0.8 * late, 0.2) for e, late in TDW],
        ),
        (
            {"prompt": PROMPT, "identity": IDENTITY},
            {"weights": "table", "table": {"identity": (0, 1, 2, 0), "prompt": (1, 0, 2, 0)}},
            [(1, 0), (0, 1), (2, 2), (0, 0)],
        ),
    ],
)
def test_step_weights(rewards: dict[str, Any], settings: dict[str, Any], expected: list[tuple[float, ...]]) -> None:
    found = step_weights(of(rewards, 4, **settings))
    assert torch.allclose(found, torch.tensor(expected).float(), atol=1e-6)
    if not settings:
        assert torch.allclose(found.sum(1), torch.ones(4), atol=1e-6)


def test_the_order_of_the_rewards_changes_nothing() -> None:
    """Weights and thresholds go by name."""
    rewards = drawn("prompt", "identity")
    turned = GroupRewards(("identity", "prompt"), rewards.values.flip(-1), rewards.valid)
    hinged = IDENTITY | {"up_to": 0.2}
    found = computed(of({"prompt": PROMPT, "identity": hinged}), rewards)
    torch.testing.assert_close(found, computed(of({"identity": hinged, "prompt": PROMPT}), turned))
    assert not torch.allclose(found, computed(of({"prompt": PROMPT, "identity": IDENTITY}), rewards))


def test_advantages_of_three_rewards() -> None:
    rewards, weights = drawn("prompt", "identity", "style"), torch.rand(10, 3)
    config = of({"prompt": PROMPT, "identity": IDENTITY, "style": PROMPT})
    assert torch.equal(
        computed(config, rewards, weights), combine_advantages(rewards.values, weights=weights[[1, 4, 7]])
    )


@pytest.mark.parametrize("place", range(3))
def test_a_reward_with_weight_0_changes_nothing(place: int) -> None:
    """Wherever it stands, whatever it scores, and where it cannot be computed at all: to the last bit."""
    two = {"prompt": PROMPT, "identity": IDENTITY}
    alone = drawn(*two)
    watched = list(two.items())
    watched.insert(place, ("watched", PROMPT | {"weight": 0}))
    columns = list(alone.values.unbind(-1))
    columns.insert(place, torch.full((2, 4), torch.nan))
    values = torch.stack(columns, -1)
    rewards = GroupRewards(tuple(dict(watched)), values, values.isfinite())
    assert torch.equal(computed(of(dict(watched)), rewards), computed(of(two), alone))
    assert torch.equal(step_weights(of(dict(watched))), step_weights(of(two)))


def test_a_constraint_acts_where_it_is_broken_alone() -> None:
    two = {"prompt": PROMPT, "identity": IDENTITY}
    bounded = two | {"rough": {"kind": "texture", "role": "constraint", "at_most": 1.5}}
    alone = drawn(*two)
    rough = torch.tensor([[1.0, 1.2, 0.4, 1.5], [1.0, 2.0, 1.0, 3.0]])
    values = torch.cat([alone.values, rough.unsqueeze(-1)], -1)
    found = computed(of(bounded), GroupRewards(tuple(bounded), values, torch.ones_like(values, dtype=torch.bool)))
    free = computed(of(two), alone)
    assert torch.equal(found[0], free[0])
    broken = (rough - 1.5).clamp(min=0).unsqueeze(-1)
    torch.testing.assert_close(found[1], hold_constraints(free, broken)[1].clamp(-5, 5))
    assert not torch.allclose(found[1], free[1])


def test_a_kind_of_push_needs_a_constraint() -> None:
    with pytest.raises(ValueError, match="advantages.constraints=proportional: no reward has role=constraint; leave"):
        of({"prompt": PROMPT, "identity": IDENTITY}, constraints="proportional")


def test_a_sample_whose_constraint_is_unknown_drops_out() -> None:
    bounded = {"prompt": PROMPT, "rough": {"kind": "texture", "role": "constraint", "at_least": 0.5}}
    bounded["prompt"] = PROMPT | {"schedule": "constant"}
    values = torch.tensor([[[1.0, 1.0], [2.0, torch.nan], [3.0, 1.0], [4.0, 1.0]]])
    found = computed(of(bounded), GroupRewards(tuple(bounded), values, values.isfinite()))
    smaller = torch.tensor([1.0, 3.0, 4.0])
    assert (found[0, 1] == 0).all()
    expected = (smaller - smaller.mean()) / smaller.std()
    torch.testing.assert_close(found[0, [0, 2, 3], 0], expected, atol=1e-5, rtol=0)
