from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from customized_grpo.data import SubjectDataset
from customized_grpo.errors import UserError
from customized_grpo.evaluation.evaluator import Evaluation, Evaluator, Repeats, Sampling
from customized_grpo.evaluation.metrics import Metric, ScoreMetric
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.rewards.texture import laplacian
from customized_grpo.toybox.oracle import Oracle, Verdict
from customized_grpo.toybox.oracle_metric import CHANCE_FIGURES, FIGURES, OracleMetric
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.toybox.rewards import IdentityReward, PromptReward
from customized_grpo.tracking.metric_info import MetricInfo
from customized_grpo.types import PromptBatch

REWARDS = ("reward/prompt", "reward/identity")
Make = Callable[..., Evaluator]
Run = Callable[..., Evaluation]


@pytest.fixture
def make(make_policy: Callable[..., ToyBoxPolicy], toybox_data: Path, tiny_weights: Path) -> Make:
    """Make an evaluator of ToyBox's rewards, and of `metrics` before them."""
    policy, dataset = make_policy(), SubjectDataset.open(toybox_data / "test")
    own = {"prompt": PromptReward(tiny_weights), "identity": IdentityReward(weights=tiny_weights)}

    def make(
        *metrics: Metric, rewards: dict[str, Reward] | None = None, repeats: Repeats | None = None, **changes: Any
    ) -> Evaluator:
        settings = {"num_steps": 3, "shift": 2.0, "seed": 0, "micro_batch": 36} | changes
        measured = [*metrics, ScoreMetric.of_rewards(rewards or own)]
        return Evaluator(policy, dataset, measured, Sampling(**settings), repeats=repeats)

    return make


@pytest.fixture
def run(make: Make) -> Run:
    def run(*metrics: Metric, pairs: int = 4, **settings: Any) -> Evaluation:
        return make(*metrics, **settings).evaluate(pairs)

    return run


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
    evaluation = run(OracleMetric.load(tiny_weights))
    assert list(evaluation.metrics) == [*FIGURES, *REWARDS] == list(evaluation.means())
    record = evaluation.records()[1]
    assert record["id"] == "test-00001" and record["prompt"] == evaluation.samples[1].prompt
    assert isinstance(record["joint_success"], bool) and isinstance(record["reward/prompt"], float)
    for interval in evaluation.summary().values():
        assert interval["low"] <= interval["mean"] <= interval["high"]


def test_without_a_judge_there_are_rewards(run: Run) -> None:
    assert set(run().metrics) == set(REWARDS)


def test_a_reward_that_failed_is_left_out(run: Run, reward_of: Callable[..., Reward]) -> None:
    values = torch.tensor([[1.0], [torch.nan], [3.0], [2.0]])
    evaluation = run(rewards={name: reward_of(lambda images: values) for name in ("prompt", "identity")})
    assert evaluation.means()["reward/prompt"] == 2.0
    assert [record["reward/prompt"] for record in evaluation.records()] == [1.0, None, 3.0, 2.0]
    assert evaluation.missing_share() == 0.25


def test_an_evaluation_says_why_rewards_are_missing(run: Run) -> None:
    class Refused(Reward):
        def score(self, images: Tensor, batch: PromptBatch) -> Scores:
            return Scores(torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.bool), "refused")

    evaluation = run(rewards={"style": Refused()})
    assert evaluation.reasons == ["refused"] and evaluation.missing_share() == 1


def test_any_number_of_rewards_is_measured_by_name(run: Run, reward_of: Callable[..., Reward]) -> None:
    ones = reward_of(lambda images: torch.ones(4, 1))
    assert run(rewards={"style": ones}).means() == {"reward/style": 1.0}
    assert list(run(rewards=dict.fromkeys("abc", ones)).metrics) == ["reward/a", "reward/b", "reward/c"]


def test_chance_holds_each_picture_against_another_pair(make: Make, tiny_weights: Path) -> None:
    """A judge that says yes to a picture made for just this prompt and reference: chance must be 0."""
    judge = Oracle(tiny_weights)
    evaluator = make(OracleMetric(judge))
    evaluation = evaluator.evaluate(4)
    own = {sample.prompt: image for sample, image in zip(evaluation.samples, evaluation.images, strict=True)}

    def knows_its_own(images: Tensor, prompts: list[str], references: Tensor) -> Verdict:
        hits = torch.tensor([torch.equal(image, own[prompt]) for image, prompt in zip(images, prompts, strict=True)])
        return Verdict(hits, hits, hits.float())

    judge.judge = knows_its_own  # type: ignore[method-assign, assignment]
    assert len(own) == 4 and evaluator.chance_levels(evaluation) == dict.fromkeys(CHANCE_FIGURES, 0.0)
    assert evaluator.ceiling == judge.ceiling and make().chance_levels(evaluation) == make().ceiling == {}


class Brightness(Metric):
    """Measures the mean of all pixels, as a metric of one's own would."""

    infos = (MetricInfo("brightness", "brightness"),)

    def __init__(self, values: Callable[[Tensor], Tensor] = lambda images: images.mean((1, 2, 3))) -> None:
        self._values = values

    def measure(self, images: Tensor, batch: PromptBatch) -> dict[str, Tensor]:
        return {"brightness": self._values(images)}


def test_a_metric_of_ones_own_is_measured_beside_the_others(run: Run) -> None:
    evaluation = run(Brightness())
    assert list(evaluation.metrics) == ["brightness", *REWARDS]
    assert torch.equal(evaluation.metrics["brightness"], evaluation.images.mean((1, 2, 3)))
    assert evaluation.records()[0]["brightness"] == float(evaluation.images[0].mean((0, 1, 2)))


def test_a_metric_that_gives_no_value_for_an_image_is_named(run: Run) -> None:
    with pytest.raises(UserError, match=r"Brightness.measure: found a tensor of shape \[\] for 'brightness'.*\[4\]"):
        run(Brightness(lambda images: images.mean()))


def test_diversity_is_of_images_of_the_first_samples_from_other_noise(make: Make) -> None:
    repeats = Repeats(2, 3, lambda images: images.flatten(1))
    evaluator = make(repeats=repeats)
    found = evaluator.evaluate(3).diversity
    assert found is not None and found.shape == (2,) and bool((found > 0).all())
    wider = make(repeats=Repeats(9, 3, repeats.features)).evaluate(3).diversity
    assert wider is not None and len(wider) == 3 and torch.allclose(wider[:2], found, atol=1e-5)
    summary = evaluator.evaluate(2).summary()
    assert summary["diversity"]["mean"] == pytest.approx(float(found.mean()), abs=1e-5)
    assert make().evaluate(2).diversity is None and "diversity" not in make().evaluate(2).means()


def test_roughness_is_of_each_image(run: Run) -> None:
    evaluation = run()
    assert evaluation.roughness is not None
    torch.testing.assert_close(evaluation.roughness, laplacian(evaluation.images))
