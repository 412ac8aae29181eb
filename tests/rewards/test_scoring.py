"""Any number of rewards by name."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from customized_grpo.algorithm import conflict_rate, group_advantages, quadrants
from customized_grpo.config.rewards import RewardConfig
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import TrainingError, UserError
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


def scorer(rewards: dict[str, Any], **settings: dict[str, Any]) -> Scorer:
    """A scorer of `rewards`, which are objectives unless their `settings` say otherwise."""
    kinds = {name: {"kind": "python", "python": {"function": "a.b"}} | settings.get(name, {}) for name in rewards}
    return Scorer(rewards, {name: RewardConfig.model_validate(each) for name, each in kinds.items()})


def grouped(*columns: list[list[float]], names: str = "ab") -> GroupRewards:
    values = torch.tensor(columns).permute(1, 2, 0)
    return GroupRewards(tuple(names[: len(columns)]), values, values.isfinite())


@pytest.fixture
def three(reward_of: RewardOf) -> Scorer:
    def channel(number: int) -> Reward:
        return reward_of(lambda images: images[:, :, number].mean((2, 3)).double())

    return scorer({"red": channel(0), "green": channel(1), "blue": channel(2)})


def test_columns_are_in_the_order_of_the_names(three: Scorer) -> None:
    found = three.score(IMAGES, BATCH)
    assert found.names == three.names == ("red", "green", "blue")
    assert found.values.dtype == torch.float32 and found.valid.all()
    torch.testing.assert_close(found.values, IMAGES.mean((3, 4)))


def test_what_is_not_finite_or_called_invalid_is_invalid(reward_of: RewardOf) -> None:
    values = torch.tensor([[1.0, math.inf, 2.0, math.nan]] * 2)
    claims = reward_of(lambda images: values)
    claims.score = lambda images, batch: Scores(values, torch.ones(2, 4, dtype=torch.bool))  # type: ignore[method-assign]
    found = scorer({"claims": claims, "server": Server(None)}).score(IMAGES, BATCH)
    assert found.valid[0].T.tolist() == [[True, False, True, False], [False, True, True, True]]


def test_metrics_of_three_rewards(three: Scorer) -> None:
    rewards = three.score(IMAGES, BATCH)
    metrics = three.metrics(rewards)
    for index, name in enumerate(rewards.names):
        assert metrics[f"reward/{name}/mean"] == pytest.approx(float(rewards.values[..., index].mean()))
        assert metrics[f"reward/{name}/std"] == pytest.approx(float(rewards.values[..., index].std(1).mean()))
    advantages = group_advantages(rewards.values)
    shares = quadrants(advantages, names=rewards.names)
    assert len(shares) == 12 and {name: metrics[f"quadrant/{name}"] for name in shares} == shares
    assert metrics["conflict_rate"] == conflict_rate(advantages) and metrics["invalid_share"] == 0


def test_one_reward_has_no_quadrants(reward_of: RewardOf) -> None:
    values = torch.tensor([[1.0, 2.0, math.nan, 3.0]] * 2)
    one = scorer({"only": reward_of(lambda images: values)})
    metrics = one.metrics(one.score(IMAGES, BATCH))
    assert metrics == {"reward/only/mean": 2.0, "reward/only/std": 1.0, "invalid_share": 0.25}


@pytest.mark.parametrize(("limit", "fails"), [(0.2, True), (0.25, False)])
def test_too_many_failures_are_refused_by_name_and_reason(reward_of: RewardOf, limit: float, fails: bool) -> None:
    rewards: dict[str, Any] = {"fine": reward_of(lambda images: images.mean((2, 3, 4))), "judge": Server("no answer")}
    both = scorer(rewards, judge={"max_invalid_share": limit}, fine={"max_invalid_share": 0.0})
    found = both.score(IMAGES, BATCH)
    if not fails:
        return both.check(found, "after iteration 3")
    message = r"3: 25% of the judge rewards .*rewards\.judge\.max_invalid_share=20% \(no answer\)\. Mend the reward"
    with pytest.raises(TrainingError, match=message):
        both.check(found, "after iteration 3")


def test_reasons_stand_in_the_order_of_the_names() -> None:
    rewards = scorer({"a": Server("x"), "b": Server(None), "c": Server("y")}).score(IMAGES, BATCH)
    assert rewards.reasons == rewards.gathered(DistributedGroup()).reasons == ("x", None, "y")


def test_a_single_process_gathers_its_own() -> None:
    rewards = GroupRewards(("a",), torch.rand(1, 2, 1), torch.tensor([[[True], [False]]]))
    found = rewards.gathered(DistributedGroup())
    assert torch.equal(found.values, rewards.values) and torch.equal(found.valid, rewards.valid)


def test_columns_are_selected_by_name() -> None:
    rewards = grouped([[1.0, 2.0]], [[3.0, math.nan]])
    turned = rewards.select(("b", "a"))
    assert turned.names == ("b", "a") and turned.valid.tolist() == [[[True, True], [False, True]]]
    assert torch.equal(turned.values[..., 1], rewards.values[..., 0])
    assert rewards.select(()).values.shape == (1, 2, 0)


def test_pairs_are_of_objectives_and_constraints_have_the_share_that_breaks_them() -> None:
    settings = {
        "a": {}, "b": {"weight": 0.5}, "watched": {"weight": 0},
        "held": {"role": "constraint", "at_least": 0.5, "at_most": 1.0},
    }  # fmt: skip
    four = scorer(dict.fromkeys(settings), **settings)
    values = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1))
    values[..., 3] = torch.tensor([[0.4, 0.5, 1.0, 1.1], [0.7, math.nan, 0.7, 0.7]])
    rewards = GroupRewards(tuple(settings), values, values.isfinite())
    metrics = four.metrics(rewards)
    assert metrics["violated/held"] == pytest.approx(2 / 7)
    assert {name for name in metrics if name.startswith("quadrant/")} == {
        "quadrant/both_good", "quadrant/only_a", "quadrant/only_b", "quadrant/both_bad",
    }  # fmt: skip
    assert metrics["conflict_rate"] == conflict_rate(group_advantages(values[..., :2]))
    assert "reward/watched/mean" in metrics and "reward/held/std" in metrics


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"at_least": 0.3}, None),  # scores are 0.2 to 0.3
        ({"at_least": 0.4}, None),  # as far as they are from each other
        (
            {"at_least": 0.41},
            r"rewards\.b\.at_least=0\.41 is out of reach: the first iteration's images score 0\.2 to 0\.3",
        ),
        ({"at_least": 21}, r"at_least=21 is out of reach"),
        ({"at_most": 0.1}, None),
        ({"at_most": 0.09}, r"rewards\.b\.at_most=0\.09 is out of reach"),
        ({"at_least": -5.0}, None),  # a guard that holds
        ({"at_most": 5.0}, None),
    ],
)
def test_a_bound_that_nothing_comes_near_is_refused(bounds: dict[str, float], said: str | None) -> None:
    held = scorer(dict.fromkeys("ab"), b={"role": "constraint", **bounds})
    rewards = grouped([[9.0, 9.0, 9.0]], [[0.2, 0.3, math.nan]])
    if said is None:
        return held.check_bounds(rewards)
    with pytest.raises(UserError, match=said):
        held.check_bounds(rewards)


def test_bounds_of_scores_that_are_all_missing_are_not_judged() -> None:
    held = scorer(dict.fromkeys("ab"), b={"role": "constraint", "at_least": 9.0})
    held.check_bounds(grouped([[1.0, 2.0]], [[math.nan, math.nan]]))
