"""The method as pure tensor maths: no models, no files, no configuration.

`flow` samples and scores steps, `advantages` turns rewards into one advantage per sample and step,
`agreement` counts where rewards agree, `objective` is the loss. `docs/method.md` ties each function to its equation.
"""

from customized_grpo.algorithm.advantages import (
    NORMALISERS,
    SHAPERS,
    Shaped,
    clamp_advantages,
    combine_advantages,
    constant_weights,
    group_advantages,
    group_then_batch_advantages,
    hinge_rewards,
    rank_advantages,
    step_advantages,
    synergy_shaping,
    table_weights,
    time_weights,
    weigh_advantages,
)
from customized_grpo.algorithm.agreement import conflict_rate, quadrants, silent_groups
from customized_grpo.algorithm.flow import (
    SDE_KINDS,
    Gaussian,
    SdeKind,
    SdeStep,
    gaussian_kl,
    ode_step,
    sde_step,
    shift_sigmas,
    transition,
)
from customized_grpo.algorithm.objective import ClippedObjective, clipped_objective

__all__ = [
    "NORMALISERS",
    "SDE_KINDS",
    "SHAPERS",
    "ClippedObjective",
    "Gaussian",
    "SdeKind",
    "SdeStep",
    "Shaped",
    "clamp_advantages",
    "clipped_objective",
    "combine_advantages",
    "conflict_rate",
    "constant_weights",
    "gaussian_kl",
    "group_advantages",
    "group_then_batch_advantages",
    "hinge_rewards",
    "ode_step",
    "quadrants",
    "rank_advantages",
    "sde_step",
    "shift_sigmas",
    "silent_groups",
    "step_advantages",
    "synergy_shaping",
    "table_weights",
    "time_weights",
    "transition",
    "weigh_advantages",
]
