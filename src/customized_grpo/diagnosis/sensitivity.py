"""Temporal dynamics: how much of each reward's variance comes from the noise of each denoising step.

Branch a group at step i: one initial noise and one deterministic path up to i, a stochastic step at i with noise of
each sample's own, a deterministic path after it. The spread of a reward within the group is what step i decides.

Shape legend: P prompts, G samples of a group, S = T - 1 trainable steps, R rewards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from customized_grpo.config.run import Config
from customized_grpo.data import SubjectDataset
from customized_grpo.diagnosis.gradients import FRESH_NOISE, OnProgress, Ticks, silent
from customized_grpo.errors import UserError
from customized_grpo.evaluation.statistics import Array, t_interval
from customized_grpo.policies.policy import ConditionT, Policy
from customized_grpo.rewards.reward import Reward
from customized_grpo.rewards.scoring import Scorer
from customized_grpo.training.rollout import Plan, encode_samples, iteration_samples, sample_groups

RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """`variances` [P, S, R]: of each reward within the group branched at a step, NaN where fewer than two samples
    have a valid reward. `names`: of the rewards. `seed` draws the bootstrap's resamples of prompts."""

    variances: Array
    names: tuple[str, ...]
    seed: int = 0

    def means(self) -> Array:
        """Return the mean variance over prompts [S, R]."""
        return self._resampled_means(np.ones((1, len(self.variances))))[0]

    def intervals(self) -> Array:
        """Return the mean variance over prompts and its 95 % Student's t interval [S, R, 3]: mean, low, high."""
        _, steps, rewards = self.variances.shape
        samples = self.variances.reshape(-1, steps * rewards).T
        return np.array([t_interval(row) for row in samples]).reshape(steps, rewards, 3)

    def shares(self) -> Array:
        """Share of each step in a reward's sensitivity [S, R]: columns sum to 1, NaN for a reward without variance."""
        return _shares(self.means())

    def share_intervals(self) -> Array:
        """Return shares with their 95 % percentile bootstrap over prompts [S, R, 3]: share, low, high."""
        low, high = _percentiles(_shares(self._bootstrap_means()))
        return np.stack([self.shares(), low, high], axis=-1)

    def centres(self) -> Array:
        """Return the center of mass of each reward's sensitivity [R], in steps from 0, the noisiest."""
        return _centres(self.shares())

    def centre_difference(self, first: int = 0, second: int = 1) -> tuple[float, float, float]:
        """Return how many steps the center of reward `second` lies after the center of reward `first` (mean, low,
        high).

        A 95 % percentile bootstrap over prompts, the same prompts for both.
        """
        centres = _centres(_shares(self._bootstrap_means()))
        low, high = _percentiles(centres[..., second] - centres[..., first])
        found = self.centres()
        return float(found[second] - found[first]), float(low), float(high)

    def _bootstrap_means(self) -> Array:
        prompts = len(self.variances)
        draws = np.random.default_rng(self.seed).multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES)
        return self._resampled_means(draws.astype(np.float64))

    def _resampled_means(self, counts: Array) -> Array:
        """Return means [*, S, R] over prompts taken `counts` [*, P] times, NaNs left out."""
        known = np.isfinite(self.variances)
        sums = np.tensordot(counts, np.where(known, self.variances, 0.0), axes=1)
        with np.errstate(invalid="ignore"):
            means: Array = sums / np.tensordot(counts, known.astype(np.float64), axes=1)
        return means


