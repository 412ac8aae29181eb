"""How groups of images are drawn."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from customized_grpo.config.section import Section, Switches


class SubsetConfig(Section):
    """Training on a random subset of the steps."""

    timestep_fraction: float = Field(0.6, gt=0, le=1)
    """Fraction of the T - 1 trainable steps that each iteration trains (paper: 0.6)."""


class WindowConfig(Section):
    """Training on a window of consecutive steps (MixGRPO, arXiv 2507.21802)."""

    size: int = Field(4, ge=1)
    """Steps in the window."""
    start: int | None = Field(None, ge=0)
    """First step of the window; unset: the window moves on by one step every `period` iterations."""
    period: int = Field(5, ge=1)
    """Iterations that a moving window stays in one place."""

    @model_validator(mode="after")
    def _check_period(self) -> "WindowConfig":
        if self.start is not None and self.differs_from_default("period"):
            raise ValueError("period: a window with a start stays there; leave one of them out")
        return self


class RolloutConfig(Section):
    """How groups of images are sampled."""

    prompts_per_iteration: int = Field(5, ge=1)
    """Prompts (groups) per iteration."""
    group_size: int = Field(12, ge=2)
    """Images per prompt, G (paper: 12)."""
    num_steps: int = Field(10, ge=2)
    """Denoising steps, T (paper: 25)."""
    shift: float | None = Field(2.0, gt=0)
    """Shift of the sigma schedule (paper: 3; the ToyBox generator was trained at 2); null: the generator's own
    schedule."""
    sde: Literal["dance", "flow", "cps"] = "cps"
    """Stochastic step: Dance-SDE (paper), Flow-SDE, or coefficient-preserving sampling."""
    eta: float = Field(0.8, gt=0)
    """Noise of a stochastic step (paper: 0.4)."""
    same_initial_noise: bool = True
    """Start all images of a group from the same noise (paper: true). false: every image has its own, which gives more
    variance within a group."""
    trained_steps: Literal["subset", "window"] = "subset"
    """Which steps to train: a random subset, with all steps stochastic (paper); or a window, with only its steps
    stochastic."""
    subset: SubsetConfig = SubsetConfig()
    """Settings for rollout.trained_steps=subset."""
    window: WindowConfig = WindowConfig()
    """Settings for rollout.trained_steps=window."""
    micro_batch: int = Field(30, ge=1)
    """Images that go through the generator at once: bounds memory, does not change the result."""

    SWITCHES: ClassVar[Switches] = {"trained_steps": ("subset", "window")}

    @model_validator(mode="after")
    def _check_window(self) -> "RolloutConfig":
        size, start = self.window.size, self.window.start or 0
        if self.trained_steps == "window" and start + size > self.num_steps - 1:
            raise ValueError(
                f"the window of window.size={size} steps from window.start={start} does not fit: "
                f"of num_steps={self.num_steps} steps, 0 to {self.num_steps - 2} are trainable"
                " (the last is deterministic). Make the window smaller or start it earlier"
            )
        if self.sde == "cps" and self.eta > 1:
            raise ValueError(f"eta={self.eta} is too large for sde='cps': it must be in (0, 1]")
        return self
