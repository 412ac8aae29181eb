"""From rewards to advantages: normalization, shaping, weights over time."""

from typing import ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from customized_grpo.config.section import Section, Share, Switches

Shape = Literal["none", "sars", "min", "max", "harmonic", "product"]
Weights = Literal["schedules", "table"]


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
    """How to combine the advantages of a sample; sars is the paper's synergy-aware reward shaping."""
    sars: SarsConfig = SarsConfig()
    """Settings for advantages.shape=sars."""
    weights: Weights = "schedules"
    """Weights of the rewards over the denoising steps: by rewards.NAME.schedule, whose early and late are the paper's
    time-aware dynamic weighting (TDW); or a table in their place."""
    lookup: Literal["step", "counter"] = "step"
    """Look weights up by the true denoising step; or by the loop counter over each sample's shuffled steps, as the
    published code does (docs/differences.md, 1), to reproduce it."""
    tdw: TimeWeightsConfig = TimeWeightsConfig()
    """The curve of TDW, for advantages.weights=schedules."""
    table: dict[str, tuple[float, ...]] | None = None
    """Weights of each reward by its name, one per denoising step, for advantages.weights=table."""
    constraints: Literal["strict", "proportional"] = "strict"
    """How hard a group is pushed back within the bounds of rewards with role=constraint. strict: holding pays whatever
    the objectives say. proportional: as hard as the share of samples that break one (docs/rewards.md)."""
    clip: float = Field(5.0, gt=0)
    """Clip advantages to [-clip, clip] (paper: 5)."""

    SWITCHES: ClassVar[Switches] = {"shape": get_args(Shape), "weights": get_args(Weights)}
    SHARED: ClassVar[Switches] = {"tdw": ("schedules",)}

    @field_validator("table")
    @classmethod
    def _not_negative(cls, table: dict[str, tuple[float, ...]] | None) -> dict[str, tuple[float, ...]] | None:
        for name, column in (table or {}).items():
            if any(weight < 0 for weight in column):
                raise ValueError(f"{name}: weights must be greater than or equal to 0, found {min(column)}")
        return table

    @model_validator(mode="after")
    def _some_weight(self) -> "AdvantagesConfig":
        """Check that some reward has weight: nothing would be learned without."""
        if self.weights == "table" and not self.table:
            raise ValueError("table: missing; give the weights of each reward by its name, one per denoising step")
        if self.weights == "table" and not any(any(column) for column in (self.table or {}).values()):
            raise ValueError("table: all weights are 0, so nothing would be learned; give one of the rewards some")
        return self
