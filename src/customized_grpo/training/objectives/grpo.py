"""The clipped ratio of GRPO over denoising steps, with a KL penalty to the base weights.

An item is a (trained step, sample) pair: the stochastic step that led the sample from its state to its next state.

Shape legend: b samples of this process in prompt-major order, S trained steps, M items of a micro-batch, `*` the
latent's shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from customized_grpo.algorithm import Gaussian, clipped_objective, transition
from customized_grpo.config.rollout import RolloutConfig
from customized_grpo.config.run import Config
from customized_grpo.io.jsonl import Metrics
from customized_grpo.policies.policy import Policy
from customized_grpo.training.objectives.objective import Loss, MicroBatches
from customized_grpo.training.rollout import Plan, Rollout


@dataclass(frozen=True, eq=False)
class GrpoTargets:
    """The `rollout` with its states and log-probs, and the `advantages` [S, b] on the generator's device."""

    rollout: Rollout[Any]
    advantages: Tensor


@dataclass(frozen=True)
class Grpo:
    """The clipped surrogate of PPO on the ratio of transition densities (DanceGRPO, Flow-GRPO)."""

    config: Config

    metric_names = ("ratio/mean", "ratio/min", "ratio/max", "clip_fraction", "kl")

    @property
    def reference_forwards(self) -> int:
        """One under a KL penalty, with the base weights, and one for old log-probs that are recomputed."""
        objective = self.config.objective
        return int(objective.kl_weight > 0) + int(objective.old_log_probs == "recomputed")

    def num_passes(self, plan: Plan) -> int:
        """Return the number of trained steps."""
        return len(plan.trained)

    def matters(self, advantages: Tensor) -> Tensor:
        """Return which samples [b] have an advantage other than 0 at some step, and all under a KL penalty.

        A silent group or an invalid sample costs no backward pass.
        """
        return (advantages != 0).any(-1) | (self.config.objective.kl_weight > 0)

    def targets(
        self, policy: Policy[Any], rollout: Rollout[Any], advantages: Tensor, micro_batches: Sequence[Tensor]
    ) -> GrpoTargets:
        """Return the rollout, whose log-probs are the old ones, with the `advantages` [b, S] of its samples."""
        if self.config.objective.old_log_probs == "recomputed":
            log_probs = rollout.log_probs.clone()
            for items in micro_batches:
                steps, rows = items.unbind(1)
                # With a gradient that nothing asks for: where code is compiled, another graph would run without.
                present = step_transition(policy, rollout, self.config.rollout, steps, rows)
                log_probs[steps, rows] = present.log_prob(rollout.next_states[steps, rows]).detach()
            rollout = replace(rollout, log_probs=log_probs)
        return GrpoTargets(rollout, advantages.T.contiguous().to(policy.device))

    def loss(self, policy: Policy[Any], targets: GrpoTargets, items: Tensor) -> Loss:
        """Return the clipped objective of the `items` [M, 2], and its ratios and mean KL to the base weights."""
        rollout, settings, objective = targets.rollout, self.config.rollout, self.config.objective
        steps, rows = items.unbind(1)
        base = None
        if objective.kl_weight > 0:
            with torch.no_grad(), policy.base_weights():
                base = step_transition(policy, rollout, settings, steps, rows)
        present = step_transition(policy, rollout, settings, steps, rows)
        kl = None if base is None else present.kl(base)
        result = clipped_objective(
            present.log_prob(rollout.next_states[steps, rows]),
            rollout.log_probs[steps, rows],
            targets.advantages[steps, rows],
            objective.clip_range,
            kl=kl,
            kl_weight=objective.kl_weight,
        )
        ratios = (result.ratio_mean, result.ratio_min, result.ratio_max, result.clip_fraction)
        return Loss(result.loss, (*ratios, result.loss.new_zeros(()) if kl is None else kl.detach().mean()))

    def metrics(self, parts: MicroBatches) -> Metrics:
        """Return the ratios of all updates and of the first alone, which are 1 up to rounding, and the mean KL."""
        return {
            "ratio/mean": parts.mean("ratio/mean"),
            "ratio/min": parts.min("ratio/min"),
            "ratio/max": parts.max("ratio/max"),
            "first_ratio/min": parts.min("ratio/min", first_update=True),
            "first_ratio/max": parts.max("ratio/max", first_update=True),
            "clip_fraction": parts.mean("clip_fraction"),
            "kl": parts.mean("kl"),
        }


def step_transition(
    policy: Policy[Any], rollout: Rollout[Any], settings: RolloutConfig, steps: Tensor, rows: Tensor
) -> Gaussian:
    """Return the distribution [M, *] of the next state of each (trained step, sample), under the present weights.

    `steps` [M] count the trained steps of the rollout, `rows` [M] its samples.
    """
    plan = rollout.plan
    true_steps = torch.tensor(plan.trained)[steps]
    sigma, sigma_next = plan.sigmas[true_steps], plan.sigmas[true_steps + 1]
    states = rollout.states[steps, rows]
    velocity = policy.velocity(states, sigma, rollout.condition.take(rows // rollout.images.shape[1]))
    return transition(states, velocity, sigma, sigma_next, kind=settings.sde, eta=settings.eta)
