"""How rewards agree: the signs of their advantages, by pair, and the groups that teach nothing.

Shapes: P prompts (one group each), G samples of a group, R rewards.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor


def quadrants(
    advantages: Tensor, valid: Tensor | None = None, names: Sequence[str] = ("prompt", "identity")
) -> dict[str, float]:
    """Return the shares of samples by which of two advantages `[P, G, R]` are good (above 0); they sum to 1.

    `names`: of the R >= 2 rewards. Keys for two: both_good, only_prompt, only_identity, both_bad, with their names. For
    more, every pair has its four keys after its names: prompt-identity/both_good. Counts samples whose two rewards are
    valid, of groups in which both differ: a reward that is equal in a whole group finds nothing in it good or bad.
    Without any, every share is NaN. Raises ValueError unless there are two or more rewards, each with a name.
    """
    if len(names) != advantages.shape[-1]:
        raise ValueError(f"names must name each of the {advantages.shape[-1]} rewards, found {list(names)}")
    shares: dict[str, float] = {}
    for i, j in _pairs(advantages):
        first, second = (_usable_samples(advantages, valid, i, j) > 0).unbind(dim=-1)
        hits = {
            "both_good": first & second,
            f"only_{names[i]}": first & ~second,
            f"only_{names[j]}": ~first & second,
            "both_bad": ~first & ~second,
        }
        prefix = "" if len(names) == 2 else f"{names[i]}-{names[j]}/"
        shares |= {f"{prefix}{name}": float(hit.double().mean()) for name, hit in hits.items()}
    return shares


def conflict_rate(advantages: Tensor, valid: Tensor | None = None) -> float:
    """Return the share of samples whose two advantages `[P, G, R]` have opposite signs, 0 having none.

    For R > 2 rewards, the mean over all pairs. Counts the same samples as `quadrants`; NaN without any. Raises
    ValueError for R < 2.
    """
    rates = []
    for i, j in _pairs(advantages):
        pair = _usable_samples(advantages, valid, i, j)
        rates.append(float((pair[:, 0] * pair[:, 1] < 0).double().mean()))
    return sum(rates) / len(rates)


def silent_groups(advantages: Tensor) -> float:
    """Share of groups that teach nothing: all their advantages `[P, G, ...]` are 0."""
    return float((advantages == 0).flatten(1).all(dim=1).double().mean())


def _pairs(advantages: Tensor) -> list[tuple[int, int]]:
    num_rewards = advantages.shape[-1]
    if num_rewards < 2:
        raise ValueError(f"quadrants are of pairs of rewards: they need at least 2, found {num_rewards}")
    return list(combinations(range(num_rewards), 2))


def _usable_samples(advantages: Tensor, valid: Tensor | None, i: int, j: int) -> Tensor:
    """Return the advantages `[n, 2]` of the rewards i and j that `quadrants` counts."""
    if valid is None:
        valid = torch.ones_like(advantages, dtype=torch.bool)
    advantages, valid = advantages[..., [i, j]], valid[..., [i, j]]
    differ = (valid & (advantages != 0)).any(dim=-2, keepdim=True).all(dim=-1)
    return advantages[valid.all(dim=-1) & differ]
