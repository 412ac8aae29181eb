import math
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from customized_grpo.algorithm import Gaussian, transition
from customized_grpo.errors import TrainingError
from customized_grpo.io.jsonl import Metrics
from customized_grpo.rewards.reward import Reward
from customized_grpo.rewards.scoring import GroupRewards
from customized_grpo.training.objectives import grpo
from customized_grpo.training.objectives.objective import Loss
from customized_grpo.training.rollout import Plan
from customized_grpo.training.trainer import RATIO_TOLERANCE, Trainer

FULL = {"policy.toybox.adapter": "full", "policy.lora_rank": 32}
"""All weights are trained; the rank, which is then nothing's, is as it is left out."""
MakeTrainer = Callable[..., Trainer[Any]]
RewardOf = Callable[[Callable[[Tensor], Tensor]], Reward]


CONSTANT = {
    f"rewards.{name}.{field}": value
    for name in ("prompt", "identity")
    for field, value in (("schedule", "constant"), ("weight", 0.5))
}


def brightness(images: Tensor) -> Tensor:
    return images.mean((2, 3, 4))


def redness(images: Tensor) -> Tensor:
    return images[:, :, 0].mean((2, 3)) - images[:, :, 2].mean((2, 3))


def step(trainer: Trainer[Any]) -> Metrics:
    """An iteration's metrics without times."""
    metrics = trainer.train_step()
    return {k: v for k, v in metrics.items() if not k.startswith("seconds/") and k != "samples_per_second"}


def weights(trainer: Trainer[Any]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for _, parameter in trainer.policy.trainable_parameters()])


