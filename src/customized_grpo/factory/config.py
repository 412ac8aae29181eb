"""From a configuration to the parts of a run."""

from typing import TypeVar

from customized_grpo.config.rewards import ScoreConfig
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.factory.policy import check_shard, resolve_policy_config
from customized_grpo.factory.rewards import RewardLoader, reward_loader

ScoreT = TypeVar("ScoreT", bound=ScoreConfig)


def resolve_config(config: Config) -> Config:
    """Return `config` with the precisions that this machine uses: they decide the result."""
    loader = reward_loader(config)
    rewards = {name: _with_precision(f"rewards.{name}", reward, loader) for name, reward in config.rewards.items()}
    metrics = {
        name: _with_precision(f"evaluation.metrics.{name}", metric, loader)
        for name, metric in config.evaluation.metrics.items()
    }
    evaluation = config.evaluation.model_copy(update={"metrics": metrics})
    policy = resolve_policy_config(config.policy)
    return config.model_copy(update={"policy": policy, "rewards": rewards, "evaluation": evaluation})


def _with_precision(field: str, score: ScoreT, loader: RewardLoader) -> ScoreT:
    if not score.is_read("local") or score.local.precision != "auto":
        return score
    local = score.local.model_copy(update={"precision": "bf16" if loader.bf16(field, score) else "fp32"})
    return score.model_copy(update={"local": local})


def check_shares(config: Config, world: int) -> None:
    """Raise `UserError` where `world` processes cannot share an iteration of `config`, or the generator's weights."""
    prompts = config.rollout.prompts_per_iteration
    if prompts < world:
        raise UserError(
            f"rollout.prompts_per_iteration: {prompts} groups cannot be shared among {world} processes: each process "
            "takes whole groups; ask for more, or start fewer processes"
        )
    check_shard(config.policy, world)
