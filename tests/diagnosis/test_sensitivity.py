import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from customized_grpo.algorithm import ode_step, sde_step
from customized_grpo.diagnosis import Sensitivity, calibrated_weights, measure
from customized_grpo.diagnosis.gradients import FRESH_NOISE
from customized_grpo.diagnosis.sensitivity import group_variances
from customized_grpo.errors import UserError
from customized_grpo.evaluation.statistics import t_interval
from customized_grpo.randomness import batched_normal
from customized_grpo.rewards.reward import Reward
from customized_grpo.training.rollout import encode_samples
from customized_grpo.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer[Any]]
RewardOf = Callable[[Callable[[Tensor], Tensor]], Reward]
NAMES = ("prompt", "identity")


def brightness(images: Tensor) -> Tensor:
    return images.mean((2, 3, 4))


def redness(images: Tensor) -> Tensor:
    return images[:, :, 0].mean((2, 3)) - images[:, :, 2].mean((2, 3))


def measured(trainer: Trainer[Any], **counts: Any) -> Sensitivity:
    parts = (trainer.config, trainer.policy, trainer.rewards, trainer.dataset)
    return measure(*parts, **{"prompts": 2, "group_size": 3} | counts)


@torch.no_grad()
def branched(trainer: Trainer[Any], step: int, prompt: int, sample: int) -> Tensor:
    """One image of a group branched at `step`: written from the definition."""
    config, policy, sigmas = trainer.config, trainer.policy, trainer.sigmas
    condition = encode_samples(policy, trainer.dataset, trainer.samples(0)).take(torch.tensor([prompt]))
    key = (config.seed, FRESH_NOISE, [prompt])
    x = batched_normal(*key, [0], "initial noise", policy.latent_shape)
    for i in range(config.rollout.num_steps):
        velocity = policy.velocity(x, sigmas[i].view(1), condition)
        if i == step:
            noise = batched_normal(*key, [sample], f"step {i}", policy.latent_shape)
            options = {"kind": config.rollout.sde, "eta": config.rollout.eta}
            x = sde_step(x, velocity, sigmas[i], sigmas[i + 1], noise=noise, **options).next_x
        else:
            x = ode_step(x, velocity, sigmas[i], sigmas[i + 1])
    return policy.decode(x)[0]


def test_variances_are_those_of_groups_branched_at_a_step(make_trainer: MakeTrainer, reward_of: RewardOf) -> None:
    """Whatever initial noise training uses."""
    trainer = make_trainer({"rollout.same_initial_noise": False}, [reward_of(brightness), reward_of(redness)])
    found = measured(trainer)
    for prompt in range(2):
        for step in range(3):
            images = torch.stack([branched(trainer, step, prompt, sample) for sample in range(3)]).unsqueeze(0)
            for index, reward in enumerate((brightness, redness)):
                expected = statistics.variance(reward(images)[0].double().tolist())
                assert found.variances[prompt, step, index] == pytest.approx(expected, rel=1e-2)


def test_a_reward_of_known_spread_has_it_at_every_step(make_trainer: MakeTrainer, reward_of: RewardOf) -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [0.0, 2.0, 4.0]])
    found = measured(make_trainer(None, [reward_of(lambda images: values), reward_of(lambda images: 10 * values)]))
    assert np.allclose(found.variances, np.array([1.0, 4.0])[:, None, None] * np.array([1.0, 100.0]))
    assert np.allclose(found.shares(), 1 / 3) and np.allclose(found.centres(), 1.0)
    assert np.allclose(calibrated_weights(found.shares(), (0.4, 0.6), NAMES), [[0.4, 0.6]] * 4)


