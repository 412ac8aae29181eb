from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from customized_grpo.data import SubjectDataset
from customized_grpo.evaluation.evaluator import (
    COPY_SCORE,
    JUDGE_METRICS,
    REWARD_METRICS,
    Evaluation,
    chance_levels,
    evaluate,
)
from customized_grpo.rewards.reward import Reward
from customized_grpo.toybox.oracle import Oracle, Verdict
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.toybox.rewards import IdentityReward, PromptReward

Run = Callable[..., Evaluation]


@pytest.fixture
def run(make_policy: Callable[..., ToyBoxPolicy], toybox_data: Path, tiny_weights: Path) -> Run:
    policy, dataset = make_policy(), SubjectDataset.open(toybox_data / "test")
    rewards: list[Reward] = [PromptReward(tiny_weights), IdentityReward(weights=tiny_weights)]

    def make(judge: Oracle | None = None, rewards: list[Reward] = rewards, **changes: Any) -> Evaluation:
        settings = {"pairs": 4, "num_steps": 3, "shift": 2.0, "seed": 0, "micro_batch": 36} | changes
        named = dict(zip(("prompt", "identity"), rewards, strict=True))
        return evaluate(policy, dataset, named, judge, **settings)

    return make


def test_the_same_pairs_give_the_same_pictures_in_any_micro_batches(run: Run) -> None:
    first = run()
    assert torch.equal(run().images, first.images)
    assert torch.allclose(run(micro_batch=1).images, first.images, rtol=0, atol=1e-5)
    assert not torch.allclose(run(seed=1).images, first.images, atol=1e-2)


def test_fewer_pairs_are_the_first_ones(run: Run) -> None:
    few, all_of_them = run(pairs=2), run(pairs=100)
    assert [sample.id for sample in few.samples] == ["test-00000", "test-00001"] and len(all_of_them.samples) == 4
    assert torch.allclose(few.images, all_of_them.images[:2], rtol=0, atol=1e-5)


def test_every_pair_is_measured(run: Run, tiny_weights: Path) -> None:
    evaluation = run(Oracle(tiny_weights))
    assert set(evaluation.metrics) == {*JUDGE_METRICS, COPY_SCORE, *REWARD_METRICS} == set(evaluation.means())
    record = evaluation.records()[1]
    assert record["id"] == "test-00001" and record["prompt"] == evaluation.samples[1].prompt
    assert isinstance(record["joint_success"], bool) and isinstance(record["reward/prompt"], float)
    for interval in evaluation.summary().values():
        assert interval["low"] <= interval["mean"] <= interval["high"]


def test_without_a_judge_there_are_rewards(run: Run) -> None:
    assert set(run().metrics) == set(REWARD_METRICS)


def test_a_reward_that_failed_is_left_out(run: Run, reward_of: Callable[..., Reward]) -> None:
    values = torch.tensor([[1.0], [torch.nan], [3.0], [2.0]])
    evaluation = run(rewards=[reward_of(lambda images: values), reward_of(lambda images: values)])
    assert evaluation.means()["reward/prompt"] == 2.0
    assert [record["reward/prompt"] for record in evaluation.records()] == [1.0, None, 3.0, 2.0]


def test_chance_holds_each_picture_against_another_pair(run: Run, tiny_weights: Path) -> None:
    """A judge that says yes to a picture made for just this prompt and reference: chance must be 0."""
    evaluation, judge = run(Oracle(tiny_weights)), Oracle(tiny_weights)
    own = {sample.prompt: image for sample, image in zip(evaluation.samples, evaluation.images, strict=True)}

    def knows_its_own(images: Tensor, prompts: list[str], references: Tensor) -> Verdict:
        hits = torch.tensor([torch.equal(image, own[prompt]) for image, prompt in zip(images, prompts, strict=True)])
        return Verdict(hits, hits, hits.float())

    judge.judge = knows_its_own  # type: ignore[method-assign, assignment]
    assert len(own) == 4 and set(chance_levels(evaluation, judge).values()) == {0.0}
