"""Online RL on a subject-driven generator: the paper's algorithm, and the loop around it.

Where we depart from a textbook GRPO: a weight for each reward *and denoising step* (TDW), a bonus for agreeing
rewards (SARS), the first-pass ratio is watched, and a sample whose reward failed drops out instead of scoring 0.

With several processes each has whole groups, neighbours among the iteration's prompts; rewards, gradients and metrics
are those of all. What one process would do, they do, up to the order of sums.

Shape legend: P prompts, G samples of a group, B = P * G samples, R = 2 rewards (prompt, identity), S trained steps;
p <= P and b = p * G are those of this process.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Generic

import torch
from torch import Tensor

from customized_grpo.algorithm import (
    ClippedObjective,
    SdeStep,
    clipped_objective,
    combine_advantages,
    conflict_rate,
    constant_weights,
    gaussian_kl,
    group_advantages,
    quadrants,
    sde_step,
    silent_groups,
    table_weights,
    time_weights,
)
from customized_grpo.config.advantages import AdvantagesConfig
from customized_grpo.config.run import Config
from customized_grpo.data import Sample, SubjectDataset, batch_indices
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import TrainingError, telling_where
from customized_grpo.io.jsonl import Metrics
from customized_grpo.policies.policy import ConditionT, Policy, in_step
from customized_grpo.randomness import generator
from customized_grpo.rewards.reward import Reward, TellsFailure
from customized_grpo.runtime.memory import DRAWING, SCORING, UPDATING, explain_out_of_memory
from customized_grpo.tracking.timer import Clock, OnPhase
from customized_grpo.training.rollout import Plan, Rollout, plan_steps, sample_groups
from customized_grpo.types import PromptBatch

REWARD_NAMES = ("prompt", "identity")
RATIO_TOLERANCE = 1e-5
"""The ratio is 1 before the first update, up to rounding. Beyond this, rollout and update compute different things."""

METRIC_COLUMNS = ("update", "size", "ratio/mean", "ratio/min", "ratio/max", "clip_fraction", "kl")
"""Columns of what is known of a micro-batch."""


def step_weights(config: AdvantagesConfig, num_steps: int) -> Tensor:
    """The weights [T, 2] of (prompt, identity) at every true denoising step."""
    if config.weights == "constant":
        return constant_weights(num_steps, config.constant)
    if config.weights == "table":
        return table_weights(config.table or ())
    return time_weights(num_steps, **config.tdw.model_dump())


def matters(advantages: Tensor, kl_weight: float) -> Tensor:
    """Return which samples [b] change the gradient: those with `advantages` [b, S] other than 0 at some step, and all
    under a KL penalty. A silent group or an invalid sample costs no backward pass."""
    return (advantages != 0).any(-1) | (kl_weight > 0)


@dataclass
class Trainer(Generic[ConditionT]):
    """One iteration at a time; `iteration` counts those done."""

    config: Config
    policy: Policy[ConditionT]
    rewards: Sequence[Reward]
    dataset: SubjectDataset
    ranks: DistributedGroup = field(default_factory=DistributedGroup)
    iteration: int = 0
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        settings = self.config.optimizer
        self.optimizer = torch.optim.AdamW(
            [parameter for _, parameter in self.policy.trainable_parameters()],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            # On a GPU the usual way makes a copy as large as the weights at every step.
            fused=True if self.policy.device.type == "cuda" else None,
        )
        self.ranks.reserve([parameter for _, parameter in self.policy.trainable_parameters()])
        rollout = self.config.rollout
        self.sigmas = self.policy.sigmas(rollout.num_steps, rollout.shift)
        self.weights = step_weights(self.config.advantages, rollout.num_steps)

    def train_step(
        self, on_phase: OnPhase = lambda phase, share: None, before_update: Callable[[], None] = lambda: None
    ) -> Metrics:
        """Sample groups, score them, turn rewards into advantages for each step, update. Returns the iteration's
        metrics.

        Before each change of the weights `before_update` is called. Up to the first, they are of the iteration before.
        Raises `TrainingError` before any change where a picture, too many rewards or the gradient are not finite.
        """
        config, iteration = self.config, self.iteration
        clock = Clock(on_phase, self.policy.device)

        local_prompts = self.ranks.local_range(config.rollout.prompts_per_iteration)
        plan = plan_steps(config.rollout, self.sigmas, config.seed, iteration)
        with self.ranks.synchronized():
            with in_step(self.policy, self.ranks), self._memory("drawing images", DRAWING):
                clock.start("rollout")
                samples = self.samples(iteration, local_prompts)
                condition = self.condition(samples)
                with telling_where(f"iteration {iteration + 1}"):
                    rollout = sample_groups(
                        self.policy, condition, len(samples), plan, config.rollout,
                        seed=config.seed, iteration=iteration, first=local_prompts.start, on_progress=clock.share,
                    )  # fmt: skip
            clock.start("score")
            with self.ranks.interruptible(), self._memory("scoring images", SCORING):
                rewards, valid = self.score(rollout.images, self.batch(samples))

        rewards, valid = self.ranks.gather(rewards), self.ranks.gather(valid)
        with self.ranks.synchronized():
            self.check_valid(valid)
            clock.start("update")
        advantages = self._advantages(rewards, valid, plan)
        update = self._update(rollout, plan, advantages, local_prompts, clock.share, before_update)

        self.iteration += 1
        seconds = clock.stop()
        return {
            "iteration": self.iteration,
            "steps": list(plan.trained),
            **_reward_metrics(rewards, valid),
            "silent_groups": silent_groups(advantages),
            **update,
            **{f"seconds/{phase}": value for phase, value in seconds.items()},
            "samples_per_second": valid[..., 0].numel() / seconds["total"],
            "forwards": int(self.ranks.gather(torch.tensor([rollout.num_forward_evals])).sum()),
        }

    def samples(self, iteration: int, prompts: range | None = None) -> list[Sample]:
        """The samples that `iteration` (0 is the first) is to draw: those of its `prompts`, all if None."""
        wanted = batch_indices(
            len(self.dataset), self.config.rollout.prompts_per_iteration, self.config.seed, iteration
        )
        return [self.dataset[wanted[place]] for place in (range(len(wanted)) if prompts is None else prompts)]

    def condition(self, samples: Sequence[Sample]) -> ConditionT:
        """The policy's condition of `samples`, of their references in the size in which it sees them."""
        prompts = [sample.prompt for sample in samples]
        return self.policy.encode(prompts, self.dataset.references(samples, self.policy.prepare_reference))

    def batch(self, samples: Sequence[Sample]) -> PromptBatch:
        """What the rewards are told of `samples`, with their references as the files have them."""
        return PromptBatch.of(self.dataset, samples, masks=self.config.rewards.identity_reference == "segmented")

    def score(self, images: Tensor, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Rewards [P, G, R] and which of them are valid: numbers, and called valid."""
        scores = [reward.score(images, batch) for reward in self.rewards]
        rewards = torch.stack([score.values.float().cpu() for score in scores], dim=-1)
        return rewards, torch.stack([score.valid.cpu() for score in scores], dim=-1) & rewards.isfinite()

    def check_valid(self, valid: Tensor) -> None:
        """Raise `TrainingError` when too many scores of one of the rewards are missing in `valid` [P, G, R]."""
        limit = self.config.rewards.max_invalid_share
        for name, failed in zip(REWARD_NAMES, (1 - valid.float().mean((0, 1))).tolist(), strict=True):
            if failed > limit:
                raise TrainingError(
                    f"after iteration {self.iteration}: {failed:.0%} of the {name} rewards could not be computed, more "
                    f"than rewards.max_invalid_share={limit:.0%}{self.failures()}. Mend the reward; a run goes on with "
                    "train --resume"
                )

    def failures(self) -> str:
        """Why rewards of this process could not be computed last, as ' (reason; reason)', where they tell."""
        told = [reward.last_failure for reward in self.rewards if isinstance(reward, TellsFailure)]
        reasons = dict.fromkeys(reason for reason in told if reason)
        return f" ({'; '.join(reasons)})" if reasons else ""

    def _advantages(self, rewards: Tensor, valid: Tensor, plan: Plan) -> Tensor:
        """Advantages [P, G, S]: weights are looked up by the true step, whatever the order of training.

        `lookup: counter` reproduces the published code instead: each sample's steps are shuffled, and the k-th of
        them takes the weights of step k.
        """
        rows = torch.tensor(plan.trained)
        if self.config.advantages.lookup == "counter":
            order = torch.rand(
                *rewards.shape[:2], len(rows), generator=generator(self.config.seed, self.iteration, "shuffled steps")
            )
            rows = order.argsort(-1)
        settings = self.config.advantages
        thresholds = settings.thresholds and [math.inf if t is None else t for t in settings.thresholds]
        return combine_advantages(
            rewards,
            valid,
            weights=self.weights[rows],
            normalise=settings.normalize,
            shape=settings.shape,
            gamma=settings.sars.gamma,
            gamma_penalty=settings.sars.gamma_penalty,
            thresholds=thresholds,
            clamp=settings.clip,
        )

    def _update(
        self,
        rollout: Rollout[ConditionT],
        plan: Plan,
        advantages: Tensor,
        local_prompts: range,
        on_progress: Callable[[float], None],
        before_update: Callable[[], None],
    ) -> Metrics:
        """`num_minibatches` optimizer steps, each on all trained steps of its share of the samples, of which this
        process has those of the prompts `mine`."""
        num_steps = len(plan.trained)
        low, high = (place * self.config.rollout.group_size for place in (local_prompts.start, local_prompts.stop))
        matter = matters(advantages.flatten(0, 1)[low:high], self.config.objective.kl_weight)
        dealt = self._minibatch_order(*advantages.shape[:2])
        updates = self.config.optimizer.num_minibatches
        flat = advantages.flatten(0, 1)[low:high].T.contiguous().to(self.policy.device)
        parts: list[tuple[float, ...]] = []
        norms, losses = [], []
        done, total = 0, int(matter.sum()) * num_steps
        for number, share in enumerate(dealt.tensor_split(updates)):
            # In the rollout's order: a micro-batch then holds one prompt and one step where it can, as there, and the
            # same kernels round alike. So what does not matter is left out of its micro-batch, and no other moves up.
            rows = share[(share >= low) & (share < high)].sort().values - low
            items = torch.cartesian_prod(torch.arange(num_steps), rows)
            loss = 0.0
            with (
                self.ranks.synchronized(),
                in_step(self.policy, self.ranks),
                self._memory("computing gradients", UPDATING),
            ):
                for micro_batch in items.split(self.config.optimizer.micro_batch) if len(items) else ():
                    chunk = micro_batch[matter[micro_batch[:, 1]]]
                    if not len(chunk):
                        continue
                    result, kl = self._objective(rollout, plan, flat, chunk)
                    part = result.loss * (len(chunk) / (len(share) * num_steps))
                    part.backward()
                    loss += part.item()
                    ratios = (result.ratio_mean, result.ratio_min, result.ratio_max, result.clip_fraction)
                    parts.append((number, len(chunk), *map(float, ratios), kl))
                    done += len(chunk)
                    on_progress(done / total)
            with self.ranks.synchronized(), self._memory("updating the weights", UPDATING):
                loss, norm = self._optimizer_step(loss, before_update)
            losses.append(loss)
            norms.append(norm)
        table = torch.tensor(parts, dtype=torch.float64).view(-1, len(METRIC_COLUMNS))
        return _update_metrics(self.ranks.gather(table), losses, norms)

    def _memory(self, doing: str, remedy: str) -> AbstractContextManager[None]:
        return explain_out_of_memory(
            f"{doing} in iteration {self.iteration + 1}", f"{remedy}, and go on with train --resume"
        )

    def _minibatch_order(self, prompts: int, size: int) -> Tensor:
        """The places [P * G] of all samples in an order that deals each group evenly over the updates: whatever groups
        a process has, its updates are of one size, and none waits for another."""
        draws = torch.rand(prompts, size, generator=generator(self.config.seed, self.iteration, "update order"))
        return (draws.argsort(1) + size * torch.arange(prompts).unsqueeze(1)).T.flatten()

    def _objective(
        self, rollout: Rollout[ConditionT], plan: Plan, advantages: Tensor, items: Tensor
    ) -> tuple[ClippedObjective, float]:
        """The objective of (trained step, sample) pairs `items` [M, 2], and their mean KL to the untuned generator."""
        steps, rows = items.unbind(1)
        objective = self.config.objective
        reference = None
        if objective.kl_weight > 0:  # first: after a velocity with a gradient comes its backward pass, see `in_step`
            with torch.no_grad(), self.policy.base_weights():
                reference = self.transition(rollout, plan, steps, rows)
        transition = self.transition(rollout, plan, steps, rows)
        kl = None if reference is None else gaussian_kl(transition.mean, reference.mean, transition.std)
        result = clipped_objective(
            transition.log_prob,
            rollout.log_probs[steps, rows],
            advantages[steps, rows],
            objective.clip_range,
            kl=kl,
            kl_weight=objective.kl_weight,
        )
        return result, 0.0 if kl is None else float(kl.detach().mean())

    def transition(self, rollout: Rollout[ConditionT], plan: Plan, steps: Tensor, rows: Tensor) -> SdeStep:
        """The stochastic step that led each sample from its state to its next state, under the present weights."""
        settings = self.config.rollout
        true_steps = torch.tensor(plan.trained)[steps]
        sigma, sigma_next = plan.sigmas[true_steps], plan.sigmas[true_steps + 1]
        states = rollout.states[steps, rows]
        condition = rollout.condition.take(rows // settings.group_size)
        velocity = self.policy.velocity(states, sigma, condition)
        next_states = rollout.next_states[steps, rows]
        return sde_step(states, velocity, sigma, sigma_next, kind=settings.sde, eta=settings.eta, next_x=next_states)

    def _optimizer_step(self, loss: float, before: Callable[[], None]) -> tuple[float, float]:
        """Sum the gradient over processes, clip it, check it, step, of which `before` is told. Returns the sum of their
        losses, and the gradient's norm before clipping."""
        parameters = [parameter for _, parameter in self.policy.trainable_parameters()]
        for parameter in parameters:
            if parameter.grad is None:  # no sample of this update is here
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        own = torch.tensor([[loss, float(torch.nn.utils.get_total_norm(gradients))]], dtype=torch.float64)
        each = self.ranks.gather(own)
        self.ranks.all_reduce_(gradients)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_grad_norm))
        loss = float(each[:, 0].sum())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad = [str(rank) for rank, finite in enumerate(each.isfinite().all(1).tolist()) if not finite]
            where = f" (process {', '.join(bad)} of {self.ranks.world_size})" if self.ranks.world_size > 1 else ""
            raise TrainingError(
                f"iteration {self.iteration + 1}: the loss is {loss} and the gradient's norm {norm}{where}; this "
                "update was not applied. Start a new --output with a lower optimizer.learning_rate or rollout.eta, and "
                "with train --init_from the last checkpoint's `export` where what was learned is to be kept"
            )
        before()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm


