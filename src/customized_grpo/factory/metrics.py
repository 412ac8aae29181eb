"""The metrics and evaluators by the names that configurations have for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from customized_grpo.config.evaluation import MetricConfig
from customized_grpo.config.metrics import MetricsConfig
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.rewards import TOYBOX_KINDS, LocalConfig, Rewards, wants_masks
from customized_grpo.config.run import Config, trained_metrics
from customized_grpo.data import SubjectDataset
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.evaluation.copy_paste import layout, reference_layouts
from customized_grpo.evaluation.evaluator import Evaluator, Repeats, Sampling
from customized_grpo.evaluation.metrics import (
    COPY,
    CopyMetric,
    IdentityMetric,
    Metric,
    PromptMetric,
    ScoreMetric,
)
from customized_grpo.factory.policy import policy_device
from customized_grpo.factory.rewards import RewardLoader
from customized_grpo.policies.policy import Policy
from customized_grpo.rewards.reward import Reward
from customized_grpo.rewards.similarity import IdentitySimilarity
from customized_grpo.runtime.device import resolve_device
from customized_grpo.runtime.libraries import silence_libraries
from customized_grpo.toybox.oracle_metric import OracleMetric
from customized_grpo.toybox.rewards import IdentityReward
from customized_grpo.tracking.metric_info import REWARD_PREFIX

IDENTITY = (IdentitySimilarity, IdentityReward)
"""Scorers with a space in which they compare subjects."""


@dataclass(frozen=True)
class Scorers:
    """What scores images of a run: its rewards and metrics by figure, and what it compares subjects by."""

    by_figure: Mapping[str, Reward]
    features: Callable[[Tensor], Tensor]
    """Of images [N, 3, H, W], in the space of an identity metric or reward, or their layouts: [N, E]."""


def build_scorers(config: Config, rewards: Mapping[str, Reward], loader: RewardLoader) -> Scorers:
    """Build what scores images of a run: its `rewards`, and the metrics that `evaluation.metrics` names.

    A metric that measures what a reward is, is this reward. Raises `UserError` where a model or a server cannot be had.
    """
    twins = trained_metrics(config)
    metrics = {
        name: rewards[twins[name]] if name in twins else loader.load(f"evaluation.metrics.{name}", metric)
        for name, metric in config.evaluation.metrics.items()
    }
    identity = [each for each in (*metrics.values(), *rewards.values()) if isinstance(each, IDENTITY)]
    by_figure = {f"{REWARD_PREFIX}{name}": reward for name, reward in rewards.items()} | metrics
    return Scorers(by_figure, identity[0].features if identity else layout)


def build_evaluator(
    config: Config, policy: Policy[Any], dataset: SubjectDataset, scorers: Scorers, ranks: DistributedGroup
) -> Evaluator:
    """Build the evaluator of a run on `dataset`: images are drawn as training draws them, without noise on the way.

    They are measured by ToyBox's oracle or the copy-paste meter, and by the `scorers`.
    """
    rollout, evaluation = config.rollout, config.evaluation
    if has_own_metrics(config.policy):
        own: Metric = OracleMetric.load(config.policy.toybox.weights)
    else:
        own = CopyMetric(reference_layouts(dataset, dataset.samples))
    repeats = Repeats(evaluation.diversity_prompts, evaluation.diversity_images, scorers.features)
    return Evaluator(
        policy, dataset, [own, ScoreMetric(scorers.by_figure)],
        Sampling(rollout.num_steps, rollout.shift, config.seed, rollout.micro_batch),
        masks=wants_masks(config.scores) is not None, repeats=repeats if evaluation.diversity_prompts else None,
        ranks=ranks,
    )  # fmt: skip


def has_own_metrics(policy: PolicyConfig) -> bool:
    """Return whether images of the generator are of a world that its own rewards and oracle measure."""
    return policy.kind == "toybox"


def build_own_metrics(policy: PolicyConfig, rewards: Rewards) -> list[Metric]:
    """Build the metrics of a world of its own: its oracle, and those of the `rewards` that are of it."""
    loader = RewardLoader(policy_device(policy), policy.toybox.weights)
    scorers = {
        name: loader.load(f"rewards.{name}", reward) for name, reward in rewards.items() if reward.kind in TOYBOX_KINDS
    }
    return [OracleMetric.load(policy.toybox.weights), ScoreMetric.of_rewards(scorers)]


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
        local = LocalConfig(micro_batch=config.micro_batch)
        settings = MetricConfig(kind="hpsv3", hpsv3=config.hpsv3, local=local)
        reward = RewardLoader(device).load("metrics", settings)
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
