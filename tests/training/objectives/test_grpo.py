"""The clipped ratio as an objective; its formula is tested in tests/algorithm."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from customized_grpo.algorithm import sde_step
from customized_grpo.config.objective import ObjectiveConfig
from customized_grpo.config.run import Config
from customized_grpo.training.objectives import OBJECTIVES, build_objective
from customized_grpo.training.objectives.grpo import Grpo
from customized_grpo.training.objectives.objective import MicroBatches
from customized_grpo.training.rollout import Rollout, encode_samples, plan_steps, sample_groups
from customized_grpo.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer[Any]]
ITEMS = torch.tensor([[0, 1], [0, 6], [1, 3], [1, 7]])


def drawn(trainer: Trainer[Any]) -> Rollout[Any]:
    """A rollout of the first iteration, after which the weights have moved."""
    config, samples = trainer.config, trainer.samples(0)
    condition = encode_samples(trainer.policy, trainer.dataset, samples)
    plan = plan_steps(config.rollout, trainer.sigmas, config.seed, 0)
    rollout = sample_groups(trainer.policy, condition, 2, plan, config.rollout, seed=config.seed, iteration=0)
    noise = torch.Generator().manual_seed(3)
    for _, parameter in trainer.policy.trainable_parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
    return rollout


def log_prob_and_mean(trainer: Trainer[Any], rollout: Rollout[Any], place: int, row: int) -> tuple[Tensor, ...]:
    """Of one item, under the present weights: written from the definition."""
    step, settings = rollout.plan.trained[place], trainer.config.rollout
    sigma, sigma_next = rollout.plan.sigmas[step], rollout.plan.sigmas[step + 1]
    state, next_state = rollout.states[place, row][None], rollout.next_states[place, row][None]
    velocity = trainer.policy.velocity(state, sigma.view(1), rollout.condition.take(torch.tensor([row // 4])))
    found = sde_step(state, velocity, sigma, sigma_next, kind=settings.sde, eta=settings.eta, next_x=next_state)
    return found.log_prob[0], found.mean[0], found.std.flatten()


def test_recomputed_log_probs_are_those_of_the_present_weights(make_trainer: MakeTrainer) -> None:
    """Of the items of micro-batches to come; those of other items stay."""
    trainer = make_trainer({"objective.old_log_probs": "recomputed"})
    rollout = drawn(trainer)
    advantages = torch.ones(8, len(rollout.plan.trained))
    targets = trainer.objective.targets(trainer.policy, rollout, advantages, [ITEMS[:2], ITEMS[2:]])
    places, rows = ITEMS.unbind(1)
    changed = targets.rollout.log_probs != rollout.log_probs
    assert changed[places, rows].all() and int(changed.sum()) == len(ITEMS)
    for items in (ITEMS[:2], ITEMS[2:]):
        loss = trainer.objective.loss(trainer.policy, targets, items)
        assert loss.metrics[1] == loss.metrics[2] == 1
    assert not targets.rollout.log_probs.requires_grad and trainer.objective.reference_forwards == 1


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_loss_is_that_of_items_taken_one_by_one(make_trainer: MakeTrainer, kl_weight: float) -> None:
    trainer = make_trainer({"objective.kl_weight": kl_weight, "objective.clip_range": 0.01})
    rollout = drawn(trainer)
    advantages = torch.randn(8, len(rollout.plan.trained), generator=torch.Generator().manual_seed(1))
    targets = trainer.objective.targets(trainer.policy, rollout, advantages, [ITEMS])
    found = trainer.objective.loss(trainer.policy, targets, ITEMS)
    losses, ratios, kls = [], [], []
    with torch.no_grad():
        for place, row in ITEMS.tolist():
            new, mean, std = log_prob_and_mean(trainer, rollout, place, row)
            with trainer.policy.base_weights():
                _, base, _ = log_prob_and_mean(trainer, rollout, place, row)
            ratio, advantage = torch.exp(new - rollout.log_probs[place, row]), advantages[row, place]
            ratios.append(float(ratio))
            kls.append(float(((mean - base) / std).square().mean() / 2))
            losses.append(float(-torch.minimum(advantage * ratio, advantage * ratio.clamp(0.99, 1.01))))
    measured = dict(zip(trainer.objective.metric_names, found.metrics, strict=True))
    expected = sum(losses) / 4 + kl_weight * sum(kls) / 4
    assert found.loss.item() == pytest.approx(expected, rel=1e-4) and found.loss.requires_grad
    assert measured["kl"] == pytest.approx(sum(kls) / 4 if kl_weight else 0.0, rel=1e-3)
    assert kls[0] > 1e-6 and max(ratios) - min(ratios) > 1e-4
    assert measured["ratio/mean"] == pytest.approx(sum(ratios) / 4, rel=1e-5)
    assert (measured["ratio/min"], measured["ratio/max"]) == pytest.approx((min(ratios), max(ratios)), rel=1e-5)


def test_under_a_kl_penalty_every_sample_matters(make_config: Callable[..., Config]) -> None:
    advantages = torch.tensor([[0.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    free, held = Grpo(make_config()), Grpo(make_config({"objective.kl_weight": 0.1}))
    assert free.matters(advantages).tolist() == [False, True, True] and free.reference_forwards == 0
    assert held.matters(advantages).all() and held.reference_forwards == 1


def test_metrics_of_an_iteration_weigh_micro_batches_by_their_size() -> None:
    columns = {
        "ratio/mean": torch.tensor([1.0, 1.2, 1.1]), "ratio/min": torch.tensor([1.0, 0.7, 0.8]),
        "ratio/max": torch.tensor([1.0, 1.6, 1.3]), "clip_fraction": torch.tensor([0.0, 0.5, 1.0]),
        "kl": torch.tensor([0.0, 0.4, 0.2]),
    }  # fmt: skip
    parts = MicroBatches(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 2.0]), columns)
    found = Grpo(Config()).metrics(parts)
    assert found == pytest.approx({
        "ratio/mean": 1.1, "ratio/min": 0.7, "ratio/max": 1.6, "first_ratio/min": 1.0, "first_ratio/max": 1.0,
        "clip_fraction": 0.625, "kl": 0.2,
    })  # fmt: skip
    nothing = MicroBatches(*(torch.zeros(0),) * 2, {name: torch.zeros(0) for name in columns})
    assert all(value != value for value in Grpo(Config()).metrics(nothing).values())


def test_every_kind_of_the_configuration_has_an_objective(make_config: Callable[..., Config]) -> None:
    kinds = get_args(ObjectiveConfig.model_fields["kind"].annotation)
    assert set(kinds) == set(OBJECTIVES) and isinstance(build_objective(make_config()), Grpo)
