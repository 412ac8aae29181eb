"""Customized-GRPO from top to bottom on ToyBox: the method on one page.

    customized-grpo toybox export data/toybox/train --split train --count 256
    python examples/minimal.py data/toybox/train

Left out: several processes, checkpoints, validation, memory bounds, rewards that fail, other generators. The package's
trainer (src/customized_grpo/training/trainer.py) adds them and computes the same numbers: see tests/test_minimal.py.

Shape legend: P prompts, G images of a group, B = P * G images in prompt-major order, T steps, S trained steps.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from customized_grpo.algorithm import (
    clamp_advantages,
    clipped_objective,
    group_advantages,
    synergy_shaping,
    time_weights,
    transition,
    weigh_advantages,
)
from customized_grpo.data import SubjectDataset, batch_indices
from customized_grpo.randomness import batched_normal, generator
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.toybox.rewards import IdentityReward, PromptReward
from customized_grpo.types import PromptBatch


@dataclass(frozen=True)
class Settings:
    """Settings of a run; where ToyBox differs from the paper, the paper's value is in the comment."""

    iterations: int = 50
    num_prompts: int = 5
    group_size: int = 12
    num_steps: int = 10  # 25
    shift: float = 2.0  # 3
    sde: str = "cps"  # dance
    eta: float = 0.8  # 0.4
    timestep_fraction: float = 0.6
    gamma: float = 0.4
    clip: float = 5.0
    clip_range: float = 1e-4
    num_minibatches: int = 2  # 4
    learning_rate: float = 1.5e-3  # 2e-5
    lora_rank: int = 32  # 512
    seed: int = 0


def train(data: Path, settings: Settings, weights: Path | None = None) -> Iterator[dict[str, float]]:
    """Train a ToyBox generator on the dataset in `data`; yield each iteration's mean rewards and loss."""
    rank = settings.lora_rank
    policy = ToyBoxPolicy.load(weights, lora_rank=rank, lora_alpha=rank, precision="fp32", seed=settings.seed)
    rewards = (PromptReward(weights), IdentityReward(weights=weights))
    dataset = SubjectDataset.open(data)
    parameters = [parameter for _, parameter in policy.trainable_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=1e-4)
    sigmas = policy.sigmas(settings.num_steps, settings.shift)  # [T + 1], from 1 (noise) to 0 (data)
    step_weights = time_weights(settings.num_steps)  # TDW: [T, 2], the weights of (prompt, identity) at each step

    for iteration in range(settings.iterations):
        indices = batch_indices(len(dataset), settings.num_prompts, settings.seed, iteration)
        batch = PromptBatch.of(dataset, [dataset[i] for i in indices], masks=False)
        references = dataset.references([dataset[i] for i in indices], policy.prepare_reference)
        condition = policy.encode(batch.prompts, references)  # once per group
        trained = choose_steps(settings, iteration)

        images, states, next_states, old_log_probs = sample(policy, condition, sigmas, trained, settings, iteration)
        scores = torch.stack([reward.score(images, batch).values for reward in rewards], dim=-1)  # [P, G, 2]

        advantages = group_advantages(scores)  # each reward on its own, within its group
        bonus = synergy_shaping(advantages, settings.gamma)  # SARS: [P, G]
        step_advantages = weigh_advantages(advantages, step_weights[trained], bonus)  # TDW at true steps: [P, G, S]
        step_advantages = clamp_advantages(step_advantages, settings.clip).flatten(0, 1).T  # [S, B]

        losses = []
        for minibatch in minibatches(settings, iteration):
            steps, rows = torch.cartesian_prod(torch.arange(len(trained)), minibatch).unbind(1)
            sigma, sigma_next = (sigmas[torch.tensor(trained)[steps] + k] for k in (0, 1))
            velocity = policy.velocity(states[steps, rows], sigma, condition.take(rows // settings.group_size))
            step = transition(states[steps, rows], velocity, sigma, sigma_next, kind=settings.sde, eta=settings.eta)
            log_probs = step.log_prob(next_states[steps, rows])
            result = clipped_objective(
                log_probs, old_log_probs[steps, rows], step_advantages[steps, rows], settings.clip_range
            )
            result.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(result.loss.item())
        prompt, identity = scores.mean((0, 1)).tolist()
        yield {"reward/prompt": prompt, "reward/identity": identity, "loss": sum(losses) / len(losses)}


def choose_steps(settings: Settings, iteration: int) -> list[int]:
    """Choose the trained steps of an iteration: a random share of all but the last, which has no noise."""
    trainable = settings.num_steps - 1
    order = torch.randperm(trainable, generator=generator(settings.seed, iteration, "steps"))
    return sorted(order[: round(settings.timestep_fraction * trainable)].tolist())


@torch.no_grad()
def sample(policy, condition, sigmas, trained, settings, iteration):
    """Draw a group of images per prompt, every step stochastic but the last.

    Returns images [P, G, 3, H, W], and of the trained steps the states and next states [S, B, ...] and the
    log-probabilities [S, B].
    """
    prompts = torch.arange(settings.num_prompts).repeat_interleave(settings.group_size)  # [B]
    samples = torch.arange(settings.group_size).repeat(settings.num_prompts)
    condition = condition.take(prompts)

    def noise(samples, purpose):
        return batched_normal(
            settings.seed, iteration, prompts.tolist(), samples.tolist(), purpose, policy.latent_shape
        )

    latents = noise(torch.zeros_like(samples), "initial noise")  # one initial noise per group, as in the paper
    kept = []
    for i in range(settings.num_steps):
        velocity = policy.velocity(latents, sigmas[i].expand(len(prompts)), condition)
        if i == settings.num_steps - 1:
            latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
            continue
        step = transition(latents, velocity, sigmas[i], sigmas[i + 1], kind=settings.sde, eta=settings.eta)
        next_latents = step.sample(noise(samples, f"step {i}"))
        if i in trained:
            kept.append((latents, next_latents, step.log_prob(next_latents)))
        latents = next_latents
    images = policy.decode(latents).unflatten(0, (settings.num_prompts, settings.group_size))
    return images, *(torch.stack(column) for column in zip(*kept, strict=True))


def minibatches(settings: Settings, iteration: int) -> list[torch.Tensor]:
    """Deal the images of each group evenly over the minibatches; return the rows of each."""
    prompts, size = settings.num_prompts, settings.group_size
    draws = torch.rand(prompts, size, generator=generator(settings.seed, iteration, "update order"))
    order = (draws.argsort(1) + size * torch.arange(prompts).unsqueeze(1)).T.flatten()
    return [rows.sort().values for rows in order.tensor_split(settings.num_minibatches)]


if __name__ == "__main__":
    for number, row in enumerate(train(Path(sys.argv[1]), Settings()), 1):
        print(f"iteration {number}: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
