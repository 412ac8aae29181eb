"""What pictures of a benchmark are measured by.

Shape legend: N pictures drawn of a group, K pictures of their subject.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from customized_grpo.benchmark.config import MetricsConfig
from customized_grpo.config.rewards import LocalConfig, RewardsConfig
from customized_grpo.errors import UserError
from customized_grpo.evaluation import evaluator as evaluation
from customized_grpo.evaluation.copy_paste import layout
from customized_grpo.rewards.reward import Reward
from customized_grpo.runtime.device import resolve_device
from customized_grpo.runtime.libraries import silence_libraries
from customized_grpo.toybox.oracle import Oracle
from customized_grpo.types import PromptBatch

COPY = "copy"


@dataclass(frozen=True)
class Group:
    """Pictures [N, 3, H, W] drawn from the same references. Pictures of the subject are [3, h, w], in [0, 1]."""

    subject: str
    prompts: Sequence[str]
    images: Tensor
    references: Sequence[Tensor]
    """What was drawn from."""
    pictures: Sequence[Tensor]
    """What identity is to."""


Measure = Callable[[Group], Mapping[str, Tensor]]
"""Values [N] by metric; NaN where there is none."""


def load_measures(config: MetricsConfig, layouts: Mapping[str, Tensor], *, hpsv3_as_published: bool) -> list[Measure]:
    """The metrics that `config` names. `layouts`: of all pictures that the benchmark has of a subject, by subject.

    Raises `UserError` where a model cannot be had.
    """
    # transformers takes seconds to import.
    silence_libraries()
    from customized_grpo.factory.rewards import load_hpsv3_reward
    from customized_grpo.rewards.preprocessing import DINO_PUBLISHED
    from customized_grpo.rewards.pretrained import PretrainedEncoder

    device = resolve_device(config.device, "metrics.")

    def checkpoint(field: str, kind: str) -> PretrainedEncoder:
        return PretrainedEncoder(
            f"metrics.{field}", kind, getattr(config, field), None, device, micro_batch=config.micro_batch, bf16=False
        )

    def hpsv3() -> Measure:
        settings = RewardsConfig(prompt="hpsv3", hpsv3=config.hpsv3, local=LocalConfig(micro_batch=config.micro_batch))
        try:
            reward = load_hpsv3_reward(settings, device)
        except UserError as error:
            # Said of the reward's fields, and meant of those that stand for them here.
            raise UserError(str(error).replace("rewards.hpsv3", "metrics.hpsv3")) from error
        return prompt_measure("hpsv3", reward, first_character=hpsv3_as_published)

    loaders: dict[str, Callable[[], Measure]] = {
        "dino": lambda: identity_measure("dino", checkpoint("dino", "dino").encoder(DINO_PUBLISHED)),
        # As DINO's, CLIP's published scores are of pictures that torchvision cropped.
        "clip_i": lambda: identity_measure("clip_i", checkpoint("clip", "clip_i").encoder(half="even")),
        "clip_t": lambda: prompt_measure("clip_t", checkpoint("clip", "clip_t").to_prompt(half="even")),
        "dinov2": lambda: identity_measure("dinov2", checkpoint("dinov2", "dino").encoder()),
        "hpsv3": hpsv3,
        COPY: lambda: copy_measure(layouts),
    }
    return [loaders[name]() for name in config.names]


def identity_measure(name: str, encoder: Callable[[Tensor], Tensor]) -> Measure:
    """The mean cosine to the pictures of the subject, in [-1, 1]."""
    known: dict[tuple[int, ...], tuple[Sequence[Tensor], Tensor]] = {}

    def measure(group: Group) -> Mapping[str, Tensor]:
        # A subject's groups share their pictures; kept beside their features, an address is not used again.
        key = tuple(map(id, group.pictures))
        if key not in known:
            known.clear()
            known[key] = (group.pictures, torch.cat([encoder(picture[None]) for picture in group.pictures]))
        return {name: (encoder(group.images) @ known[key][1].T).mean(1).cpu()}

    return measure


def prompt_measure(name: str, reward: Reward, *, first_character: bool = False) -> Measure:
    """A prompt reward; of each prompt's first character alone where the published figures are to be had."""

    def measure(group: Group) -> Mapping[str, Tensor]:
        asked = [prompt[:1] for prompt in group.prompts] if first_character else group.prompts
        return {name: evaluation.scores(group.images, PromptBatch(asked, [[] for _ in asked], None), reward)}

    return measure


def copy_measure(layouts: Mapping[str, Tensor]) -> Measure:
    """The copy-paste meter: how far a picture is from other subjects' pictures (0) towards being its reference (1).

    Closeness is the correlation of two pictures' 8 x 8 layouts. What is to be expected of a picture that is no copy is
    how close the reference is to the pictures of all other subjects; where there are none, 0.
    """

    def measure(group: Group) -> Mapping[str, Tensor]:
        targets = torch.cat([layout(reference[None]) for reference in group.references])
        others = [each for subject, each in layouts.items() if subject != group.subject]
        expected = (targets @ torch.cat(others).T).mean(1) if others else torch.zeros(len(targets))
        towards = (layout(group.images) @ targets.T - expected) / (1 - expected).clamp(min=1e-3)
        return {COPY: towards.amax(1)}

    return measure


def toybox_measure(rewards: Sequence[Reward], judge: Oracle) -> Measure:
    """ToyBox's own: the rewards (prompt, identity), what the judge says, and its copy-paste meter."""

    def measure(group: Group) -> Mapping[str, Tensor]:
        batch = PromptBatch(group.prompts, [group.references] * len(group.prompts), None)
        return evaluation.measure(group.images, batch, rewards, judge)

    return measure
