"""Every setting of a run. Fields hold units and ranges; those of the paper (arXiv 2510.18263) cite it.

Nothing here loads torch: the command line builds its help from these models.
"""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from customized_grpo.config.advantages import AdvantagesConfig
from customized_grpo.config.data import DataConfig
from customized_grpo.config.evaluation import EvaluationConfig
from customized_grpo.config.objective import ObjectiveConfig
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.rewards import RewardsConfig as RewardsConfig
from customized_grpo.config.rollout import RolloutConfig
from customized_grpo.config.section import Section
from customized_grpo.config.training import CheckpointConfig, DistributedConfig, EmaConfig, LogConfig, OptimizerConfig


class Config(Section):
    """A training run."""

    output: Path = Path("runs/toybox")
    """Folder of results; must be empty or absent, unless --resume or --overwrite."""
    iterations: int = Field(50, ge=1)
    """Training iterations."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of everything random."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; unset: as many as there are cores."""
    policy: PolicyConfig = PolicyConfig()
    """The generator to tune."""
    data: DataConfig = DataConfig()
    """Training, validation and test folders."""
    rewards: RewardsConfig = RewardsConfig()
    """The two rewards."""
    rollout: RolloutConfig = RolloutConfig()
    """How groups are sampled."""
    advantages: AdvantagesConfig = AdvantagesConfig()
    """From rewards to advantages."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is minimised."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How it is minimised."""
    ema: EmaConfig = EmaConfig()
    """Average of the trained weights."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Resumable checkpoints."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation and test."""
    distributed: DistributedConfig = DistributedConfig()
    """Several processes."""
    log: LogConfig = LogConfig()
    """Loggers."""

    @model_validator(mode="after")
    def _one_world(self) -> "Config":
        """Check that ToyBox's rewards and oracle judge ToyBox images only."""
        read_by = {
            "rewards.prompt": self.rewards.prompt,
            "rewards.identity": self.rewards.identity,
            "evaluation.judge": self.evaluation.judge,
        }
        strangers = [name for name, value in read_by.items() if value == "toybox"]
        if strangers and self.policy.kind != "toybox":
            raise ValueError(
                f"{', '.join(strangers)}: toybox does not read the pictures of policy.kind={self.policy.kind}; choose "
                "other rewards (docs/rewards.md), and none for the judge"
            )
        return self

    @model_validator(mode="after")
    def _each_update_has_images(self) -> "Config":
        images = self.rollout.prompts_per_iteration * self.rollout.group_size
        if self.optimizer.num_minibatches > images:
            raise ValueError(
                f"optimizer.num_minibatches={self.optimizer.num_minibatches} is more than an iteration's "
                f"{images} images (rollout.prompts_per_iteration x group_size), on which updates are shared out"
            )
        return self

    @model_validator(mode="after")
    def _table_fits(self) -> "Config":
        advantages, steps = self.advantages, self.rollout.num_steps
        rows = len(advantages.table or ())
        if advantages.weights == "table" and rows != steps:
            raise ValueError(
                f"advantages.table has {rows} rows, but rollout.num_steps is {steps}; "
                "give one (prompt, identity) row per denoising step"
            )
        return self


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
