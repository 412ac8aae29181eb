"""From a configuration to the parts of a run."""

from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.factory.policy import check_shard, resolve_policy_config
from customized_grpo.factory.rewards import reward_device


def resolve_config(config: Config) -> Config:
    """Return `config` with the precisions that this machine uses: they decide the result.

    The rewards' precision stays "auto" if it means two: HPSv3 in bf16, on CUDA, beside an encoder in fp32.
    """
    rewards = config.rewards
    if rewards.is_read("local") and rewards.local.precision == "auto":
        two = rewards.prompt == "hpsv3" and reward_device(config).type == "cuda"
        local = rewards.local.model_copy(update={"precision": "auto" if two else "fp32"})
        rewards = rewards.model_copy(update={"local": local})
    return config.model_copy(update={"policy": resolve_policy_config(config.policy), "rewards": rewards})


def check_shares(config: Config, world: int) -> None:
    """Raise `UserError` where `world` processes cannot share an iteration of `config`, or the generator's weights."""
    prompts = config.rollout.prompts_per_iteration
    if prompts < world:
        raise UserError(
            f"rollout.prompts_per_iteration: {prompts} groups cannot be shared among {world} processes: each process "
            "takes whole groups; ask for more, or start fewer processes"
        )
    check_shard(config.policy, world)
