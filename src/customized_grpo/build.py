"""From a configuration to the parts of a run."""

from collections.abc import Iterable
from pathlib import Path

from customized_grpo.config import Config, PolicyConfig
from customized_grpo.data import Sample, SubjectDataset
from customized_grpo.errors import UserError
from customized_grpo.policies import Policy
from customized_grpo.rewards import Reward
from customized_grpo.toybox.judge import Judge
from customized_grpo.toybox.network import Context
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.toybox.rewards import IdentityReward, PromptReward

POLICIES = {"toybox": ToyBoxPolicy.load}
PROMPT_REWARDS = {"toybox": PromptReward}
IDENTITY_REWARDS = {"toybox": IdentityReward}


def build_policy(config: PolicyConfig, seed: int) -> ToyBoxPolicy:
    """The generator, ready to be tuned; `seed` draws the LoRA factors."""
    return POLICIES[config.kind](
        config.weights,
        adapter=config.adapter,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        precision=config.precision,
        seed=seed,
    )


def build_rewards(config: Config) -> tuple[Reward, Reward]:
    """The (prompt, identity) rewards."""
    weights = config.policy.weights
    prompt, identity = PROMPT_REWARDS[config.rewards.prompt], IDENTITY_REWARDS[config.rewards.identity]
    return prompt(weights), identity(config.rewards.identity_reference, weights, config.rewards.identity_leak)


def build_judge(config: Config) -> Judge | None:
    """The judge, None where the configuration wants none."""
    if config.evaluation.judge == "none":
        return None
    judge = Judge(config.policy.weights)
    _ = judge.ceiling  # shown when training ends: better missed now
    return judge


def check_samples(samples: Iterable[Sample], policy: Policy[Context], source: Path, *, masks: bool) -> None:
    """Refuse, before any work, data that the policy or the rewards cannot take. Raises `UserError` listing the
    samples."""
    problems = []
    for sample in samples:
        try:
            policy.check(sample.prompt, len(sample.references))
        except UserError as error:
            problems.append(f"sample '{sample.id}': {error}")
        if masks and not sample.masks:
            problems.append(
                f"sample '{sample.id}': has no mask, but rewards.identity_reference is 'segmented'; "
                "add masks or set it to 'whole'"
            )
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{source}: {len(problems)} unusable samples:\n  " + "\n  ".join(problems[:10]) + more)


def open_dataset(path: Path, config: Config, policy: Policy[Context]) -> SubjectDataset:
    """The dataset in the folder `path`, wholly checked."""
    dataset = SubjectDataset.open(path, max_pixels=config.data.max_pixels)
    check_samples(dataset, policy, path, masks=config.rewards.identity_reference == "segmented")
    return dataset
