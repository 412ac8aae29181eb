"""What is evaluated, and when."""

from typing import Literal

from pydantic import Field, model_validator

from customized_grpo.config.rewards import ScoreConfig, check_name
from customized_grpo.config.section import Section

HELD_OUT_GAIN = "held_out_gain"
ORACLE = ("prompt_satisfied", "identity_kept", "joint_success")
"""Figures of ToyBox's oracle, which nothing is trained on."""
BUILT_IN = (*ORACLE, "copied", "copy_score", "copy", "texture", "diversity", HELD_OUT_GAIN, "reward_gain")
"""Figures that no metric may be named as."""


class MetricConfig(ScoreConfig):
    """A metric: what it scores by. Nothing is trained on it."""

    kind: Literal[
        "toybox_prompt", "toybox_identity", "hpsv3", "hpsv2", "pickscore", "clip_t", "siglip", "dino", "clip_i",
        "vlm_prompt", "vlm_identity", "remote", "python"
    ]  # fmt: skip
    """Kind of score, as of rewards (docs/rewards.md)."""


class EvaluationConfig(Section):
    """Validation during training and the evaluation at its end; both sample the deterministic ODE."""

    every: int = Field(10, ge=1)
    """Iterations between validations."""
    num_samples: int = Field(96, ge=1)
    """Samples to validate on, from the first of the folder."""
    num_test_samples: int = Field(384, ge=2)
    """Samples of the final evaluation, from the first of the folder."""
    gallery: int = Field(8, ge=1)
    """Samples shown in a gallery."""
    metrics: dict[str, MetricConfig] = Field({})
    """Held-out metrics by name, beside what is built in: texture, diversity, and the copy-paste meter; of ToyBox its
    oracle (docs/metrics.md). --evaluation.metrics.help lists their fields."""
    diversity_prompts: int = Field(4, ge=0)
    """Samples whose prompts are drawn several times, to measure the diversity within a prompt; 0: not measured."""
    diversity_images: int = Field(4, ge=2)
    """Images of each of these prompts."""
    held_out: tuple[str, ...] | None = None
    """Metrics whose mean gain over the base is held_out_gain; unset: all of `metrics` that are no rewards too, and
    ToyBox's oracle."""
    select: str = HELD_OUT_GAIN
    """Metric whose best validation is kept in best/: held_out_gain, or the name of a metric."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many validations in a row without a better one; unset: train all iterations."""

    @model_validator(mode="after")
    def _check_names(self) -> "EvaluationConfig":
        for name in self.metrics:
            check_name(name)
            if name in (*BUILT_IN, "iteration", "pairs", "id", "prompt", "subject"):
                raise ValueError(f"metrics: '{name}' is a name of what is built in; choose another")
        return self
