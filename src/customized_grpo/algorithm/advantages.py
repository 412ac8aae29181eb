"""From rewards to one advantage per sample and denoising step: normalise -> shape -> weight -> constrain -> clamp.

Five pure stages over tensors, chained by `combine_advantages`; `step_advantages` is the paper's choice.

Shapes: P prompts (one group each), G samples of a group, R rewards (the objectives), C constraints, T steps.
`valid[p, g, r]` is False where a reward could not be computed. Such an entry takes part in no statistic,
whatever number (or NaN) stands in its place. `combine_advantages` drops its whole sample: from the statistics of
every reward, and with advantage 0.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

EPS = 1e-8
SCHEDULES = ("constant", "early", "late")


class Shaped(NamedTuple):
    """What a shaper returns: `advantages [P, G, R]`, to be weighted, and `bonus [P, G]`, added afterwards."""

    advantages: Tensor
    bonus: Tensor


Normaliser = Callable[[Tensor, Tensor | None], Tensor]
Shaper = Callable[..., Shaped]
Stage = TypeVar("Stage")


def hinge_rewards(rewards: Tensor, thresholds: Sequence[float] | Tensor) -> Tensor:
    """Let each reward count only up to its threshold: `min(r, threshold)`, `[P, G, R]`.

    Works on raw rewards, so that a threshold is in the reward's own units: identity that is already good
    enough earns nothing more. `thresholds`: one per reward `[R]`, `inf` for no limit. Raises ValueError on
    another number of them.
    """
    limits = torch.as_tensor(thresholds, dtype=_dtype(rewards), device=rewards.device)
    if limits.shape != rewards.shape[-1:]:
        raise ValueError(
            f"thresholds must hold one value for each of the {rewards.shape[-1]} rewards, "
            f"found shape {list(limits.shape)}"
        )
    return torch.minimum(rewards.to(limits.dtype), limits)


def group_advantages(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the z-score of each reward within its group, `(r - mean_G) / (std_G + 1e-8)`, `[P, G, R]`, unbiased std.

    GRPO's advantage (arXiv 2402.03300, section 4.1.2), each reward on its own. Invalid entries get 0. So do all entries
    of a group without information: fewer than two valid rewards, or rewards equal up to the round-off of their
    magnitude (dividing by such a std would blow noise up to full-size advantages).

    Raises ValueError on wrong shapes and on a NaN or infinite reward that is marked valid.
    """
    rewards, valid = _checked(rewards, valid)
    advantages = _zscore(rewards, valid, dims=(1,))
    return torch.where(valid & ~_all_equal(rewards, valid), advantages, 0.0)


