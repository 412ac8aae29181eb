"""The metrics and evaluators by the names that configurations have for them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from customized_grpo.config.metrics import MetricsConfig
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.rewards import LocalConfig, RewardsConfig
from customized_grpo.config.run import Config
from customized_grpo.data import SubjectDataset
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import UserError
from customized_grpo.evaluation.evaluator import Evaluator, Sampling
from customized_grpo.evaluation.metrics import (
    COPY,
    CopyMetric,
    IdentityMetric,
    Metric,
    PromptMetric,
    RewardMetric,
)
from customized_grpo.factory.rewards import load_hpsv3_reward
from customized_grpo.policies.policy import Policy
from customized_grpo.rewards.reward import Reward
from customized_grpo.runtime.device import resolve_device
from customized_grpo.runtime.libraries import silence_libraries
from customized_grpo.toybox.oracle_metric import OracleMetric


def build_metrics(config: Config, rewards: Mapping[str, Reward]) -> list[Metric]:
    """Build the metrics of a run: the oracle if `evaluation.judge` names it, and the rewards by name."""
    oracle: list[Metric] = []
    if config.evaluation.judge == "toybox":
        oracle.append(OracleMetric.load(config.policy.toybox.weights))
    return [*oracle, RewardMetric(rewards)]


def build_evaluator(
    config: Config,
    policy: Policy[Any],
    dataset: SubjectDataset,
    metrics: Sequence[Metric],
    ranks: DistributedGroup,
) -> Evaluator:
    """Build the evaluator of a run on `dataset`: images are drawn as training draws them, without noise on the way."""
    rollout = config.rollout
    return Evaluator(
        policy, dataset, metrics, Sampling(rollout.num_steps, rollout.shift, config.seed, rollout.micro_batch),
        masks=config.rewards.identity_reference == "segmented", ranks=ranks,
    )  # fmt: skip


def has_own_metrics(policy: PolicyConfig) -> bool:
    """Return whether images of the generator are of a world that its own rewards and oracle measure."""
    return policy.kind == "toybox"


def load_metrics(config: MetricsConfig, layouts: Mapping[str, Tensor], *, hpsv3_as_published: bool) -> list[Metric]:
    """Load the metrics that `config` names.

    `layouts`: of all pictures that a benchmark has of each subject, by subject. Raises `UserError` where a model cannot
    be had.
    """
    # transformers takes seconds to import.
    silence_libraries()
    from customized_grpo.rewards.preprocessing import DINO_PUBLISHED
    from customized_grpo.rewards.pretrained import PretrainedEncoder

    device = resolve_device(config.device, "metrics.")

    def checkpoint(field: str, kind: str) -> PretrainedEncoder:
        return PretrainedEncoder(
            f"metrics.{field}", kind, getattr(config, field), None, device, micro_batch=config.micro_batch, bf16=False
        )

    def hpsv3() -> Metric:
        settings = RewardsConfig(prompt="hpsv3", hpsv3=config.hpsv3, local=LocalConfig(micro_batch=config.micro_batch))
        try:
            reward = load_hpsv3_reward(settings, device)
        except UserError as error:
            # Said of the reward's fields, and meant of those that stand for them here.
            raise UserError(str(error).replace("rewards.hpsv3", "metrics.hpsv3")) from error
        return PromptMetric("hpsv3", reward, first_character=hpsv3_as_published)

    loaders: dict[str, Callable[[], Metric]] = {
        "dino": lambda: IdentityMetric("dino", checkpoint("dino", "dino").encoder(DINO_PUBLISHED)),
        # As DINO's, CLIP's published scores are of pictures that torchvision cropped.
        "clip_i": lambda: IdentityMetric("clip_i", checkpoint("clip", "clip_i").encoder(half="even")),
        "clip_t": lambda: PromptMetric("clip_t", checkpoint("clip", "clip_t").to_prompt(half="even")),
        "dinov2": lambda: IdentityMetric("dinov2", checkpoint("dinov2", "dino").encoder()),
        "hpsv3": hpsv3,
        COPY: lambda: CopyMetric(layouts),
    }
    return [loaders[name]() for name in config.names]