def measure(
    config: Config,
    policy: Policy[ConditionT],
    rewards: Mapping[str, Reward],
    dataset: SubjectDataset,
    *,
    prompts: int = 24,
    group_size: int = 12,
    on_progress: OnProgress = silent,
) -> Sensitivity:
    """Branch a group of `group_size` images at each of the T - 1 trainable steps, for the first `prompts` training
    prompts.

    The sampler (steps, shift, kind of SDE, eta) is configured by `config`; the initial noise is always shared, since
    only the noise of steps can be weighted by step. Raises `UserError` for counts that give no variance or exceed the
    data, `TrainingError` if too many rewards failed.
    """
    if not 2 <= prompts <= len(dataset):
        raise UserError(
            f"prompts: {prompts} were asked for; expected 2 (for an interval) to {len(dataset)} (in the data)"
        )
    if group_size < 2:
        raise UserError(f"group_size: a group of {group_size} has no variance; ask for 2 or more")
    at_once = min(prompts, config.rollout.prompts_per_iteration)
    settings = config.rollout.model_copy(
        update={"same_initial_noise": True, "group_size": group_size, "prompts_per_iteration": at_once}
    )
    scorer, sigmas = Scorer(rewards, config.rewards), policy.sigmas(settings.num_steps, settings.shift)
    steps, firsts, parts = settings.num_steps - 1, range(0, prompts, at_once), []
    ticks = Ticks(on_progress, steps * len(firsts))
    for number, first in enumerate(firsts):
        samples = iteration_samples(dataset, at_once, config.seed, number)[: prompts - first]
        condition, batch = encode_samples(policy, dataset, samples), scorer.batch(dataset, samples)
        branches = []
        for i in range(steps):
            rollout = sample_groups(
                policy, condition, len(samples), Plan(sigmas, (i,), (i,)), settings,
                seed=config.seed, iteration=FRESH_NOISE + number,
            )  # fmt: skip
            scores = scorer.score(rollout.images, batch)
            scorer.check(scores, f"step {i} of the sensitivity")
            branches.append(group_variances(scores.values, scores.valid))
            ticks.tick()
        parts.append(np.stack(branches, axis=1))
    return Sensitivity(np.concatenate(parts), scorer.names, config.seed)


def group_variances(rewards: Tensor, valid: Tensor) -> Array:
    """Return the unbiased variance [P, R] within each group of `rewards` [P, G, R], over its `valid` entries, in
    float64.

    NaN for a group with fewer than two valid entries; 0 if they differ by no more than a few units in the last place of
    the largest, the rounding that `group_advantages` treats as equal.
    """
    values, known = rewards.double().numpy(), valid.numpy()
    count = known.sum(1)
    mean = np.where(known, values, 0.0).sum(1) / np.maximum(count, 1)
    squares = np.where(known, values - mean[:, None], 0.0) ** 2
    variance = squares.sum(1) / np.maximum(count - 1, 1)
    spread = np.where(known, values, -np.inf).max(1) - np.where(known, values, np.inf).min(1)
    rounding = 8 * np.finfo(rewards.numpy().dtype).eps * np.where(known, np.abs(values), 0.0).max(1)
    return np.where(count < 2, np.nan, np.where(spread <= rounding, 0.0, variance))


def calibrated_weights(shares: npt.ArrayLike, constant: Sequence[float], names: Sequence[str]) -> Array:
    """Return time weights [T, R] from shares of sensitivity [T - 1, R] and constant weights of the rewards `names`.

    `w_k(i)` is proportional to `s_k(i) / sum_j s_j(i)`, and over the T - 1 trainable steps its mean is `constant[k]`:
    the total pull of each reward stays, its place in time moves. A step where no reward has a share gets `constant`,
    and so does the deterministic last one, which is never trained. Raises `UserError` for a reward whose shares are all
    zero or unknown.
    """
    share, weights = np.asarray(shares, dtype=np.float64), np.asarray(constant, dtype=np.float64)
    for name, column in zip(names, share.T, strict=True):
        if not np.isfinite(column).all() or not column.any():
            raise UserError(
                f"the {name} reward does not vary within the groups measured, or could not be computed: no time "
                "weights follow from it. Check the reward, raise rollout.eta, or measure more prompts"
            )
    both = share.sum(1, keepdims=True)
    active = both[:, 0] > 0
    relative = share[active] / both[active]
    table = np.tile(weights, (len(share) + 1, 1))
    table[:-1][active] = weights * relative / relative.mean(0)
    return table


def _shares(means: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        shares: Array = means / means.sum(-2, keepdims=True)
    return shares


def _centres(shares: Array) -> Array:
    centres: Array = (np.arange(shares.shape[-2])[:, None] * shares).sum(-2)
    return centres


def _percentiles(samples: Array) -> Array:
    """Return the 2.5 and 97.5 percentiles [2, ...] over the first axis, ignoring NaNs unless all values are NaN."""
    unknown = np.isnan(samples).all(0)
    bounds: Array = np.nanpercentile(np.where(unknown, 0.0, samples), (2.5, 97.5), axis=0)
    return np.where(unknown, np.nan, bounds)
