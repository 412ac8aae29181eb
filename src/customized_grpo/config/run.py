"""Every setting of a run. Fields hold units and ranges; those of the paper (arXiv 2510.18263) cite it.

Nothing here loads torch: the command line builds its help from these models.
"""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from customized_grpo.config.advantages import AdvantagesConfig
from customized_grpo.config.data import DataConfig
from customized_grpo.config.evaluation import HELD_OUT_GAIN, ORACLE, EvaluationConfig
from customized_grpo.config.objective import ObjectiveConfig
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.rewards import (
    TOYBOX_KINDS,
    RewardConfig,
    ScoreConfig,
    check_rewards,
    check_schedules,
    constraints,
    objectives,
)
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
    rewards: dict[str, RewardConfig] = Field(
        {
            "prompt": RewardConfig(kind="toybox_prompt", schedule="early"),
            "identity": RewardConfig(kind="toybox_identity", schedule="late"),
        }
    )
    """The rewards by name, as many as you like; --rewards.help lists their fields. A file with this section names
    all of them."""
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

    @property
    def scores(self) -> dict[str, ScoreConfig]:
        """The rewards and the metrics by the field at which they stand."""
        return {f"rewards.{name}": reward for name, reward in self.rewards.items()} | {
            f"evaluation.metrics.{name}": metric for name, metric in self.evaluation.metrics.items()
        }

    @model_validator(mode="after")
    def _check_rewards(self) -> "Config":
        check_rewards(self.rewards)
        if self.advantages.weights == "schedules":
            check_schedules(self.rewards)
        return self

    @model_validator(mode="after")
    def _one_world(self) -> "Config":
        """Check that ToyBox's rewards and oracle judge ToyBox images only."""
        strangers = [f"{field}.kind={each.kind}" for field, each in self.scores.items() if each.kind in TOYBOX_KINDS]
        if strangers and self.policy.kind != "toybox":
            raise ValueError(
                f"{', '.join(strangers)}: toybox does not read the pictures of policy.kind={self.policy.kind}; choose "
                "others (docs/rewards.md)"
            )
        return self

    @property
    def held_out(self) -> tuple[str, ...]:
        """The figures whose mean gain over the base is the held-out gain: none of them is trained on."""
        if self.evaluation.held_out is not None:
            return self.evaluation.held_out
        own = [name for name in self.evaluation.metrics if name not in trained_metrics(self)]
        return (*(ORACLE if self.policy.kind == "toybox" else ()), *own)

    @property
    def select(self) -> str | None:
        """The figure whose best validation is kept; None where nothing held out is measured."""
        return None if self.evaluation.select == HELD_OUT_GAIN and not self.held_out else self.evaluation.select

    @model_validator(mode="after")
    def _some_constraint(self) -> "Config":
        """Check that what is set for constraints has some to hold."""
        if self.advantages.differs_from_default("constraints") and not constraints(self.rewards):
            raise ValueError(
                f"advantages.constraints={self.advantages.constraints}: no reward has role=constraint; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _known_figures(self) -> "Config":
        """Check the names of figures, and that none of those held out is trained on."""
        own = ((*ORACLE, "copied") if self.policy.kind == "toybox" else ("copy",)) + tuple(self.evaluation.metrics)
        twins = trained_metrics(self)
        for name in self.evaluation.held_out or ():
            if name not in own:
                raise ValueError(f"evaluation.held_out: no metric '{name}'; choose among {', '.join(own)}")
            if name in twins:
                raise ValueError(
                    f"evaluation.held_out: '{name}' measures what the reward {twins[name]} is; what is trained on is "
                    "not held out: leave it out"
                )
        known = [HELD_OUT_GAIN, *own, *(f"reward/{name}" for name in self.rewards)]
        known += ["diversity"] if self.evaluation.diversity_prompts else []
        if self.evaluation.select not in known:
            raise ValueError(
                f"evaluation.select: no metric '{self.evaluation.select}'; choose among {', '.join(known)}, or add it "
                "to evaluation.metrics"
            )
        if self.evaluation.patience is not None and self.select is None:
            raise ValueError(
                "evaluation.patience: nothing held out is measured, so no validation is better than another; add "
                "metrics that are no rewards to evaluation.metrics, or name one in evaluation.select"
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
    def _weights_change(self) -> "Config":
        """Check that settings of weights over time are read: weights of rewards with constant schedules are not."""
        schedules = {reward.schedule for reward in objectives(self.rewards).values()}
        if self.advantages.weights == "table" or schedules != {"constant"}:
            return self
        for name in ("tdw", "lookup"):
            if self.advantages.differs_from_default(name):
                raise ValueError(
                    f"advantages.{name}: only for weights that change over the steps, and all rewards have "
                    "schedule=constant; leave it out, or set rewards.NAME.schedule to early and late"
                )
        return self

    @model_validator(mode="after")
    def _table_fits(self) -> "Config":
        table = self.advantages.table
        if self.advantages.weights != "table" or table is None:
            return self
        names, steps = list(objectives(self.rewards)), self.rollout.num_steps
        if sorted(table) != sorted(names):
            raise ValueError(
                f"advantages.table has weights of {', '.join(table)}, expected of {', '.join(names)}: the rewards "
                "that are objectives"
            )
        for name, column in table.items():
            if len(column) != steps:
                raise ValueError(
                    f"advantages.table.{name} has {len(column)} weights, but rollout.num_steps is {steps}; give one "
                    "per denoising step"
                )
        return self


def trained_metrics(config: Config) -> dict[str, str]:
    """Return the metrics that some reward is too, which are not held out: the reward's name by the metric's."""
    trained = objectives(config.rewards) | constraints(config.rewards)
    return {
        name: reward
        for name, metric in config.evaluation.metrics.items()
        for reward, settings in trained.items()
        if metric.same_score(settings)
    }


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def set_dotted(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set the field of a nested mapping that a dotted `name` stands for; sections that are missing are made."""
    *sections, field = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[field] = value