def test_the_sampler_decides_the_groups_and_the_command_their_size(
    make_trainer: MakeTrainer, reward_of: RewardOf
) -> None:
    seen: list[torch.Size] = []

    def spied(images: Tensor) -> Tensor:
        seen.append(images.shape[:2])
        return brightness(images)

    trainer = make_trainer(None, [reward_of(spied), reward_of(redness)])
    heard: list[tuple[int, int]] = []
    three = measured(trainer, prompts=3, group_size=2, on_progress=lambda done, of: heard.append((done, of)))
    assert three.variances.shape == (3, 3, 2) and np.isfinite(three.variances).all()
    assert seen == [(2, 2)] * 3 + [(1, 2)] * 3
    assert heard == [(n + 1, 6) for n in range(6)]
    two = measured(trainer, group_size=2)
    assert np.allclose(three.variances[:2], two.variances, rtol=1e-4)


def test_failed_rewards_are_left_out(make_trainer: MakeTrainer, reward_of: RewardOf) -> None:
    values = torch.tensor([[1.0, torch.nan, 3.0], [torch.nan, torch.nan, 4.0]])
    found = measured(
        make_trainer({"rewards.prompt.max_invalid_share": 0.9}, [reward_of(lambda images: values), reward_of(redness)])
    )
    assert np.allclose(found.variances[0, :, 0], 2.0) and np.isnan(found.variances[1, :, 0]).all()
    assert np.allclose(found.means()[:, 0], 2.0) and np.isfinite(found.share_intervals()).all()


@pytest.mark.parametrize(
    ("counts", "message"),
    [({"prompts": 1}, "prompts: 1"), ({"prompts": 13}, "2 .* to 12"), ({"group_size": 1}, "group_size: .* 1 has no")],
)
def test_counts_that_give_no_answer(make_trainer: MakeTrainer, counts: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measured(make_trainer(), **counts)


rewards_of_a_group = st.lists(st.floats(-10, 10), min_size=2, max_size=9)


@given(rewards_of_a_group, st.integers(0, 2**9 - 1))
@settings(max_examples=60, deadline=None)
def test_group_variances_are_unbiased_over_the_valid(values: list[float], hidden: int) -> None:
    rewards = torch.tensor(values, dtype=torch.float64).view(1, -1, 1)
    valid = torch.tensor([not hidden >> n & 1 for n in range(len(values))]).view(1, -1, 1)
    found = group_variances(torch.where(valid, rewards, math.nan), valid)[0, 0]
    kept = [value for value, good in zip(values, valid.flatten(), strict=True) if good]
    if len(kept) < 2:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(statistics.variance(kept), rel=1e-9, abs=1e-20)


def test_rounding_is_no_variance() -> None:
    one = torch.tensor(0.7)
    wobbling = torch.stack([one, torch.nextafter(one, torch.tensor(1.0)), one, one]).view(1, 4, 1)
    assert group_variances(wobbling, torch.ones(1, 4, 1, dtype=torch.bool)) == 0


# curves and intervals


def made(seed: int = 0, prompts: int = 10, steps: int = 6) -> Sensitivity:
    spread = np.random.default_rng(seed).gamma(2.0, size=(prompts, steps, 2))
    return Sensitivity(spread * np.linspace([3.0, 1.0], [1.0, 3.0], steps), NAMES)


def test_means_have_t_intervals_over_prompts() -> None:
    sensitivity = made()
    for step in range(6):
        for reward in range(2):
            expected = t_interval(sensitivity.variances[:, step, reward])
            assert sensitivity.intervals()[step, reward] == pytest.approx(expected)
    assert np.allclose(sensitivity.means(), sensitivity.intervals()[..., 0])


def test_shares_are_those_of_the_mean_variances() -> None:
    sensitivity = made()
    mean = sensitivity.variances.mean(0)
    assert np.allclose(sensitivity.shares(), mean / mean.sum(0))
    share, low, high = np.moveaxis(sensitivity.share_intervals(), -1, 0)
    assert (low < share).all() and (share < high).all() and (low > 0).all() and (high < 1).all()
    assert np.array_equal(made().share_intervals(), sensitivity.share_intervals())


def test_a_bootstrap_interval_is_as_wide_as_the_spread_of_repeated_measurements() -> None:
    low, high = (made(1, prompts=40).share_intervals()[0, 0, n] for n in (1, 2))
    repeated = [made(seed, prompts=40).shares()[0, 0] for seed in range(200)]
    assert (high - low) / (4 * np.std(repeated)) == pytest.approx(1.0, abs=0.3)


def test_prompts_that_agree_leave_no_doubt() -> None:
    one = made(prompts=1).variances
    intervals = Sensitivity(np.repeat(one, 5, axis=0), NAMES).share_intervals()
    assert np.allclose(intervals, intervals[..., :1])


def test_centres_tell_early_from_late() -> None:
    variances = np.zeros((4, 5, 2))
    variances[:, 0, 0], variances[:, 4, 1] = 2.0, 3.0
    sensitivity = Sensitivity(variances, NAMES)
    assert sensitivity.centres().tolist() == [0.0, 4.0]
    assert sensitivity.centre_difference() == (4.0, 4.0, 4.0)
    gap, low, high = made().centre_difference()
    prompt, identity = made().centres()
    assert gap == pytest.approx(identity - prompt) and 0 < low < gap < high


# calibrated weights

share = st.floats(0.01, 1.0)
constants = st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0))


