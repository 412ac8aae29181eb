"""Any number of rewards by name."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from customized_grpo.algorithm import conflict_rate, group_advantages, quadrants
from customized_grpo.config.rewards import RewardsConfig
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import TrainingError
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.rewards.scoring import GroupRewards, Scorer
from customized_grpo.types import PromptBatch

RewardOf = Callable[[Callable[[Tensor], Tensor]], Reward]
IMAGES = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = PromptBatch(["a cat", "a dog"], [[IMAGES[0, 0]]] * 2, None)


class Server:
    """A reward that fails for the first image of every group, and says why."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        valid = torch.ones(images.shape[:2], dtype=torch.bool)
        valid[:, 0] = False
        return Scores(torch.zeros(images.shape[:2]), valid, self.reason)


@pytest.fixture
def three(reward_of: RewardOf) -> Scorer:
    def channel(number: int) -> Reward:
        return reward_of(lambda images: images[:, :, number].mean((2, 3)).double())

    return Scorer({"red": channel(0), "green": channel(1), "blue": channel(2)}, RewardsConfig())


def test_columns_are_in_the_order_of_the_names(three: Scorer) -> None:
    found = three.score(IMAGES, BATCH)
    assert found.names == three.names == ("red", "green", "blue")
    assert found.values.dtype == torch.float32 and found.valid.all()
    torch.testing.assert_close(found.values, IMAGES.mean((3, 4)))


def test_what_is_not_finite_or_called_invalid_is_invalid(reward_of: RewardOf) -> None:
    values = torch.tensor([[1.0, math.inf, 2.0, math.nan]] * 2)
    claims = reward_of(lambda images: values)
    claims.score = lambda images, batch: Scores(values, torch.ones(2, 4, dtype=torch.bool))  # type: ignore[method-assign]
    found = Scorer({"claims": claims, "server": Server(None)}, RewardsConfig()).score(IMAGES, BATCH)
    assert found.valid[0].T.tolist() == [[True, False, True, False], [False, True, True, True]]


def test_metrics_of_three_rewards(three: Scorer) -> None:
    rewards = three.score(IMAGES, BATCH)
    metrics = rewards.metrics()
    for index, name in enumerate(rewards.names):
        assert metrics[f"reward/{name}/mean"] == pytest.approx(float(rewards.values[..., index].mean()))
        assert metrics[f"reward/{name}/std"] == pytest.approx(float(rewards.values[..., index].std(1).mean()))
    advantages = group_advantages(rewards.values)
    shares = quadrants(advantages, names=rewards.names)
    assert len(shares) == 12 and {name: metrics[f"quadrant/{name}"] for name in shares} == shares
    assert metrics["conflict_rate"] == conflict_rate(advantages) and metrics["invalid_share"] == 0


def test_one_reward_has_no_quadrants(reward_of: RewardOf) -> None:
    values = torch.tensor([[1.0, 2.0, math.nan, 3.0]] * 2)
    metrics = Scorer({"only": reward_of(lambda images: values)}, RewardsConfig()).score(IMAGES, BATCH).metrics()
    assert metrics == {"reward/only/mean": 2.0, "reward/only/std": 1.0, "invalid_share": 0.25}


@pytest.mark.parametrize(("limit", "fails"), [(0.2, True), (0.25, False)])
def test_too_many_failures_are_refused_by_name_and_reason(reward_of: RewardOf, limit: float, fails: bool) -> None:
    rewards: dict[str, Any] = {"fine": reward_of(lambda images: images.mean((2, 3, 4))), "judge": Server("no answer")}
    scorer = Scorer(rewards, RewardsConfig(max_invalid_share=limit))
    found = scorer.score(IMAGES, BATCH)
    if not fails:
        return scorer.check(found, "after iteration 3")
    message = r"after iteration 3: 25% of the judge rewards .*max_invalid_share=20% \(no answer\)\. Mend the reward"
    with pytest.raises(TrainingError, match=message):
        scorer.check(found, "after iteration 3")


def test_reasons_stand_in_the_order_of_the_names() -> None:
    rewards = Scorer({"a": Server("x"), "b": Server(None), "c": Server("y")}, RewardsConfig()).score(IMAGES, BATCH)
    assert rewards.reasons == rewards.gathered(DistributedGroup()).reasons == ("x", None, "y")


def test_a_single_process_gathers_its_own() -> None:
    rewards = GroupRewards(("a",), torch.rand(1, 2, 1), torch.tensor([[[True], [False]]]))
    found = rewards.gathered(DistributedGroup())
    assert torch.equal(found.values, rewards.values) and torch.equal(found.valid, rewards.valid)
