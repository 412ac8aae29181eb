from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from customized_grpo.algorithm import ode_step, sde_step, shift_sigmas
from customized_grpo.config.rollout import RolloutConfig, SubsetConfig, WindowConfig
from customized_grpo.errors import NotFinite
from customized_grpo.policies.sampling import sample_ode
from customized_grpo.randomness import batched_normal
from customized_grpo.toybox.network import Context
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.training.rollout import Plan, Rollout, plan_steps, sample_groups

PROMPTS = ["a star on the beach", "a ghost in space wearing a crown", "a drop in the snow, on the left"]
SEED, ITERATION = 5, 2
WINDOW = {"trained_steps": "window", "window": WindowConfig(start=2, size=2), "same_initial_noise": True}
ALL_STEPS = SubsetConfig(timestep_fraction=1.0)


@pytest.fixture
def policy(make_policy: Callable[..., ToyBoxPolicy]) -> ToyBoxPolicy:
    return make_policy()


@pytest.fixture
def condition(policy: ToyBoxPolicy) -> Context:
    return policy.encode(PROMPTS, torch.rand(3, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def settings(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"group_size": 4, "num_steps": 6, "micro_batch": 36} | changes)


def rolled(policy: ToyBoxPolicy, condition: Context, config: RolloutConfig) -> tuple[Rollout[Context], Plan]:
    plan = plan_steps(config, policy.sigmas(config.num_steps, config.shift), SEED, ITERATION)
    rollout = sample_groups(policy, condition, len(PROMPTS), plan, config, seed=SEED, iteration=ITERATION)
    return rollout, plan


@torch.no_grad()
def one_by_one(policy: ToyBoxPolicy, condition: Context, config: RolloutConfig, plan: Plan) -> Tensor:
    """Images [P * G, 3, H, W] when every sample walks alone from its first step: written from the definition."""
    images = []
    for prompt in range(len(PROMPTS)):
        for sample in range(config.group_size):
            first = 0 if config.same_initial_noise else sample
            x = batched_normal(SEED, ITERATION, [prompt], [first], "initial noise", policy.latent_shape)
            for i in range(config.num_steps):
                sigma, sigma_next = plan.sigmas[i], plan.sigmas[i + 1]
                velocity = policy.velocity(x, sigma.view(1), condition.take(torch.tensor([prompt])))
                if i in plan.stochastic:
                    noise = batched_normal(SEED, ITERATION, [prompt], [sample], f"step {i}", policy.latent_shape)
                    step = sde_step(x, velocity, sigma, sigma_next, kind=config.sde, eta=config.eta, noise=noise)
                    x = step.next_x
                else:
                    x = ode_step(x, velocity, sigma, sigma_next)
            images.append(policy.decode(x))
    return torch.cat(images)


@pytest.mark.parametrize("changes", [{}, {"same_initial_noise": True}, WINDOW], ids=["subset", "shared", "window"])
def test_micro_batches_change_nothing(policy: ToyBoxPolicy, condition: Context, changes: dict[str, Any]) -> None:
    whole, _ = rolled(policy, condition, settings(**changes))
    for size in (1, 5):
        parts, _ = rolled(policy, condition, settings(**changes, micro_batch=size))
        for name in ("images", "states", "next_states", "log_probs"):
            assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-5), name


