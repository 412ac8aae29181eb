"""From rewards to advantages: normalization, shaping, weights over time."""

from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from customized_grpo.config.section import Pair, Section, Share, Switches

Shape = Literal["none", "sars", "min", "max", "harmonic", "product"]
Weights = Literal["constant", "tdw", "table"]


class TimeWeightsConfig(Section):
    """TDW: the prompt's weight by progress u, in units of a 25-step schedule (paper, and its published recipe)."""

    early: Share = 0.7
    """Prompt weight while u < start."""
    late: Share = 0.3
    """Prompt weight that the slide between start and end tends to."""
    final: Share = 0.5
    """Prompt weight from u = end on."""
    start: float = 6.0
    """Where the slide begins, in reference steps."""
    end: float = 22.0
    """Where the slide ends, in reference steps."""
    slope: float = 0.8
    """Steepness of the slide, per reference step."""
    midpoint: float = 10.0
    """Middle of the slide, in reference steps."""
    reference_steps: float = Field(25.0, gt=0)
    """Length of the schedule the constants are written for."""

    @model_validator(mode="after")
    def _ordered(self) -> "TimeWeightsConfig":
        if self.start > self.end:
            raise ValueError(f"start={self.start} comes after end={self.end}; expected start <= end")
        return self


class SarsConfig(Section):
    """SARS, the paper's synergy-aware reward shaping."""

    gamma: float = Field(0.4, ge=0)
    """Strength (paper's recipe: 0.4)."""
    gamma_penalty: float | None = Field(None, ge=0)
    """Strength of penalties, given to samples whose rewards conflict or are both bad (worked examples of the paper's
    figure: about 1, with gamma 0.5); unset: gamma."""


class AdvantagesConfig(Section):
    """Turn rewards into advantages: normalize -> shape -> weight -> clip."""

    normalize: Literal["group", "group_then_batch", "rank"] = "group"
    """group: z-score within the group (GRPO). group_then_batch: over the batch too (GDPO). rank: z-score of ranks."""
    shape: Shape = "sars"
    """How to combine the two advantages of a sample; sars is the paper's synergy-aware reward shaping."""
    sars: SarsConfig = SarsConfig()
    """Settings for advantages.shape=sars."""
    thresholds: tuple[float | None, float | None] | None = None
    """Hinge: cut (prompt, identity) rewards off at these values, with every shape; null for no limit."""
    weights: Weights = "tdw"
    """Weights of the rewards over the denoising steps; tdw is the paper's time-aware dynamic weighting."""
    constant: Pair = (0.5, 0.5)
    """(prompt, identity) weights for weights='constant', to whose mean `diagnose` calibrates; naive 1:1 is [0.5, 0.5];
    the paper's tuned 1:1.5, which is identity:prompt, is [0.6, 0.4]."""
    lookup: Literal["step", "counter"] = "step"
    """Look weights up by the true denoising step; or by the loop counter over each sample's shuffled steps, as the
    published code does (docs/differences.md, 1), to reproduce it."""
    tdw: TimeWeightsConfig = TimeWeightsConfig()
    """Settings for advantages.weights=tdw."""
    table: tuple[Pair, ...] | None = None
    """One (prompt, identity) row per denoising step for weights='table'."""
    clip: float = Field(5.0, gt=0)
    """Clip advantages to [-clip, clip] (paper: 5)."""

    SWITCHES: ClassVar[Switches] = {"shape": get_args(Shape), "weights": get_args(Weights)}
    SHARED: ClassVar[Switches] = {
        "constant": ("constant", "table"),  # calibrated tables start from it
        "lookup": ("tdw", "table"),
    }

    @field_validator("constant", "table")
    @classmethod
    def _not_negative(cls, weights: Any) -> Any:
        rows = weights if weights and isinstance(weights[0], tuple) else [weights or ()]
        if any(weight < 0 for row in rows for weight in row):
            raise ValueError("weights must be greater than or equal to 0")
        return weights

    @model_validator(mode="after")
    def _some_weight(self) -> "AdvantagesConfig":
        """Check that some reward has weight: nothing would be learned without."""
        rows = {"constant": [self.constant], "table": self.table or ()}.get(self.weights, ())
        if rows and not any(prompt or identity for prompt, identity in rows):
            raise ValueError(
                f"{self.weights}: all weights are 0, so nothing would be learned; give one of the rewards some"
            )
        return self