@given(st.lists(st.tuples(share, share), min_size=2, max_size=12), constants)
@settings(max_examples=80, deadline=None)
def test_the_mean_weights_are_the_constant_ones(
    pairs: list[tuple[float, float]], constant: tuple[float, float]
) -> None:
    shares = np.array(pairs) / np.sum(pairs, axis=0)
    weights = calibrated_weights(shares, constant, NAMES)
    assert weights.shape == (len(pairs) + 1, 2) and (weights >= 0).all()
    assert weights[:-1].mean(0) == pytest.approx(constant, rel=1e-12)
    assert weights[-1].tolist() == list(constant)
    relative = [[own / (prompt + identity) for own in (prompt, identity)] for prompt, identity in shares]
    scale = weights[:-1] / np.array(relative)
    assert np.allclose(scale, scale[0], rtol=1e-9)


def test_calibrated_weights_of_an_example() -> None:
    weights = calibrated_weights([[0.6, 0.2], [0.4, 0.8]], (0.5, 0.5), NAMES)
    prompt, identity = np.array([0.75, 1 / 3]), np.array([0.25, 2 / 3])
    expected = np.stack([prompt * 0.5 / prompt.mean(), identity * 0.5 / identity.mean()], axis=1)
    assert np.allclose(weights, [*expected, [0.5, 0.5]])


def test_a_step_that_decides_nothing_keeps_the_constant_weights() -> None:
    weights = calibrated_weights([[0.5, 0.9], [0.0, 0.0], [0.5, 0.1]], (0.4, 0.6), NAMES)
    assert weights[1].tolist() == [0.4, 0.6]
    assert np.allclose(weights[:-1].mean(0), [0.4, 0.6])


@pytest.mark.parametrize(
    ("shares", "name"), [([[0.0, 0.5], [0.0, 0.5]], "prompt"), ([[0.5, math.nan], [0.5, math.nan]], "identity")]
)
def test_a_reward_without_variance_has_no_weights(shares: list[list[float]], name: str) -> None:
    with pytest.raises(UserError, match=f"the {name} reward does not vary"):
        calibrated_weights(shares, (0.5, 0.5), NAMES)


def test_a_constant_reward_is_told(make_trainer: MakeTrainer, reward_of: RewardOf) -> None:
    flat = reward_of(lambda images: torch.ones(images.shape[:2]))
    shares = measured(make_trainer(None, [reward_of(brightness), flat])).shares()
    with pytest.raises(UserError, match="the identity reward does not vary"):
        calibrated_weights(shares, (0.5, 0.5), NAMES)
