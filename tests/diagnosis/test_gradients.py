from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from customized_grpo.algorithm import group_advantages
from customized_grpo.config.run import Config
from customized_grpo.diagnosis import GradientConflict, measure_conflict
from customized_grpo.diagnosis.gradients import FRESH_NOISE
from customized_grpo.rewards.reward import Reward
from customized_grpo.training.rollout import Plan, encode_samples, sample_groups
from customized_grpo.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer[Any]]
RewardOf = Callable[[Callable[[Tensor], Tensor]], Reward]


def brightness(images: Tensor) -> Tensor:
    return images.mean((2, 3, 4))


def redness(images: Tensor) -> Tensor:
    return images[:, :, 0].mean((2, 3)) - images[:, :, 2].mean((2, 3))


@pytest.fixture
def nudged(make_trainer: MakeTrainer, reward_of: RewardOf) -> MakeTrainer:
    """A trainer of two rewards whose LoRA factors have left their start, where half of all gradients are zero."""

    def make(changes: dict[str, Any] | None = None, rewards: list[Reward] | None = None) -> Trainer[Any]:
        trainer = make_trainer(
            {"rollout.num_steps": 3} | (changes or {}), rewards or [reward_of(brightness), reward_of(redness)]
        )
        noise = torch.Generator().manual_seed(3)
        for _, parameter in trainer.policy.trainable_parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
        return trainer

    return make


def conflict_of(trainer: Trainer[Any], batches: int = 1, **options: Any) -> GradientConflict:
    parts = (trainer.config, trainer.policy, trainer.rewards, trainer.dataset)
    return measure_conflict(*parts, batches=batches, **options)


def clipped_gradient(trainer: Trainer[Any], rollout: Any, advantages: Tensor, items: Tensor) -> Tensor:
    """The gradient that the trainer's own clipped objective of `advantages` [B, S] leaves in `.grad`."""
    parameters = [parameter for _, parameter in trainer.policy.trainable_parameters()]
    for parameter in parameters:
        parameter.grad = None
    targets = trainer.objective.targets(trainer.policy, rollout, advantages, [items])
    trainer.objective.loss(trainer.policy, targets, items).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def test_gradients_are_those_of_the_clipped_objective_of_one_reward(nudged: MakeTrainer) -> None:
    trainer = nudged()
    found = conflict_of(trainer, 2)
    config, plan = trainer.config, Plan(trainer.sigmas, (0, 1), (0, 1))
    samples = trainer.samples(1)
    condition, batch = encode_samples(trainer.policy, trainer.dataset, samples), trainer.batch(samples)
    rollout = sample_groups(
        trainer.policy, condition, 2, plan, config.rollout, seed=config.seed, iteration=FRESH_NOISE + 1
    )
    rewards = trainer.scorer.score(rollout.images, batch)
    advantages = group_advantages(rewards.values, rewards.valid).flatten(0, 1).T

    def check(gradients: Tensor, cosine: float, norms: Sequence[float]) -> None:
        assert cosine == pytest.approx(float(torch.cosine_similarity(*gradients, 0)), abs=1e-5)
        assert norms == pytest.approx(gradients.norm(dim=1).tolist(), rel=1e-4)

    by_step = []
    for step in (0, 1):
        items = torch.cartesian_prod(torch.tensor([step]), torch.arange(8))
        own = [clipped_gradient(trainer, rollout, each.expand(2, 8).T, items) for each in advantages]
        by_step.append(torch.stack(own))
        check(by_step[-1], found.cosines[1, step], found.norms[1, step])
    check(torch.stack(by_step).sum(0), found.whole_cosines[1], found.whole_norms[1])
    assert found.advantage_cosines[1] == pytest.approx(float(torch.cosine_similarity(*advantages, 0)), abs=1e-6)