@pytest.mark.parametrize("kind", ["dance", "flow", "cps"])
@pytest.mark.parametrize("start", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_shared_prefix_gives_the_images_of_samples_walked_alone(
    policy: ToyBoxPolicy, condition: Context, start: int, kind: str
) -> None:
    config = settings(**WINDOW | {"window": WindowConfig(start=start, size=2), "sde": kind})
    rollout, plan = rolled(policy, condition, config)
    found, expected = rollout.images.flatten(0, 1), one_by_one(policy, condition, config, plan)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    difference = ((found * 255).round() - (expected * 255).round()).abs()
    assert difference.max() <= 1 and difference.count_nonzero() <= 1e-4 * difference.numel()
    groups, size, steps = len(PROMPTS), config.group_size, config.num_steps
    assert rollout.num_forward_evals == groups * start + groups * size * (steps - start)


def test_separate_noises_share_nothing(policy: ToyBoxPolicy, condition: Context) -> None:
    config = settings(**WINDOW | {"same_initial_noise": False})
    rollout, plan = rolled(policy, condition, config)
    assert torch.allclose(rollout.images.flatten(0, 1), one_by_one(policy, condition, config, plan), atol=1e-5)
    assert rollout.num_forward_evals == len(PROMPTS) * config.group_size * config.num_steps


def test_the_generator_is_asked_only_for_the_forwards_counted(
    policy: ToyBoxPolicy, condition: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, velocity = [], policy.velocity
    monkeypatch.setattr(policy, "velocity", lambda x, *rest: (asked.append(len(x)), velocity(x, *rest))[1])
    rollout, _ = rolled(policy, condition, settings(**WINDOW))
    assert sum(asked) == rollout.num_forward_evals == 3 * 2 + 12 * 4


def test_a_group_starts_together_or_apart(policy: ToyBoxPolicy, condition: Context) -> None:
    for together in (True, False):
        config = settings(same_initial_noise=together, subset=ALL_STEPS)
        first = rolled(policy, condition, config)[0].states[0].unflatten(0, (3, 4))
        assert torch.equal(first[:, 0], first[:, 1]) == together
        assert not torch.equal(first[0, 0], first[1, 0])


def test_images_of_a_group_differ(policy: ToyBoxPolicy, condition: Context) -> None:
    images = rolled(policy, condition, settings(**WINDOW))[0].images
    assert images.shape == (3, 4, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    assert images.std(1).mean() > 0.01


@pytest.mark.parametrize("kind", ["dance", "flow", "cps"])
def test_kept_steps_lead_to_their_next_states_with_their_log_probabilities(
    policy: ToyBoxPolicy, condition: Context, kind: str
) -> None:
    config = settings(sde=kind, subset=ALL_STEPS)
    rollout, plan = rolled(policy, condition, config)
    rows = torch.arange(12) // 4
    assert plan.trained == (0, 1, 2, 3, 4) and rollout.states.shape == (5, 12, 3, 32, 32)
    assert torch.equal(rollout.states[1:], rollout.next_states[:-1])
    for index, step in enumerate(plan.trained):
        sigma, sigma_next = plan.sigmas[step], plan.sigmas[step + 1]
        with torch.no_grad():
            velocity = policy.velocity(rollout.states[index], sigma.expand(12), condition.take(rows))
        again = sde_step(
            rollout.states[index], velocity, sigma, sigma_next, kind=kind, eta=config.eta,
            next_x=rollout.next_states[index],
        )  # fmt: skip
        assert torch.allclose(again.log_prob, rollout.log_probs[index], rtol=0, atol=1e-5)


def test_nothing_is_kept_for_the_gradient(policy: ToyBoxPolicy, condition: Context) -> None:
    rollout, _ = rolled(policy, condition, settings())
    assert not any(getattr(rollout, name).requires_grad for name in ("states", "next_states", "log_probs", "images"))


def test_seed_and_iteration_name_the_noise(policy: ToyBoxPolicy, condition: Context) -> None:
    config = settings(subset=ALL_STEPS)
    plan = plan_steps(config, policy.sigmas(6, 2.0), 0, 0)
    images = [
        sample_groups(policy, condition, 3, plan, config, seed=seed, iteration=iteration).images
        for seed, iteration in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.allclose(images[0], images[2], atol=1e-2) and not torch.allclose(images[0], images[3], atol=1e-2)


def test_progress_ends_at_one(policy: ToyBoxPolicy, condition: Context) -> None:
    heard: list[float] = []
    config = settings(micro_batch=5)
    plan = plan_steps(config, policy.sigmas(6, 2.0), 0, 0)
    sample_groups(policy, condition, 3, plan, config, seed=0, iteration=0, on_progress=heard.append)
    assert heard == sorted(heard) and heard[-1] == 1.0


def test_deterministic_images_do_not_depend_on_micro_batches(policy: ToyBoxPolicy, condition: Context) -> None:
    noise, sigmas = torch.randn(3, *policy.latent_shape), policy.sigmas(4, 2.0)
    whole = sample_ode(policy, condition, noise, sigmas, 8)
    assert torch.allclose(sample_ode(policy, condition, noise, sigmas, 1), whole, rtol=0, atol=1e-5)
    assert torch.equal(sample_ode(policy, condition, noise, sigmas, 8), whole)


# the plan

SIGMAS = shift_sigmas(10, 2.0)
TEN = RolloutConfig(num_steps=10)


def plans(config: RolloutConfig, iterations: int, seed: int = 0) -> list[Plan]:
    return [plan_steps(config, SIGMAS, seed, iteration) for iteration in range(iterations)]


@pytest.mark.parametrize(("share", "size"), [(0.6, 5), (1.0, 9), (0.01, 1)])
def test_a_subset_has_its_share_of_the_trainable_steps_in_order(share: float, size: int) -> None:
    for plan in plans(TEN.model_copy(update={"subset": SubsetConfig(timestep_fraction=share)}), 20):
        assert len(plan.trained) == len(set(plan.trained)) == size
        assert list(plan.trained) == sorted(plan.trained)
        assert plan.stochastic == tuple(range(9))


def test_subsets_differ_from_iteration_to_iteration_and_reach_every_step() -> None:
    drawn = [plan.trained for plan in plans(TEN, 40)]
    assert len(set(drawn)) > 20
    assert {step for steps in drawn for step in steps} == set(range(9))


def test_a_plan_is_a_function_of_seed_and_iteration() -> None:
    assert plan_steps(TEN, SIGMAS, 0, 7).trained == plans(TEN, 10)[7].trained
    assert [p.trained for p in plans(TEN, 10)] != [p.trained for p in plans(TEN, 10, seed=1)]


def test_a_window_slides_on_every_period_and_comes_round() -> None:
    config = TEN.model_copy(update={"trained_steps": "window", "window": WindowConfig(size=7, period=2)})
    assert [plan.stochastic[0] for plan in plans(config, 8)] == [0, 0, 1, 1, 2, 2, 0, 0]
    assert all(plan.trained == plan.stochastic and len(plan.trained) == 7 for plan in plans(config, 8))


def test_a_fixed_window_stays() -> None:
    config = TEN.model_copy(update={"trained_steps": "window", "window": WindowConfig(size=3, start=4)})
    assert {plan.trained for plan in plans(config, 12)} == {(4, 5, 6)}
    assert plans(config, 1)[0].num_prefix_steps == 4


@pytest.mark.parametrize("steps", ["subset", "window"])
def test_the_last_step_is_never_stochastic(steps: str) -> None:
    config = TEN.model_copy(
        update={"trained_steps": steps, "window": WindowConfig(size=2, period=1), "subset": ALL_STEPS}
    )
    assert max(step for plan in plans(config, 30) for step in plan.stochastic) == 8


def test_a_group_does_not_depend_on_the_others(policy: ToyBoxPolicy, condition: Context) -> None:
    config = settings()
    plan = plan_steps(config, policy.sigmas(6, 2.0), 0, 0)
    whole = sample_groups(policy, condition, 3, plan, config, seed=0, iteration=0).images
    smaller = sample_groups(policy, condition, 2, plan, config, seed=0, iteration=0).images
    assert torch.allclose(whole[:2], smaller, rtol=0, atol=1e-5)


class Breaking:
    """A policy whose velocity is `value` for one sample of a batch."""

    def __init__(self, policy: ToyBoxPolicy, value: float) -> None:
        self._policy, self._value = policy, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Context) -> Tensor:
        velocity = self._policy.velocity(latents, sigma, condition)
        velocity[0, 0, 0, 0] = self._value
        return velocity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pictures_that_are_not_finite_are_not_handed_on(policy: ToyBoxPolicy, condition: Context, value: float) -> None:
    """Of an infinite latent the picture is a white or black pixel, which every reward would score."""
    broken = Breaking(policy, value)
    with pytest.raises(NotFinite, match=r"1 of 3 pictures .* not finite.*policy\.precision.*learning_rate.*adapter"):
        sample_ode(broken, condition, torch.zeros(3, *policy.latent_shape), policy.sigmas(4, None), 3)
    with pytest.raises(NotFinite, match="1 of 12 pictures"):
        rolled(broken, condition, settings())  # type: ignore[arg-type]