def gradients(trainer: Trainer[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Metrics, Tensor]:
    """The metrics of an iteration, and the gradient its optimiser step saw."""
    kept: list[Tensor] = []

    def keep() -> None:
        kept.append(torch.cat([p.grad.flatten().clone() for _, p in trainer.policy.trainable_parameters()]))

    monkeypatch.setattr(trainer.optimizer, "step", keep)
    return step(trainer), torch.cat(kept)


class Watched:
    """The objective of a trainer, which keeps what it is given; with `everything`, each sample matters to it."""

    def __init__(self, trainer: Trainer[Any], *, everything: bool = False, factor: float = 1.0) -> None:
        self._objective, self._everything, self._factor = trainer.objective, everything, factor
        self.items: list[tuple[int, int]] = []
        trainer.objective = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def matters(self, advantages: Tensor) -> Tensor:
        found = self._objective.matters(advantages)
        return torch.ones_like(found) if self._everything else found

    def targets(self, policy: Any, rollout: Any, advantages: Tensor, micro_batches: Any) -> Any:
        self.rollout, self.advantages = rollout, advantages
        return self._objective.targets(policy, rollout, advantages, micro_batches)

    def loss(self, policy: Any, targets: Any, items: Tensor) -> Loss:
        self.items += map(tuple, items.tolist())
        loss = self._objective.loss(policy, targets, items)
        return loss._replace(loss=loss.loss * self._factor)


def advantages_of(trainer: Trainer[Any]) -> Tensor:
    """The advantages [P, G, S] that the next iteration trains with."""
    watched = Watched(trainer)
    trainer.train_step()
    return watched.advantages.unflatten(0, watched.rollout.images.shape[:2])


# determinism


@pytest.mark.parametrize("changes", [{}, FULL | {"policy.precision": "bf16"}], ids=["lora", "full"])
def test_equal_seeds_train_bitwise_the_same(make_trainer: MakeTrainer, changes: dict[str, Any]) -> None:
    first, second = make_trainer(changes), make_trainer(changes)
    for _ in range(2):
        metrics = step(first)
        torch.rand(5)
        assert step(second) == metrics
    assert torch.equal(weights(first), weights(second))


def test_another_seed_trains_otherwise(make_trainer: MakeTrainer) -> None:
    assert step(make_trainer()) != step(make_trainer({"seed": 1}))


@pytest.mark.parametrize("field", ["rollout.micro_batch", "optimizer.micro_batch"])
@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_agree(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, field: str, size: int) -> None:
    whole, gradient = gradients(make_trainer({"objective.clip_range": 1.0}), monkeypatch)
    parts, others = gradients(make_trainer({"objective.clip_range": 1.0, field: size}), monkeypatch)
    assert torch.allclose(others, gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


PINNED = {
    "reward/prompt/mean": (-0.149636, -0.118593, -0.14034),
    "reward/identity/mean": (0.802794, 0.741537, 0.755973),
    "reward/identity/std": (0.0398194, 0.0487586, 0.0240514),
    "loss": (-0.00257434, 0.13241, 0.0706883),
    "kl": (2.41873e-06, 7.72173e-06, 0.000132673),
    "grad_norm": (0.00378331, 0.00294996, 0.0106),
    "clip_fraction": (0.125, 0, 0.0625),
    "conflict_rate": (0.25, 0.75, 0.375),
}
"""Three iterations of a small run, as an earlier version of the trainer computed them."""


def test_a_run_computes_what_it_always_did(make_trainer: MakeTrainer) -> None:
    """Under a KL penalty, with two updates of an iteration and micro-batches of uneven sizes."""
    changes = {
        "objective.kl_weight": 0.1, "optimizer.num_minibatches": 2, "optimizer.micro_batch": 5,
        "optimizer.learning_rate": 1e-3,
    }  # fmt: skip
    trainer = make_trainer(changes)
    rows = [step(trainer) for _ in range(3)]
    assert [row["steps"] for row in rows] == [[0, 1], [0, 1], [1, 2]]
    for name, values in PINNED.items():
        assert [row[name] for row in rows] == pytest.approx(values, rel=1e-2, abs=1e-9), name


# the ratio


def test_the_first_pass_ratio_is_exactly_one(make_trainer: MakeTrainer) -> None:
    metrics = step(make_trainer({"optimizer.micro_batch": 8, "rollout.micro_batch": 8}))
    assert metrics["first_ratio/min"] == metrics["first_ratio/max"] == 1.0
    assert metrics["clip_fraction"] == 0.0


@pytest.mark.parametrize("sde", ["dance", "flow", "cps"])
@pytest.mark.parametrize("same_noise", [True, False])
def test_the_first_pass_ratio_is_one_for_every_sampler(make_trainer: MakeTrainer, sde: str, same_noise: bool) -> None:
    changes = {
        "rollout.sde": sde,
        "rollout.same_initial_noise": same_noise,
        "rollout.trained_steps": "window",
        "rollout.window.size": 2,
    }
    trainer = make_trainer(changes)
    for _ in range(2):
        metrics = step(trainer)
        for name in ("first_ratio/min", "first_ratio/max"):
            assert metrics[name] == pytest.approx(1.0, abs=RATIO_TOLERANCE)


def test_later_updates_of_an_iteration_leave_the_ratio_of_one(make_trainer: MakeTrainer) -> None:
    metrics = step(make_trainer({"optimizer.num_minibatches": 4, "optimizer.learning_rate": 1e-2}))
    assert metrics["first_ratio/max"] == pytest.approx(1.0, abs=RATIO_TOLERANCE)
    assert max(metrics["ratio/max"] - 1, 1 - metrics["ratio/min"]) > 1e-4
    assert 0 < metrics["clip_fraction"] <= 1


def test_every_sample_is_trained_once_on_every_trained_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"optimizer.num_minibatches": 3, "optimizer.micro_batch": 5})
    watched = Watched(trainer)
    steps = trainer.train_step()["steps"]
    assert sorted(watched.items) == [(s, row) for s in range(len(steps)) for row in range(8)]


def test_every_update_has_as_much_of_every_group(make_trainer: MakeTrainer) -> None:
    """So processes, which have whole groups, have equal work in every update."""
    trainer = make_trainer({})
    for prompts, size, updates in ((4, 12, 3), (3, 8, 3), (1, 5, 2)):
        dealt = trainer._minibatch_order(prompts, size)
        assert sorted(dealt.tolist()) == list(range(prompts * size))
        for part in dealt.tensor_split(updates):
            counts = torch.bincount(part // size, minlength=prompts)
            assert counts.max() - counts.min() <= (size % updates > 0)
    before = trainer._minibatch_order(4, 12)
    trainer.iteration += 1
    assert not torch.equal(before, trainer._minibatch_order(4, 12))


def test_what_has_no_advantage_costs_no_backward_pass(make_trainer: MakeTrainer, reward_of: RewardOf) -> None:
    """A silent group and an invalid sample: loss, gradient and weights are those of training on them too."""
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, torch.nan, 2.5]])
    changes = {"optimizer.num_minibatches": 2, "optimizer.micro_batch": 1}
    found = []
    for everything in (False, True):
        trainer = make_trainer(changes, [reward_of(lambda images: values)] * 2)
        watched = Watched(trainer, everything=everything)
        found.append((step(trainer), weights(trainer), {row for _, row in watched.items}))
    (mine, own, trained), (full, others, every) = found
    assert trained == {4, 5, 7} and every == set(range(8))
    assert mine["loss"] == pytest.approx(full["loss"], rel=1e-6) and mine["loss"] != 0
    assert mine["grad_norm"] == pytest.approx(full["grad_norm"], rel=1e-6)
    assert torch.equal(own, others)


