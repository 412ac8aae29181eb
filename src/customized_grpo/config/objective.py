"""The objective that an update minimizes."""

from typing import Literal

from pydantic import Field

from customized_grpo.config.section import Section, Weight


class ObjectiveConfig(Section):
    """What an update minimizes."""

    kind: Literal["grpo"] = "grpo"
    """'grpo' is the clipped surrogate (paper)."""
    clip_range: float = Field(1e-4, gt=0)
    """Clip probability ratios to [1 - clip_range, 1 + clip_range] (paper: 1e-4). DanceGRPO: clip_range;
    TRL: epsilon."""
    old_log_probs: Literal["rollout", "recomputed"] = "rollout"
    """Where the ratio's denominator comes from. 'recomputed': from the update's own forward pass before its first step,
    so that first ratios are 1 though a rollout rounds otherwise, as compiled code does. It takes that pass twice."""
    kl_weight: Weight = 0.0
    """Weight of the KL divergence from the untuned generator (paper: 0). DanceGRPO: kl_coeff; TRL: beta."""