def group_then_batch_advantages(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """Group z-score, then a z-score of each reward over the whole batch (after GDPO, arXiv 2601.05242).

    Groups that say nothing keep advantage 0 but count in the batch's std, so the fewer groups speak, the
    louder they are. P must be the whole batch (gathered from all ranks). GDPO whitens the *weighted sum* of
    its rewards; here the weights change from step to step, so each reward is whitened on its own. Errors as
    in `group_advantages`.
    """
    rewards, valid = _checked(rewards, valid)
    advantages = group_advantages(rewards, valid)
    return torch.where(advantages == 0, 0.0, _zscore(advantages, valid, dims=(0, 1)))


def rank_advantages(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the z-score of the ranks within each group: mean 0, unbiased std 1, for any distribution of the reward.

    Ties share the mean of their ranks. Invalid entries, groups without information and errors as in `group_advantages`.
    """
    rewards, valid = _checked(rewards, valid)
    mine, other = rewards.unsqueeze(2), rewards.unsqueeze(1)
    comparable = valid.unsqueeze(1)
    below = ((other < mine) & comparable).sum(2)
    tied = ((other == mine) & comparable).sum(2)
    ranks = below + 0.5 * (tied - 1)
    return torch.where(_all_equal(rewards, valid), 0.0, group_advantages(ranks.to(rewards.dtype), valid))


NORMALISERS: dict[str, Normaliser] = {
    "group": group_advantages,
    "group_then_batch": group_then_batch_advantages,
    "rank": rank_advantages,
}


def synergy_shaping(advantages: Tensor, gamma: float, gamma_penalty: float | None = None) -> Tensor:
    """Return the bonus `S [P, G]` of synergy-aware reward shaping (SARS), within `[-gamma_penalty, gamma]`.

    `S = gamma s tanh(A_prompt A_identity)`, `s = +1` if at least one of the two is positive, else -1: a bonus if both
    are good, a penalty if they conflict or both are bad. `gamma_penalty` replaces `gamma` in penalties; None: `gamma`,
    as in the paper's equation. For R > 2 rewards, the mean over all pairs. Raises ValueError for R < 2.
    """
    num_rewards = advantages.shape[-1]
    if num_rewards < 2:
        raise ValueError(f"synergy shaping compares rewards: it needs at least 2, found {num_rewards}")
    penalty = gamma if gamma_penalty is None else gamma_penalty
    pairs = []
    for i, j in combinations(range(num_rewards), 2):
        a, b = advantages[..., i], advantages[..., j]
        product = torch.tanh(a * b)
        pairs.append(torch.where((a > 0) & (b > 0), gamma * product, -penalty * product.abs()))
    return torch.stack(pairs).mean(dim=0)


def _no_shaping(advantages: Tensor, valid: Tensor, gamma: float) -> Shaped:
    return Shaped(advantages, torch.zeros_like(advantages[..., 0]))


def _sars(advantages: Tensor, valid: Tensor, gamma: float, gamma_penalty: float | None = None) -> Shaped:
    if advantages.shape[-1] == 1:  # no pair
        return _no_shaping(advantages, valid, gamma)
    return Shaped(advantages, synergy_shaping(advantages, gamma, gamma_penalty))


def _minimum(advantages: Tensor, valid: Tensor, gamma: float) -> Shaped:
    return _one_signal(advantages.amin(dim=-1), advantages)


def _maximum(advantages: Tensor, valid: Tensor, gamma: float) -> Shaped:
    return _one_signal(advantages.amax(dim=-1), advantages)


def _harmonic(advantages: Tensor, valid: Tensor, gamma: float) -> Shaped:
    mean = advantages.shape[-1] / (1 / torch.sigmoid(advantages)).sum(dim=-1)
    return _one_signal(_renormalised(mean, valid), advantages)


def _product(advantages: Tensor, valid: Tensor, gamma: float) -> Shaped:
    return _one_signal(_renormalised(torch.sigmoid(advantages).prod(dim=-1), valid), advantages)


def _renormalised(signal: Tensor, valid: Tensor) -> Tensor:
    return group_advantages(signal.unsqueeze(-1), valid.all(dim=-1, keepdim=True)).squeeze(-1)


def _one_signal(signal: Tensor, advantages: Tensor) -> Shaped:
    """Repeat one signal in every reward channel: weights that sum to 1 at each step pass it on unchanged."""
    return Shaped(signal.unsqueeze(-1).expand_as(advantages), torch.zeros_like(signal))


SHAPERS: dict[str, Shaper] = {
    "none": _no_shaping,
    "sars": _sars,
    "min": _minimum,
    "max": _maximum,
    "harmonic": _harmonic,
    "product": _product,
}
"""Shapers by name, each `(advantages [P, G, R], valid [P, G, R], gamma) -> Shaped`; `sars` takes `gamma_penalty` too.

* `none`: advantages pass, no bonus (naive GRPO, TDW alone).
* `sars`: advantages pass, the bonus is `synergy_shaping`; the only one to read `gamma`.
* `min`, `max`: the smallest, largest of the R advantages, in place of each.
* `harmonic`, `product`: harmonic mean and product ask for positive numbers, and advantages are not: each goes
  through a sigmoid to (0, 1) first (0.5 is average), and the result is z-scored within its group again.
"""


def constant_weights(num_steps: int, weights: Sequence[float]) -> Tensor:
    """Return the same weights, one per reward, at every step: `[num_steps, R]` float32.

    Raises ValueError if `num_steps < 1` or a weight is negative or not finite.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, found {num_steps}")
    return table_weights([list(weights)] * num_steps)


def table_weights(table: Sequence[Sequence[float]] | Tensor) -> Tensor:
    """Return a table of weights as `[T, R]` float32, row i for true denoising step i (0 is the noisiest).

    Raises ValueError unless it is a table of finite, non-negative numbers.
    """
    try:
        weights = torch.as_tensor(table, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a weight table needs one row of numbers per step, all of one length: {error}") from error
    if weights.ndim != 2 or weights.numel() == 0:
        raise ValueError(f"a weight table has the shape [steps, rewards], found {list(weights.shape)}")
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"weights must be finite and not negative, found {weights.tolist()}")
    return weights


def time_curve(
    num_steps: int,
    *,
    early: float = 0.7,
    late: float = 0.3,
    final: float = 0.5,
    start: float = 6.0,
    end: float = 22.0,
    slope: float = 0.8,
    midpoint: float = 10.0,
    reference_steps: float = 25,
) -> Tensor:
    """Return the prompt's weight under time-aware dynamic weighting (TDW), `[num_steps]` float64.

    Its value at true denoising step i (0 is the noisiest), where `u = reference_steps i / num_steps` measures progress
    in steps of the paper's 25-step schedule:

    * `early` for `u < start`: layout is decided here;
    * `late + (early - late) (1 - sigmoid(slope (u - midpoint)))` for `start <= u < end`: a slide towards
      identity;
    * `final` from `end` on: both at once.

    Defaults are the published ones. `early`, `late`, `final` are weights in [0, 1]; `start`, `end`,
    `midpoint` are in reference steps, `slope` per reference step. Raises ValueError on numbers out of range.
    """
    for name, weight in {"early": early, "late": late, "final": final}.items():
        if not 0 <= weight <= 1:
            raise ValueError(f"{name} is the weight of the prompt and must be in [0, 1], found {weight}")
    if not start <= end:
        raise ValueError(f"start must not come after end, found start={start}, end={end}")
    if num_steps < 1 or not reference_steps > 0:
        raise ValueError(
            f"num_steps and reference_steps must be positive, found num_steps={num_steps}, "
            f"reference_steps={reference_steps}"
        )
    u = reference_steps * torch.arange(num_steps, dtype=torch.float64) / num_steps
    prompt = late + (early - late) * (1 - torch.sigmoid(slope * (u - midpoint)))
    return torch.where(u < start, early, torch.where(u < end, prompt, final))


def time_weights(num_steps: int, **constants: float) -> Tensor:
    """Return the weights of TDW for two rewards: `[num_steps, 2]` float32, (prompt, identity).

    Each row sums to 1: the prompt follows `time_curve`, which takes the `constants`, and the identity its complement.
    Rows belong to true steps: a trainer that shuffles or picks steps indexes them with the steps it picked.
    """
    return schedule_weights(time_curve(num_steps, **constants), ("early", "late"), (1.0, 1.0))


def schedule_weights(curve: Tensor, schedules: Sequence[str], weights: Sequence[float]) -> Tensor:
    """Return the weights `[T, R]` float32 of rewards by their schedules over T steps; each row sums to 1.

    A reward with schedule "constant" has its weight at every step. Of what these leave, the rewards with schedule
    "early" have the share `curve [T]`, and those with schedule "late" the rest; several with one schedule divide it in
    proportion to their weights. If all are constant, weights are relative. Raises ValueError unless all weights are
    positive, "early" and "late" come together, and constant weights leave something to them.
    """
    if not schedules or len(schedules) != len(weights) or not all(weight > 0 for weight in weights):
        raise ValueError(f"each reward needs a schedule and a positive weight, found {[*schedules]} and {[*weights]}")
    totals = {name: sum(w for s, w in zip(schedules, weights, strict=True) if s == name) for name in SCHEDULES}
    if unknown := sorted({*schedules} - {*SCHEDULES}):
        raise ValueError(f"unknown schedule {unknown[0]!r}; choose one of {', '.join(SCHEDULES)}")
    if bool(totals["early"]) != bool(totals["late"]):
        raise ValueError("the schedules early and late divide one share between them: give some reward the other one")
    curve = curve.double()
    if not totals["early"]:
        parts = {"constant": torch.ones_like(curve)}
    elif not totals["constant"] < 1:
        raise ValueError(
            f"constant weights sum to {totals['constant']:g}, expected less than 1: early and late share the rest"
        )
    else:
        rest = 1 - totals["constant"]
        parts = {"constant": torch.full_like(curve, totals["constant"]), "early": rest * curve}
        parts["late"] = rest * (1 - curve)
    columns = [
        parts[schedule] * (weight / totals[schedule]) for schedule, weight in zip(schedules, weights, strict=True)
    ]
    return torch.stack(columns, dim=-1).float()


def weigh_advantages(
    advantages: Tensor, weights: Tensor, bonus: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Return `A[p, g, t] = sum_r weights[t, r] advantages[p, g, r] + bonus[p, g]`, `[P, G, T]`.

    `weights [T, R]` holds the rows of the steps that are trained; `[P, G, T, R]` gives every sample its own.
    A sample with any invalid reward gets 0 at every step, bonus included. Raises ValueError where the numbers of
    rewards differ.
    """
    per_sample = weights.ndim == 4 and weights.shape[:2] == advantages.shape[:2]
    if not (weights.ndim == 2 or per_sample) or weights.shape[-1] != advantages.shape[-1]:
        raise ValueError(
            f"weights must have the shape [steps, {advantages.shape[-1]}], one column per reward, or "
            f"{[*advantages.shape[:2], 'steps', advantages.shape[-1]]}, found {list(weights.shape)}"
        )
    weights = weights.to(advantages)
    weighed = (advantages.unsqueeze(-2) * weights).sum(dim=-1)
    if bonus is not None:
        weighed = weighed + bonus.unsqueeze(-1)
    return weighed if valid is None else torch.where(valid.all(dim=-1, keepdim=True), weighed, 0.0)


def violations(rewards: Tensor, at_least: Sequence[float | None], at_most: Sequence[float | None]) -> Tensor:
    """Return how far rewards `[P, G, C]` are outside of their bounds, `[P, G, C]` >= 0; None is no bound."""
    low = torch.tensor([-torch.inf if bound is None else bound for bound in at_least], dtype=rewards.dtype)
    high = torch.tensor([torch.inf if bound is None else bound for bound in at_most], dtype=rewards.dtype)
    return (low - rewards).clamp(min=0) + (rewards - high).clamp(min=0)


def hold_constraints(
    advantages: Tensor, violations: Tensor, valid: Tensor | None = None, *, strict: bool = True
) -> Tensor:
    """Return advantages `[P, G, T]` that push samples back within their bounds, by their `violations [P, G, C]`.

    With m the share of a group's samples that violate some constraint, and z the z-score of minus the violation within
    the group (of the sum of the z-scores, for several constraints):

        `A' = A` if m = 0, else `A' = (1 - m) A / max(1, std_G A) + z`

    A group that holds every constraint is unchanged, to the last bit. If all samples of a group break one, it learns
    nothing but to hold it. In between, the covariance of A' with minus the violation is at least m times the standard
    deviation of the violation, whatever A says: A, scaled to a standard deviation of at most 1, cannot outweigh z,
    whose standard deviation is 1. A gated hinge, as in lexicographic or feasibility-first selection (Deb 2000).

    Not `strict`, the push has the size of the share too, `A' = (1 - m) A / max(1, std_G A) + m z`: one slight offender
    does not decide what its group learns. Then the covariance is at least 2 m - 1 times that deviation: holding pays
    for sure where more than half of a group violate a constraint.

    Samples that are not `valid [P, G]` keep advantage 0 and count in no group.
    """
    known = torch.ones_like(violations[..., 0], dtype=torch.bool) if valid is None else valid
    each = known.unsqueeze(-1).expand_as(violations)
    holding = group_advantages(-violations, each)
    if violations.shape[-1] > 1:
        holding = group_advantages(holding.sum(-1, keepdim=True), each[..., :1])
    broken = ((violations > 0).any(-1) & known).sum(1) / known.sum(1).clamp(min=1)
    m = broken[:, None, None].to(advantages.dtype)
    counts = each[..., :1].expand_as(advantages)
    gated = (1 - m) * advantages / _std(advantages, counts, dims=(1,)).clamp(min=1)
    push = holding.to(advantages.dtype) * (1 if strict else m)
    pushed = torch.where(known.unsqueeze(-1), gated + push, 0.0)
    return torch.where(m > 0, pushed, advantages)


def clamp_advantages(advantages: Tensor, clamp: float = 5.0) -> Tensor:
    """Limit advantages to `[-clamp, clamp]` (published: 5). Raises ValueError if `clamp <= 0`."""
    if not clamp > 0:
        raise ValueError(f"clamp must be greater than 0, found {clamp}")
    return advantages.clamp(-clamp, clamp)


def combine_advantages(
    rewards: Tensor,
    valid: Tensor | None = None,
    *,
    weights: Tensor,
    normalise: str = "group",
    shape: str = "sars",
    gamma: float = 0.4,
    gamma_penalty: float | None = None,
    thresholds: Sequence[float] | Tensor | None = None,
    violations: Tensor | None = None,
    strict: bool = True,
    clamp: float = 5.0,
) -> Tensor:
    """Return advantages `[P, G, T]` of rewards `[P, G, R]`, by the named stages.

    `normalise` is a key of NORMALISERS, `shape` of SHAPERS; `weights` are as in `weigh_advantages`. `gamma` is the
    strength of SARS (published: 0.4), read by `shape="sars"` only, and `gamma_penalty` the strength of its
    penalties if it is set. `thresholds` switches the hinge on, before everything else; `violations [P, G, C]` of
    constraints switch `hold_constraints` on, which reads `strict`. Raises ValueError on an unknown name, listing
    the known ones, on a `gamma_penalty` that `shape` does not read, and as the stages do.
    """
    normaliser = _named(NORMALISERS, normalise, "normaliser")
    shaper = _named(SHAPERS, shape, "shaper")
    if gamma_penalty is not None and shape != "sars":
        raise ValueError(f"gamma_penalty is read by shape 'sars' only, found shape {shape!r}")
    strengths = (gamma,) if gamma_penalty is None else (gamma, gamma_penalty)
    rewards, valid = _checked(rewards, valid)
    valid = valid.all(dim=-1, keepdim=True).expand_as(valid)
    if thresholds is not None:
        rewards = hinge_rewards(rewards, thresholds)
    shaped = shaper(normaliser(rewards, valid), valid, *strengths)
    advantages = weigh_advantages(shaped.advantages, weights, shaped.bonus, valid)
    if violations is not None and violations.shape[-1]:
        advantages = hold_constraints(advantages, violations, valid[..., 0], strict=strict)
    return clamp_advantages(advantages, clamp)


def step_advantages(
    rewards: Tensor, *, gamma: float, weights: Tensor, valid: Tensor | None = None, clamp: float = 5.0,
    gamma_penalty: float | None = None,
) -> Tensor:  # fmt: skip
    """Return the paper's advantages `[P, G, T]`: group z-score, SARS, per-step weights `[T, R]`, clamp.

    `clamp(sum_k w_k(i) A_k + S, -clamp, clamp)`. Errors as in `combine_advantages`.
    """
    return combine_advantages(rewards, valid, weights=weights, gamma=gamma, gamma_penalty=gamma_penalty, clamp=clamp)


def _dtype(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32


def _checked(rewards: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return rewards as floats, 0 in place of invalid entries, and the mask, by default all True."""
    if rewards.ndim != 3:
        raise ValueError(f"rewards must have the shape [prompts, group, rewards], found {list(rewards.shape)}")
    if valid is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    if valid.dtype != torch.bool or valid.shape != rewards.shape:
        raise ValueError(
            f"valid must be bool of shape {list(rewards.shape)}, found {valid.dtype} of {list(valid.shape)}"
        )
    rewards = torch.where(valid, rewards, 0).to(_dtype(rewards))
    if not bool(rewards.isfinite().all()):
        p, g, r = (~rewards.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"rewards[{p}, {g}, {r}] is {rewards[p, g, r].item()} yet counts as valid: "
            "mark a reward that failed as invalid"
        )
    return rewards, valid


def _zscore(values: Tensor, valid: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _centred(values, valid, dims) / (_std(values, valid, dims) + EPS)


def _std(values: Tensor, valid: Tensor, dims: tuple[int, ...]) -> Tensor:
    squares = torch.where(valid, _centred(values, valid, dims).square(), 0.0).sum(dims, keepdim=True)
    return torch.sqrt(squares / (valid.sum(dims, keepdim=True) - 1).clamp(min=1))


def _centred(values: Tensor, valid: Tensor, dims: tuple[int, ...]) -> Tensor:
    count = valid.sum(dims, keepdim=True)
    return values - torch.where(valid, values, 0.0).sum(dims, keepdim=True) / count.clamp(min=1)


def _all_equal(rewards: Tensor, valid: Tensor) -> Tensor:
    """Return the groups `[P, 1, R]` whose valid rewards differ by a few units in the last place of the largest."""
    high = torch.where(valid, rewards, -torch.inf).amax(dim=1, keepdim=True)
    low = torch.where(valid, rewards, torch.inf).amin(dim=1, keepdim=True)
    magnitude = torch.where(valid, rewards.abs(), 0.0).amax(dim=1, keepdim=True)
    return high - low <= 8 * torch.finfo(rewards.dtype).eps * magnitude


def _named(stages: Mapping[str, Stage], name: str, what: str) -> Stage:
    if name not in stages:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(stages)}")
    return stages[name]
