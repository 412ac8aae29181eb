"""How groups of images are drawn."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from customized_grpo.config.section import ReadWith, Section


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
    initial_noise: Literal["shared", "separate"] = "shared"
    """One initial noise per group (paper: shared), or one per image: more variance within a group."""
    steps: Literal["subset", "window"] = "subset"
    """Trained steps: a random subset of all steps, all of them stochastic; or a window, the only stochastic part."""
    subset_share: float = Field(0.6, gt=0, le=1)
    """Share of the T - 1 trainable steps trained in an iteration (paper: 0.6)."""
    window_size: int = Field(4, ge=1)
    """Steps in the window."""
    window_start: int | None = Field(None, ge=0)
    """First step of the window; unset: it slides on by one step every window_period iterations."""
    window_period: int = Field(5, ge=1)
    """Iterations that a sliding window stays in one place."""
    micro_batch: int = Field(30, ge=1)
    """Images that go through the generator at once: bounds memory, does not change the result."""

    READ_WITH: ClassVar[ReadWith] = {
        "subset_share": ("steps", ["subset"]),
        "window_size": ("steps", ["window"]),
        "window_start": ("steps", ["window"]),
        "window_period": ("steps", ["window"]),
    }

    @model_validator(mode="after")
    def _window_inside(self) -> "RolloutConfig":
        start = self.window_start or 0
        if self.steps == "window" and start + self.window_size > self.num_steps - 1:
            raise ValueError(
                f"the window of window_size={self.window_size} steps from window_start={start} does not fit: "
                f"of num_steps={self.num_steps} steps, 0 to {self.num_steps - 2} are trainable"
                " (the last is deterministic). Make the window smaller or start it earlier"
            )
        if self.window_start is not None and self.differs_from_default("window_period"):
            raise ValueError("window_period: a window with a window_start stays there; leave one of them out")
        if self.sde == "cps" and self.eta > 1:
            raise ValueError(f"eta={self.eta} is too large for sde='cps': it must be in (0, 1]")
        return self