def test_an_iteration_in_which_nothing_has_an_advantage_is_one_of_no_gradient(
    make_trainer: MakeTrainer, reward_of: RewardOf
) -> None:
    trainer = make_trainer(None, [reward_of(lambda images: torch.ones(2, 4))] * 2)
    metrics = step(trainer)
    assert metrics["loss"] == metrics["grad_norm"] == 0 and math.isnan(metrics["first_ratio/min"])
    assert trainer.iteration == 1


# advantages


def paper_weight(i: int, num_steps: int) -> float:
    """The prompt's weight at true step i, written from the paper."""
    u = 25 * i / num_steps
    if u < 6:
        return 0.7
    return 0.3 + 0.4 * (1 - 1 / (1 + math.exp(-0.8 * (u - 10)))) if u < 22 else 0.5


def test_weights_belong_to_true_steps(
    make_trainer: MakeTrainer, reward_of: RewardOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each (sample, step) that reaches the objective has the advantage of its own sigma, as the paper weighs it."""
    rank = torch.tensor([1.0, 2.0, 3.0])
    rewards = [reward_of(lambda images: rank.expand(images.shape[:2])), reward_of(lambda images: -rank.expand(2, 3))]
    changes = {
        "rollout.num_steps": 10,
        "rollout.group_size": 3,
        "advantages.sars.gamma": 0.0,
        "optimizer.micro_batch": 7,
    }
    trainer = make_trainer(changes, rewards)
    watched, sigmas, states = Watched(trainer), [], []

    def spied(x: Tensor, velocity: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Gaussian:
        sigmas.append(sigma)
        states.append(x)
        return transition(x, velocity, sigma, *args, **kwargs)

    monkeypatch.setattr(grpo, "transition", spied)
    metrics = trainer.train_step()
    steps = metrics["steps"]
    # Of three, the one at the mean has no advantage and is not trained.
    assert any(paper_weight(i, 10) != 0.7 for i in steps) and len(watched.items) == len(steps) * 4
    for (place, row), sigma, state in zip(watched.items, torch.cat(sigmas), torch.cat(states), strict=True):
        assert sigma == trainer.sigmas[steps[place]] and torch.equal(state, watched.rollout.states[place, row])
        prompt_advantage = row % 3 - 1
        found = float(watched.advantages[row, place])
        assert found == pytest.approx((2 * paper_weight(steps[place], 10) - 1) * prompt_advantage, abs=1e-5)
    # So the state that each step arrives at is its own too.
    assert metrics["first_ratio/min"] == pytest.approx(1, abs=RATIO_TOLERANCE)
    assert metrics["first_ratio/max"] == pytest.approx(1, abs=RATIO_TOLERANCE)


def test_lookup_by_counter_gives_each_sample_its_own_order_of_the_first_rows(make_trainer: MakeTrainer) -> None:
    """As in the published code: the k-th of a sample's shuffled steps takes row k, so late rows are never used."""
    changes = {"rollout.num_steps": 10, "advantages.lookup": "counter", "advantages.shape": "none"}
    table = {"advantages.weights": "table", "advantages.table": {"prompt": list(range(1, 11))}}
    trainer = make_trainer(changes | table | {"rewards.identity.weight": 0})
    values = torch.tensor([[[-1.0], [1.0]] * 16])
    rewards = GroupRewards(("prompt",), values, torch.ones_like(values, dtype=torch.bool))
    plan = Plan(trainer.sigmas, tuple(range(9)), (1, 4, 7))
    found = trainer.advantages(rewards, plan)[0]
    rows = (found.abs() / float(found.abs().min())).round().long()
    assert all(sorted(sample) == [1, 2, 3] for sample in rows.tolist())
    assert len({str(sample) for sample in rows.tolist()}) > 1, "each sample has its own order"
    assert torch.equal(found, trainer.advantages(rewards, plan)[0])
    trainer.iteration += 1
    assert not torch.equal(found, trainer.advantages(rewards, plan)[0])


def test_penalties_are_as_strong_as_the_configuration_says(make_trainer: MakeTrainer, reward_of: RewardOf) -> None:
    """Two images agree (+, +) and (-, -), two are in conflict: with gamma 0 only the bonus is missing."""
    rewards = [reward_of(lambda images: torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 2)),
               reward_of(lambda images: torch.tensor([[1.0, -1.0, -1.0, 1.0]] * 2))]  # fmt: skip
    settings = {"advantages.sars.gamma": 0.0, **CONSTANT}
    plain = advantages_of(make_trainer(settings, rewards))
    shaped = advantages_of(make_trainer(settings | {"advantages.sars.gamma_penalty": 1.0}, rewards))
    penalty = math.tanh(0.75)  # z-scores are +-sqrt(3) / 2
    expected = torch.tensor([0.0, -penalty, -penalty, -penalty])[:, None].expand(2, 4, plain.shape[-1])
    torch.testing.assert_close(shaped - plain, expected)


