"""Sampling: which steps are stochastic, and the trajectories of a batch of groups.

Shape legend: P prompts, G samples of a group, B = P * G samples in prompt-major order, T steps, S trained steps, `*`
the latent's shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from customized_grpo.algorithm import ode_step, transition
from customized_grpo.config.rollout import RolloutConfig
from customized_grpo.data import Sample, SubjectDataset, batch_indices
from customized_grpo.policies.policy import ConditionT, Policy
from customized_grpo.policies.sampling import decode_checked
from customized_grpo.randomness import batched_normal, generator

INITIAL_NOISE = "initial noise"


@dataclass(frozen=True)
class Plan:
    """An iteration's steps: `sigmas` [T + 1], the `stochastic` steps, and those of them that are `trained`,
    ascending."""

    sigmas: Tensor
    stochastic: tuple[int, ...]
    trained: tuple[int, ...]

    @property
    def num_prefix_steps(self) -> int:
        """Steps before the first stochastic one: from a shared initial noise, a group walks them as one."""
        return self.stochastic[0]


@dataclass(frozen=True)
class Rollout(Generic[ConditionT]):
    """For the update: `states`, `next_states` [S, B, *], `log_probs` [S, B]. For rewards: `images` [P, G, 3, H, W]."""

    plan: Plan
    condition: ConditionT
    states: Tensor
    next_states: Tensor
    log_probs: Tensor
    images: Tensor
    num_forward_evals: int
    """Samples sent through the generator, counted once for each step."""


def plan_steps(config: RolloutConfig, sigmas: Tensor, seed: int, iteration: int) -> Plan:
    """Choose the stochastic and trained steps of `iteration` (0 is the first).

    The last step is never stochastic: its density has no width at sigma 0.

    `subset`: every other step is stochastic, a random `timestep_fraction` of them trained (paper). `window`: a window
    of consecutive steps is stochastic and trained, the rest deterministic (MixGRPO, arXiv 2507.21802).
    """
    trainable = config.num_steps - 1
    if config.trained_steps == "window":
        start = config.window.start
        if start is None:
            start = iteration // config.window.period % (trainable - config.window.size + 1)
        window = tuple(range(start, start + config.window.size))
        return Plan(sigmas, window, window)
    count = max(1, round(config.subset.timestep_fraction * trainable))
    chosen = torch.randperm(trainable, generator=generator(seed, iteration, "steps"))[:count]
    return Plan(sigmas, tuple(range(trainable)), tuple(sorted(chosen.tolist())))


def iteration_samples(
    dataset: SubjectDataset, prompts_per_iteration: int, seed: int, iteration: int, prompts: range | None = None
) -> list[Sample]:
    """Return the samples that `iteration` (0 is the first) draws: those of its `prompts`, all if None."""
    wanted = batch_indices(len(dataset), prompts_per_iteration, seed, iteration)
    return [dataset[wanted[place]] for place in (range(len(wanted)) if prompts is None else prompts)]


def encode_samples(policy: Policy[ConditionT], dataset: SubjectDataset, samples: Sequence[Sample]) -> ConditionT:
    """Return the policy's condition of `samples`, with their references in the size in which it sees them."""
    prompts = [sample.prompt for sample in samples]
    return policy.encode(prompts, dataset.references(samples, policy.prepare_reference))


@torch.no_grad()
def sample_groups(
    policy: Policy[ConditionT], condition: ConditionT, num_prompts: int, plan: Plan, config: RolloutConfig, *,
    seed: int, iteration: int, first: int = 0, on_progress: Callable[[float], None] = lambda share: None,
) -> Rollout[ConditionT]:  # fmt: skip
    """Draw a group of images for each of the `num_prompts` rows of `condition`, which are the iteration's prompts from
    `first` on.

    Noise is a function of (seed, iteration, prompt, sample, step), so micro-batches change nothing. With a shared
    initial noise the steps before the first stochastic one are walked once per group. `on_progress` hears the share
    done. Raises `NotFinite` where a picture is not finite.
    """
    walk = _Sampler(policy, condition, plan, config, seed, iteration, first)
    prefix = plan.num_prefix_steps if config.same_initial_noise else 0
    prefix_latents = None
    if prefix:
        rows = torch.arange(num_prompts).split(config.micro_batch)
        prefix_latents = torch.cat([walk.run(r, torch.zeros_like(r), None, range(prefix))[0] for r in rows])
    parts = []
    batch = torch.arange(num_prompts * config.group_size)
    for rows in batch.split(config.micro_batch):
        prompts, samples = rows // config.group_size, rows % config.group_size
        latents = None if prefix_latents is None else prefix_latents[prompts]
        final, kept = walk.run(prompts, samples, latents, range(prefix, config.num_steps))
        parts.append((decode_checked(policy, final), *(torch.stack(column) for column in zip(*kept, strict=True))))
        on_progress((int(rows[-1]) + 1) / len(batch))
    images, states, next_states, log_probs = (list(column) for column in zip(*parts, strict=True))
    return Rollout(
        plan,
        condition,
        torch.cat(states, 1),
        torch.cat(next_states, 1),
        torch.cat(log_probs, 1),
        torch.cat(images).unflatten(0, (num_prompts, config.group_size)),
        num_prompts * prefix + len(batch) * (config.num_steps - prefix),
    )


@dataclass(frozen=True)
class _Sampler(Generic[ConditionT]):
    """Walks samples along the plan's steps."""

    policy: Policy[ConditionT]
    condition: ConditionT
    plan: Plan
    config: RolloutConfig
    seed: int
    iteration: int
    first: int

    def run(
        self, prompts: Tensor, samples: Tensor, latents: Tensor | None, steps: range
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Walk `steps` with sample `samples[b]` of prompt `prompts[b]`, from the initial noise if `latents` is None.

        Returns the latents at the end, and (state, next state [b, *], log-prob [b]) of each trained step.
        """
        condition = self.condition.take(prompts)
        if latents is None:
            first = torch.zeros_like(samples) if self.config.same_initial_noise else samples
            latents = self._noise(prompts, first, INITIAL_NOISE)
        kept = []
        for i in steps:
            sigma, sigma_next = self.plan.sigmas[i], self.plan.sigmas[i + 1]
            velocity = self.policy.velocity(latents, sigma.expand(len(prompts)), condition)
            if i not in self.plan.stochastic:
                latents = ode_step(latents, velocity, sigma, sigma_next)
                continue
            step = transition(latents, velocity, sigma, sigma_next, kind=self.config.sde, eta=self.config.eta)
            next_latents = step.sample(self._noise(prompts, samples, f"step {i}"))
            if i in self.plan.trained:
                kept.append((latents, next_latents, step.log_prob(next_latents)))
            latents = next_latents
        return latents, kept

    def _noise(self, prompts: Tensor, samples: Tensor, purpose: str) -> Tensor:
        shape = self.policy.latent_shape
        numbers = (prompts + self.first).tolist()
        noise = batched_normal(self.seed, self.iteration, numbers, samples.tolist(), purpose, shape)
        return noise.to(self.policy.device)
