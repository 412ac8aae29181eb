"""The paper's algorithm, one iteration at a time.

Where it departs from a textbook GRPO: a weight for each reward *and denoising step* (TDW), a bonus for agreeing
rewards (SARS), the first-pass ratio is watched, and a sample whose reward failed drops out instead of scoring 0.

With several processes each has whole groups, neighbors among the iteration's prompts; rewards, gradients and metrics
are those of all. The processes compute what a single one would, up to the order of sums.

Shape legend: P prompts, G samples of a group, B = P * G samples, R rewards, S trained steps; p <= P and b = p * G are
those of this process.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic

import torch
from torch import Tensor

from customized_grpo.algorithm import silent_groups
from customized_grpo.config.run import Config
from customized_grpo.data import Sample, SubjectDataset
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import TrainingError, telling_where
from customized_grpo.io.jsonl import Metrics
from customized_grpo.policies.policy import ConditionT, Policy
from customized_grpo.randomness import generator
from customized_grpo.rewards.reward import Reward
from customized_grpo.rewards.scoring import GroupRewards, Scorer
from customized_grpo.runtime.device import device_memory, peak_memory
from customized_grpo.runtime.memory import DRAWING, SCORING, UPDATING, explain_out_of_memory
from customized_grpo.tracking.timer import OnPhase, OnProgress, Timer
from customized_grpo.training.advantages import compute_advantages, step_weights
from customized_grpo.training.objectives import build_objective
from customized_grpo.training.objectives.objective import MicroBatches, Objective
from customized_grpo.training.optimizer import build_optimizer
from customized_grpo.training.rollout import (
    Plan,
    Rollout,
    encode_samples,
    iteration_samples,
    plan_steps,
    sample_groups,
)
from customized_grpo.types import PromptBatch

RATIO_TOLERANCE = 1e-5
"""The ratio is 1 before the first update, up to rounding. Beyond this, rollout and update compute different things."""


@dataclass
class Trainer(Generic[ConditionT]):
    """One iteration at a time; `iteration` counts those done."""

    config: Config
    policy: Policy[ConditionT]
    rewards: Mapping[str, Reward]
    dataset: SubjectDataset
    ranks: DistributedGroup = field(default_factory=DistributedGroup)
    iteration: int = 0
    optimizer: torch.optim.Optimizer = field(init=False)
    objective: Objective = field(init=False)
    scorer: Scorer = field(init=False)
    reasons: tuple[str | None, ...] = field(init=False, default=())
    """Why scores of this process are missing in the last iteration, by reward."""

    def __post_init__(self) -> None:
        rollout, trained = self.config.rollout, [parameter for _, parameter in self.policy.trainable_parameters()]
        self.optimizer = build_optimizer(self.config.optimizer, trained)
        self.ranks.reserve(trained)
        self.objective = build_objective(self.config)
        self.scorer = Scorer(self.rewards, self.config.rewards)
        self.sigmas = self.policy.sigmas(rollout.num_steps, rollout.shift)
        self.weights = step_weights(self.config)

    def train_step(
        self, on_phase: OnPhase = lambda phase, share: None, on_before_step: Callable[[], None] = lambda: None
    ) -> Metrics:
        """Sample groups, score them, turn rewards into advantages for each step, and update the weights.

        Returns the iteration's metrics. `on_before_step` is called before each optimizer step: up to the first, the
        weights are those of the iteration before. Raises `TrainingError` before any change where a picture, too many
        rewards or the gradient are not finite.
        """
        timer = Timer(on_phase, self.policy.device)
        plan = plan_steps(self.config.rollout, self.sigmas, self.config.seed, self.iteration)
        with self.ranks.synchronized():  # an error in one process is an error in all
            samples = self.samples(self.iteration, self.local_prompts)
            with timer.phase("rollout"):
                rollout = self.sample(samples, plan, timer.progress)
            with timer.phase("score"):
                rewards = self.score(rollout, samples, timer.progress)
        rewards = rewards.gathered(self.ranks)
        with timer.phase("update"):
            with self.ranks.synchronized():
                self.scorer.check(rewards, f"after iteration {self.iteration}")
                if self.iteration == 0:
                    self.scorer.check_bounds(rewards)
            advantages = self.advantages(rewards, plan)
            updates = self.optimize(rollout, advantages, timer.progress, on_before_step)
        forwards = int(self.ranks.gather(torch.tensor([rollout.num_forward_evals])).sum())
        self.iteration += 1
        progress = {"iteration": self.iteration, "steps": list(plan.trained)}
        signal = self.scorer.metrics(rewards) | {"silent_groups": silent_groups(advantages)}
        memory = {} if (peak := peak_memory(self.policy.device)) is None else {"peak_memory_gib": peak / 2**30}
        return progress | signal | updates | _cost(timer.seconds(), advantages[..., 0].numel(), forwards) | memory

    @property
    def local_prompts(self) -> range:
        """The places of this process's prompts among the iteration's."""
        return self.ranks.local_range(self.config.rollout.prompts_per_iteration)

    def samples(self, iteration: int, prompts: range | None = None) -> list[Sample]:
        """Return the samples that `iteration` (0 is the first) draws: those of its `prompts`, all if None."""
        prompts_per_iteration = self.config.rollout.prompts_per_iteration
        return iteration_samples(self.dataset, prompts_per_iteration, self.config.seed, iteration, prompts)

    def batch(self, samples: Sequence[Sample]) -> PromptBatch:
        """Return the prompts, references and masks that the rewards read."""
        return self.scorer.batch(self.dataset, samples)

    def sample(self, samples: Sequence[Sample], plan: Plan, on_progress: OnProgress) -> Rollout[ConditionT]:
        """Draw a group of images for each of the `samples`, which are this process's of the iteration."""
        config = self.config
        with self.policy.lockstep(self.ranks), self._memory("drawing images", DRAWING):
            on_progress(0.0)
            condition = encode_samples(self.policy, self.dataset, samples)
            with telling_where(f"iteration {self.iteration + 1}"):
                return sample_groups(
                    self.policy, condition, len(samples), plan, config.rollout, seed=config.seed,
                    iteration=self.iteration, first=self.local_prompts.start, on_progress=on_progress,
                )  # fmt: skip

    def score(self, rollout: Rollout[ConditionT], samples: Sequence[Sample], on_progress: OnProgress) -> GroupRewards:
        """Score the images of a `rollout` of `samples`."""
        on_progress(0.0)
        with self.ranks.interruptible(), self._memory("scoring images", SCORING):
            rewards = self.scorer.score(rollout.images, self.batch(samples))
        self.reasons = rewards.reasons
        return rewards

    def advantages(self, rewards: GroupRewards, plan: Plan) -> Tensor:
        """Return the advantages [P, G, S] of an iteration's `rewards`."""
        return compute_advantages(self.config, rewards, self.weights, plan, self.iteration)

    def optimize(
        self,
        rollout: Rollout[ConditionT],
        advantages: Tensor,
        on_progress: OnProgress,
        on_before_step: Callable[[], None],
    ) -> Metrics:
        """Take the iteration's optimizer steps, each on all passes of a minibatch of the samples.

        `rollout` holds the samples of this process, `advantages` [P, G, S] are those of all.
        """
        low, high = (place * rollout.images.shape[1] for place in (self.local_prompts.start, self.local_prompts.stop))
        local = advantages.flatten(0, 1)[low:high]
        matters, passes = self.objective.matters(local), self.objective.num_passes(rollout.plan)
        order = self._minibatch_order(*advantages.shape[:2])
        minibatches = order.tensor_split(self.config.optimizer.num_minibatches)
        own = [each[(each >= low) & (each < high)] - low for each in minibatches]
        micro_batches = [list(self._micro_batches(rows, passes, matters)) for rows in own]
        with self.ranks.synchronized(), self.policy.lockstep(self.ranks), self._memory("preparing targets", UPDATING):
            on_progress(0.0)
            targets = self.objective.targets(self.policy, rollout, local, [*chain.from_iterable(micro_batches)])
        parts: list[tuple[float, ...]] = []
        norms, losses = [], []
        done, total = 0, int(matters.sum()) * passes
        for update, minibatch in enumerate(minibatches):
            sizes: list[int] = []
            measured: list[Tensor] = []
            with (
                self.ranks.synchronized(),
                self.policy.lockstep(self.ranks),
                self._memory("computing gradients", UPDATING),
            ):
                for items in micro_batches[update]:
                    measured.append(self._backward(targets, items, len(items) / (len(minibatch) * passes)))
                    sizes.append(len(items))
                    done += len(items)
                    on_progress(done / total)
            with self.ranks.synchronized(), self._memory("updating the weights", UPDATING):
                measures, loss, norm = self._optimizer_step(measured, on_before_step)
            parts += [(update, size, *row) for size, row in zip(sizes, measures, strict=True)]
            losses.append(loss)
            norms.append(norm)
        metrics = self.objective.metrics(self._gathered(parts))
        return metrics | {"loss": sum(losses) / len(losses), "grad_norm": max(norms)}

    def _memory(self, doing: str, remedy: str) -> AbstractContextManager[None]:
        has = device_memory(self.policy.device)
        return explain_out_of_memory(
            f"{doing} in iteration {self.iteration + 1}",
            f"{remedy}, and go on with train --resume. What each phase takes, and which settings fit: train --dry_run "
            f"--gpu_memory {'GIB' if has is None else round(has / 2**30)}",
        )

    def _minibatch_order(self, prompts: int, size: int) -> Tensor:
        """Return a permutation [P * G] that spreads every group evenly over the minibatches.

        All processes then have equal work in each update, whatever groups they hold.
        """
        draws = torch.rand(prompts, size, generator=generator(self.config.seed, self.iteration, "update order"))
        return (draws.argsort(1) + size * torch.arange(prompts).unsqueeze(1)).T.flatten()

    def _micro_batches(self, rows: Tensor, passes: int, matters: Tensor) -> Iterator[Tensor]:
        """Yield the items [M, 2], (pass, sample), of the samples `rows` that matter, in micro-batches."""
        # In the rollout's order: a micro-batch then holds one prompt and one step where it can, as there, and the same
        # kernels round alike. So what does not matter is left out of its micro-batch, and no other moves up.
        items = torch.cartesian_prod(torch.arange(passes), rows.sort().values)
        for micro_batch in items.split(self.config.optimizer.micro_batch) if len(items) else ():
            kept = micro_batch[matters[micro_batch[:, 1]]]
            if len(kept):
                yield kept

    def _backward(self, targets: Any, items: Tensor, share: float) -> Tensor:
        """Add the gradient of the `items`, which are a `share` of a minibatch's; return their part of its loss and
        their metrics, [1 + K]."""
        loss, metrics = self.objective.loss(self.policy, targets, items)
        part = loss * share
        part.backward()
        return torch.stack([part.detach(), *metrics])

    def _gathered(self, parts: Sequence[tuple[float, ...]]) -> MicroBatches:
        """Return the measures of the micro-batches of all processes; `parts` are this one's (update, size, ...)."""
        names = self.objective.metric_names
        table = self.ranks.gather(torch.tensor(parts, dtype=torch.float64).view(-1, 2 + len(names)))
        update, size, *columns = table.unbind(1)
        return MicroBatches(update, size, dict(zip(names, columns, strict=True)))

    def _optimizer_step(
        self, measured: Sequence[Tensor], on_before_step: Callable[[], None]
    ) -> tuple[list[list[float]], float, float]:
        """Sum the gradient over processes, clip it, check it, and take the step.

        `measured`: of each micro-batch of this process its part of the loss and its K metrics, [1 + K]. Returns these
        metrics, the loss of all processes, and the gradient's norm before clipping.
        """
        parameters = [parameter for _, parameter in self.policy.trainable_parameters()]
        for parameter in parameters:
            if parameter.grad is None:  # no sample of this update is here
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        local_norm = torch.nn.utils.get_total_norm(gradients)
        self.ranks.all_reduce_(gradients)
        total_norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_grad_norm)
        # At once, because the host waits for the device each time.
        fetched = torch.cat([torch.stack([local_norm, total_norm]), *measured]).cpu()
        rows = fetched[2:].view(-1, 1 + len(self.objective.metric_names)).tolist()
        own_norm, norm = fetched[:2].tolist()  # of this process, and of all
        each = self.ranks.gather(torch.tensor([[sum(row[0] for row in rows), own_norm]], dtype=torch.float64))
        loss = float(each[:, 0].sum())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad = [str(rank) for rank, finite in enumerate(each.isfinite().all(1).tolist()) if not finite]
            where = f" (process {', '.join(bad)} of {self.ranks.world_size})" if self.ranks.world_size > 1 else ""
            raise TrainingError(
                f"iteration {self.iteration + 1}: the loss is {loss} and the gradient's norm {norm}{where}; this "
                "update was not applied. Start a new --output with a lower optimizer.learning_rate or rollout.eta, and "
                "with train --init_from the last checkpoint's `export` where what was learned is to be kept"
            )
        on_before_step()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [row[1:] for row in rows], loss, norm


def _cost(seconds: Mapping[str, float], num_samples: int, forwards: int) -> Metrics:
    return {
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "samples_per_second": num_samples / seconds["total"],
        "forwards": forwards,
    }