def test_thresholds_hide_what_lies_above_them(make_trainer: MakeTrainer, reward_of: RewardOf) -> None:
    rewards = [reward_of(brightness), reward_of(lambda images: torch.arange(8.0).view(2, 4))]
    hinged = make_trainer({"rewards.identity.up_to": -1.0, "advantages.sars.gamma": 0.0}, rewards)
    flat = make_trainer({"advantages.sars.gamma": 0.0}, [rewards[0], reward_of(lambda images: torch.ones(2, 4))])
    assert torch.allclose(advantages_of(hinged), advantages_of(flat), atol=1e-6)


# failed rewards


def test_a_failed_reward_gets_no_advantage_and_does_not_reach_the_others(
    make_trainer: MakeTrainer, reward_of: RewardOf
) -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 0.0], [3.0, 1.0, 0.0, 2.0]])

    def identity_of(failed: float) -> Reward:
        return reward_of(lambda images: torch.tensor([[0.5, 0.1, 0.2, failed], [0.1, 0.2, 0.3, 0.4]]))

    found = advantages_of(make_trainer(None, [reward_of(lambda i: values), identity_of(torch.nan)]))
    smaller = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.1, 0.2])  # the group without its fourth image
    assert (found[0, 3] == 0).all() and found.isfinite().all()
    prompt, identity = ((reward - reward.mean()) / reward.std() for reward in smaller)
    bonus = torch.tanh(prompt * identity)
    bonus = 0.4 * torch.where((prompt > 0) | (identity > 0), bonus, -bonus)
    assert torch.allclose(found[0, :3, 0], 0.7 * prompt + 0.3 * identity + bonus, atol=1e-5)


def test_failed_rewards_are_counted_and_left_out_of_the_means(make_trainer: MakeTrainer, reward_of: RewardOf) -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, torch.nan], [1.0, 2.0, 3.0, 2.0]])
    metrics = step(make_trainer(None, [reward_of(lambda images: values), reward_of(brightness)]))
    assert metrics["invalid_share"] == pytest.approx(1 / 16)
    assert metrics["reward/prompt/mean"] == pytest.approx(2.0)
    assert metrics["reward/prompt/std"] == pytest.approx((1.0 + math.sqrt(2 / 3)) / 2)
    assert metrics["reward/identity/std"] > 0 and math.isfinite(metrics["loss"])


def test_too_many_failed_rewards_stop_the_run(make_trainer: MakeTrainer, reward_of: RewardOf) -> None:
    failing = reward_of(lambda images: torch.full(images.shape[:2], torch.nan))
    trainer = make_trainer(None, [failing, reward_of(brightness)])
    before = weights(trainer)
    with pytest.raises(TrainingError, match=r"after iteration 0: 100% of the prompt rewards.*max_invalid_share=50%"):
        trainer.train_step()
    assert torch.equal(weights(trainer), before) and trainer.iteration == 0


# numbers that are not finite


