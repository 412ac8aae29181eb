"""Optimizer, averaged weights, checkpoints, processes and logs."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from customized_grpo.config.section import Pair, Section, Weight


class OptimizerConfig(Section):
    """AdamW."""

    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: moments of parameters of 4096 numbers or more take 8 bits instead of 32 (needs
    customized-grpo[quantization])."""
    learning_rate: float = Field(1.5e-3, gt=0)
    """Learning rate (paper: 2e-5 for a 12 B model)."""
    weight_decay: Weight = 1e-4
    """Weight decay (paper: 1e-4)."""
    betas: Pair = (0.9, 0.999)
    """Decay rates of the moments."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm (paper: 1.0)."""
    num_minibatches: int = Field(2, ge=1)
    """Minibatches per iteration: the images are split evenly among them, and each gives one optimizer step."""
    micro_batch: int = Field(30, ge=1)
    """(image, step) pairs per backward pass: bounds memory, does not change the result."""

    @field_validator("betas")
    @classmethod
    def _rates(cls, betas: Pair) -> Pair:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("decay rates must be at least 0, and less than 1")
        return betas


class CheckpointConfig(Section):
    """Resumable checkpoints."""

    every: int = Field(20, ge=1)
    """Iterations between checkpoints; the last iteration always leaves one."""
    keep_last: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    keep_every: int | None = Field(None, ge=1)
    """Keep the checkpoints of every so many iterations for good, a multiple of `every`; unset: keep none."""

    @model_validator(mode="after")
    def _made_at_all(self) -> "CheckpointConfig":
        if self.keep_every is not None and self.keep_every % self.every != 0:
            raise ValueError(
                f"keep_every={self.keep_every} is not a multiple of every={self.every}: there would be no such "
                "checkpoint to keep"
            )
        return self


class EmaConfig(Section):
    """An exponential moving average (EMA) of the trained weights, beside them."""

    decay: float | None = Field(None, gt=0, lt=1)
    """EMA decay, capped at (1 + i) / (10 + i) after iteration i; unset: no EMA."""
    evaluate: bool = True
    """Validate and evaluate the EMA weights instead of the trained ones."""

    @model_validator(mode="after")
    def _with_an_average(self) -> "EmaConfig":
        if self.decay is None and self.differs_from_default("evaluate"):
            raise ValueError("evaluate: there is no average without a decay; set decay, or leave it out")
        return self


class DistributedConfig(Section):
    """Several processes, started by torchrun, accelerate launch or --num_processes."""

    check_weights_every: int = Field(10, ge=1)
    """Iterations between checks that the weights are equal in all processes; the run stops if they are not."""
    heartbeat_timeout: float = Field(30.0, gt=2)
    """Seconds without a heartbeat after which a process counts as lost, and the others stop."""


class LogConfig(Section):
    """Where measurements and galleries go besides the folder of the run."""

    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers; each needs customized-grpo[NAME]. TensorBoard's events go to the run's folder; Weights & Biases (wandb)
    and trackio find their keys and servers themselves (docs/guide.md)."""
    project: str = Field("customized-grpo", min_length=1)
    """Project at wandb and trackio; the run is called as its folder."""

    @field_validator("report_to")
    @classmethod
    def _once(cls, report_to: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(report_to)) != len(report_to):
            raise ValueError("a tracker is named twice; name it once")
        return report_to

    @model_validator(mode="after")
    def _a_project_of_a_service(self) -> "LogConfig":
        if self.differs_from_default("project") and not {"wandb", "trackio"} & set(self.report_to):
            raise ValueError("project: only for report_to wandb or trackio; leave it out")
        return self