def _reward_metrics(rewards: Tensor, valid: Tensor) -> Metrics:
    metrics: Metrics = {}
    known = torch.where(valid, rewards, torch.nan)
    centred = known - known.nanmean(1, keepdim=True)
    freedom = valid.sum(1) - 1
    std = torch.where(freedom > 0, (centred.square().nansum(1) / freedom.clamp(min=1)).sqrt(), torch.nan)
    for index, name in enumerate(REWARD_NAMES):
        metrics[f"reward/{name}/mean"] = float(known[..., index].nanmean())
        metrics[f"reward/{name}/std"] = float(std[:, index].nanmean())
    scored = valid.all(-1, keepdim=True).expand_as(valid)
    advantages = group_advantages(rewards, scored)
    metrics |= {f"quadrant/{name}": share for name, share in quadrants(advantages, valid).items()}
    metrics["conflict_rate"] = conflict_rate(advantages, valid)
    metrics["invalid_share"] = 1 - float(valid.float().mean())
    return metrics


def _update_metrics(parts: Tensor, losses: Sequence[float], norms: Sequence[float]) -> Metrics:
    """`parts` [n, PART], those of all processes; n is 0 where no sample matters, and what it measures NaN."""
    column = dict(zip(METRIC_COLUMNS, parts.unbind(1), strict=True))
    first = column["update"] == 0

    def mean(name: str) -> float:
        return float((column[name] * column["size"]).sum() / column["size"].sum())

    def least(values: Tensor) -> float:
        return float(values.min()) if len(values) else math.nan

    return {
        "ratio/mean": mean("ratio/mean"),
        "ratio/min": least(column["ratio/min"]),
        "ratio/max": -least(-column["ratio/max"]),
        "first_ratio/min": least(column["ratio/min"][first]),
        "first_ratio/max": -least(-column["ratio/max"][first]),
        "clip_fraction": mean("clip_fraction"),
        "loss": sum(losses) / len(losses),
        "kl": mean("kl"),
        "grad_norm": max(norms),
    }