def test_a_loss_that_is_not_finite_touches_nothing(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    before = weights(trainer)
    Watched(trainer, factor=math.nan)
    with pytest.raises(
        TrainingError, match=r"iteration 1: the loss is nan.*this update was not applied.*learning_rate.*--init_from"
    ):
        trainer.train_step()
    assert torch.equal(weights(trainer), before) and trainer.optimizer.state_dict()["state"] == {}
    assert trainer.iteration == 0


# the objective


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_kl_to_the_untuned_generator_starts_at_zero_and_grows(make_trainer: MakeTrainer, adapter: str) -> None:
    changes = {"objective.kl_weight": 0.1, "optimizer.learning_rate": 1e-3} | (FULL if adapter == "full" else {})
    trainer = make_trainer(changes)
    first, second = step(trainer), step(trainer)
    assert first["kl"] == pytest.approx(0, abs=1e-10)
    assert second["kl"] > 1e-6


def test_kl_holds_the_generator_back(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    free, held = make_trainer(), make_trainer({"objective.kl_weight": 1e4})
    for trainer in (free, held):
        step(trainer)
    (_, without), (_, with_kl) = gradients(free, monkeypatch), gradients(held, monkeypatch)
    assert not torch.allclose(without, with_kl, rtol=0.1)


def test_the_generator_learns_what_is_rewarded(make_trainer: MakeTrainer, reward_of: RewardOf) -> None:
    """The whole chain has the right sign: the mean reward climbs far beyond its spread within a group."""
    changes = {
        **FULL, "rollout.num_steps": 3, "rollout.group_size": 8, "rollout.subset.timestep_fraction": 1.0,
        "optimizer.learning_rate": 3e-4, "advantages.sars.gamma": 0.0,
    }  # fmt: skip
    trainer = make_trainer(changes, [reward_of(brightness), reward_of(brightness)])
    history = [step(trainer) for _ in range(12)]
    gained = history[-1]["reward/prompt/mean"] - history[0]["reward/prompt/mean"]
    assert gained > 3 * history[0]["reward/prompt/std"]


# metrics


def test_metrics_of_an_iteration(make_trainer: MakeTrainer, reward_of: RewardOf) -> None:
    trainer = make_trainer(None, [reward_of(brightness), reward_of(redness)])
    metrics = trainer.train_step()
    quadrants = {name: value for name, value in metrics.items() if name.startswith("quadrant/")}
    assert sum(quadrants.values()) == pytest.approx(1)
    assert metrics["conflict_rate"] == pytest.approx(
        quadrants["quadrant/only_prompt"] + quadrants["quadrant/only_identity"]
    )
    assert metrics["silent_groups"] == 0
    assert metrics["iteration"] == 1 and metrics["invalid_share"] == 0 and metrics["forwards"] == 2 * 4 * 4
    assert metrics["grad_norm"] > 0 and metrics["samples_per_second"] > 0
    phases = [metrics[f"seconds/{phase}"] for phase in ("rollout", "score", "update")]
    assert sum(phases) == pytest.approx(metrics["seconds/total"])


def test_prompts_take_turns(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    asked = [prompt for iteration in range(6) for prompt in trainer.batch(trainer.samples(iteration)).prompts]
    assert sorted(asked) == sorted(sample.prompt for sample in trainer.dataset)


def test_running_out_of_memory_names_the_command_that_says_what_fits(
    make_trainer: Callable[..., Trainer[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the memory that the GPU has."""
    trainer = make_trainer()
    monkeypatch.setattr("customized_grpo.training.trainer.device_memory", lambda device: 25_254_756_352)
    monkeypatch.setattr(trainer, "_backward", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(TrainingError, match=r"optimizer\.micro_batch .* which settings fit: .* --gpu_memory 24$"):
        trainer.train_step()


def test_recomputed_log_probs_make_the_first_ratios_1(
    make_trainer: Callable[..., Trainer[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pass without gradients rounds otherwise, as compiled code does; later updates have ratios beside 1."""
    found = {}
    for kind in ("rollout", "recomputed"):
        trainer = make_trainer(
            {"objective.old_log_probs": kind, "optimizer.num_minibatches": 2, "optimizer.learning_rate": 0.01}
        )
        plain = trainer.policy.velocity

        def rounded(*args: Any, plain: Callable[..., Tensor] = plain) -> Tensor:
            return plain(*args) * (1 if torch.is_grad_enabled() else 1.01)

        monkeypatch.setattr(trainer.policy, "velocity", rounded)
        found[kind] = trainer.train_step()
    assert found["rollout"]["first_ratio/max"] > 1 + RATIO_TOLERANCE
    assert found["recomputed"]["first_ratio/min"] == found["recomputed"]["first_ratio/max"] == 1
    assert found["recomputed"]["ratio/min"] < found["recomputed"]["ratio/max"]