def test_of_three_rewards_the_cosine_is_the_mean_over_pairs(nudged: MakeTrainer, reward_of: RewardOf) -> None:
    kind = {"kind": "toybox_prompt"}
    trainer = nudged()
    config = Config.model_validate(
        trainer.config.model_dump() | {"rewards": dict.fromkeys(("bright", "red", "dark"), kind)}
    )
    dark = reward_of(lambda images: -brightness(images))
    three = {"bright": reward_of(brightness), "red": reward_of(redness), "dark": dark}

    def of(*names: str) -> GradientConflict:
        rewards = {name: three[name] for name in names}
        return measure_conflict(config, trainer.policy, rewards, trainer.dataset, batches=1)

    found, pairs = of(*three), [of(*pair) for pair in combinations(three, 2)]
    assert found.norms.shape == (1, 2, 3)
    for field in ("cosines", "whole_cosines", "advantage_cosines"):
        assert np.allclose(getattr(found, field), np.mean([getattr(pair, field) for pair in pairs], 0), atol=1e-4)


@pytest.mark.parametrize(("sign", "cosine"), [(1.0, 1.0), (-1.0, -1.0)])
def test_equal_rewards_agree_and_opposite_ones_conflict(
    nudged: MakeTrainer, reward_of: RewardOf, sign: float, cosine: float
) -> None:
    trainer = nudged(None, [reward_of(brightness), reward_of(lambda images: 3 + 5 * sign * brightness(images))])
    found = conflict_of(trainer)
    for values in (found.cosines, found.whole_cosines, found.advantage_cosines):
        assert np.allclose(values, cosine, atol=1e-4)
    assert np.allclose(found.norms[..., 0], found.norms[..., 1], rtol=1e-3)


def test_micro_batches_change_nothing(nudged: MakeTrainer) -> None:
    whole, parts = conflict_of(nudged()), conflict_of(nudged({"optimizer.micro_batch": 3}))
    for name in ("cosines", "norms", "whole_cosines", "whole_norms"):
        assert np.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-5), name


def test_weights_and_their_gradients_stay_as_they_are(nudged: MakeTrainer) -> None:
    trainer = nudged()
    parameters = [parameter for _, parameter in trainer.policy.trainable_parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in parameters]
    conflict_of(trainer)
    assert all(torch.equal(p, b) and (p.grad == 1).all() for p, b in zip(parameters, before, strict=True))


def test_lora_factors_that_have_no_gradient_yet_are_no_obstacle(make_trainer: MakeTrainer) -> None:
    found = conflict_of(make_trainer({"rollout.num_steps": 3}))
    assert np.isfinite(found.cosines).all() and (found.norms > 0).all() and (np.abs(found.cosines) <= 1).all()


def test_a_reward_that_says_nothing_has_no_direction(nudged: MakeTrainer, reward_of: RewardOf) -> None:
    flat = reward_of(lambda images: torch.ones(images.shape[:2]))
    found = conflict_of(nudged(None, [reward_of(brightness), flat]))
    assert np.isnan(found.cosines).all() and np.isnan(found.advantage_cosines).all()
    assert (found.norms[..., 1] == 0).all() and (found.norms[..., 0] > 0).all()


def test_a_sample_with_a_failed_reward_is_left_out(nudged: MakeTrainer, reward_of: RewardOf) -> None:
    def partly(images: Tensor) -> Tensor:
        values = redness(images)
        values[0, 1] = torch.nan
        return values

    found = conflict_of(nudged(None, [reward_of(brightness), reward_of(partly)]))
    assert np.isfinite(found.cosines).all()
    assert not np.allclose(found.cosines, conflict_of(nudged()).cosines, atol=1e-3)


def test_batches_are_independent_and_repeatable(nudged: MakeTrainer) -> None:
    heard: list[tuple[int, int]] = []
    two = conflict_of(nudged(), 2, on_progress=lambda done, of: heard.append((done, of)))
    assert heard == [(n + 1, 4) for n in range(4)]
    assert np.array_equal(two.cosines[:1], conflict_of(nudged()).cosines)
    assert len(np.unique(two.cosines)) == 4
