"""A prompt and an identity reward by their kinds, as most tests of rewards want them."""

from collections.abc import Mapping
from typing import Any

import torch

from customized_grpo.config.evaluation import MetricConfig
from customized_grpo.config.rewards import PRETRAINED, VLM_KINDS, RewardConfig, ScoreConfig
from customized_grpo.factory.rewards import RewardLoader
from customized_grpo.rewards.reward import Reward


class _Here(RewardLoader):
    """Loads in bf16 on a CPU too, where it is slow."""

    def device(self, field: str, config: ScoreConfig) -> torch.device:
        return self._device


def named(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of two rewards.

    `settings`: `prompt` and `identity` are kinds, or python:module.function, ToyBox's by default; sections go to the
    reward that reads them.
    """
    rewards: dict[str, dict[str, Any]] = {}
    for name, schedule in (("prompt", "early"), ("identity", "late")):
        kind = settings.get(name, f"toybox_{name}")
        kind, _, function = kind.partition(":")
        reward: dict[str, Any] = {"kind": kind, "schedule": schedule}
        sections = {kind, *(["local"] if kind in PRETRAINED else []), *(["vlm_judge"] if kind in VLM_KINDS else [])}
        reward |= {section: settings[section] for section in sections if section in settings}
        if function:
            reward["python"] = {"function": function}
        rewards[name] = reward
    return rewards


def load_named(settings: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Reward]:
    """Load the rewards that `named` returns."""
    loader = _Here(device or torch.device("cpu"))
    return {
        name: loader.load(f"rewards.{name}", RewardConfig.model_validate(reward))
        for name, reward in named(settings).items()
    }


def load_one(name: str, **settings: Any) -> Reward:
    """Load one reward of the name `name`; `settings` are its fields, with its kind."""
    return _Here(torch.device("cpu")).load(f"rewards.{name}", MetricConfig.model_validate(settings))
