"""The rewards by the names that configurations have for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from customized_grpo.config.rewards import RewardsConfig
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.factory.policy import policy_device
from customized_grpo.rewards.custom import PREFIX, CustomReward
from customized_grpo.rewards.http import Transport, read_token
from customized_grpo.rewards.remote import TOKEN, RemoteReward
from customized_grpo.rewards.reward import Reward
from customized_grpo.rewards.vlm_judge import KEY, JudgeReward, VlmJudge
from customized_grpo.runtime.device import check_precision, resolve_device
from customized_grpo.runtime.libraries import silence_libraries

TOYBOX = "toybox"
PICKSCORES_BACKBONE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Whose tokenizer and image processor PickScore takes, which is published without any."""


def load_rewards(config: RewardsConfig, device: torch.device, toybox_weights: Path | None = None) -> dict[str, Reward]:
    """Return the rewards by name: prompt, identity. Raises `UserError` where a model or a server cannot be had."""
    judge = _judge(config) if "vlm_judge" in (config.prompt, config.identity) else None
    prompt = _load(config, "prompt", config.prompt, device, toybox_weights, judge)
    identity = _load(config, "identity", config.identity, device, toybox_weights, judge)
    return {"prompt": prompt, "identity": identity}


def load_pretrained(name: str, field: str, config: RewardsConfig, device: torch.device) -> Reward:
    """Load a pretrained reward by its name, one of ENCODERS; `field` names its model."""
    silence_libraries()
    from customized_grpo.rewards.pretrained import PretrainedEncoder

    backbone = {"hpsv2": config.hpsv2.backbone, "pickscore": PICKSCORES_BACKBONE}.get(name)
    bf16, micro_batch = config.local.precision == "bf16", config.local.micro_batch
    encoder = PretrainedEncoder(
        field, name, config.model_of(name), backbone, device, micro_batch=micro_batch, bf16=bf16
    )
    settings = config.clip_i if name == "clip_i" else config.dino
    return encoder.reward(
        segmented=config.identity_reference == "segmented",
        background=settings.background,
        several=settings.several_references,
    )


def _load(
    config: RewardsConfig,
    side: str,
    kind: str,
    device: torch.device,
    toybox_weights: Path | None,
    judge: VlmJudge | None,
) -> Reward:
    if kind == TOYBOX:
        from customized_grpo.toybox.rewards import IdentityReward, PromptReward

        if side == "prompt":
            return PromptReward(toybox_weights)
        return IdentityReward(config.identity_reference, toybox_weights, config.toybox.identity_leak)
    if kind.startswith(PREFIX):
        return CustomReward.load(f"rewards.{side}", kind)
    if kind == "remote":
        url = config.remote.prompt_url if side == "prompt" else config.remote.identity_url
        return RemoteReward(
            Transport(f"rewards.remote.{side}_url", url or "", config.remote.timeout, token=read_token(TOKEN))
        )
    if kind == "vlm_judge":
        assert judge is not None
        return JudgeReward(judge, "prompt" if side == "prompt" else "subject")
    if kind == "hpsv3":
        return load_hpsv3_reward(config, device)
    return load_pretrained(kind, f"rewards.{kind}.model", config, device)


def reward_weights(kind: str, model: str | None) -> str | None:
    """Return the name of the weights of a reward of this kind; None if it has none of its own on this machine."""
    if kind in (TOYBOX, "vlm_judge", "remote") or kind.startswith(PREFIX):
        return None
    if kind == "hpsv3":
        from customized_grpo.rewards.hpsv3 import WEIGHTS

        return model or WEIGHTS
    from customized_grpo.rewards.pretrained import MODELS

    return model or MODELS[kind]


def load_hpsv3_reward(config: RewardsConfig, device: torch.device) -> Reward:
    """Load HPSv3 as `config.hpsv3` says."""
    silence_libraries()
    from customized_grpo.rewards.hpsv3 import load_hpsv3

    settings = config.hpsv3
    bf16 = device.type == "cuda" if config.local.precision == "auto" else config.local.precision == "bf16"
    return load_hpsv3(
        settings.model, settings.backbone, settings.instruction, sequential=settings.positions == "sequential",
        micro_batch=config.local.micro_batch, device=device, bf16=bf16,
    )  # fmt: skip


def _judge(config: RewardsConfig) -> VlmJudge:
    settings = config.vlm_judge
    transport = Transport("rewards.vlm_judge.url", settings.url or "", settings.timeout, token=read_token(KEY))
    known = _models(transport.get("/models", optional=True))
    if known and settings.model not in known:
        listed = transport.redact(", ".join(sorted(known)[:8]))
        raise UserError(f"rewards.vlm_judge.model: {settings.url} has no '{settings.model}'; it has {listed}")
    judge = VlmJudge(transport, settings)
    judge.check()
    return judge


def _models(answer: Any) -> Sequence[str]:
    """Return the names of models in a server's answer to /models; none if it lists none."""
    listed = answer.get("data") if isinstance(answer, dict) else None
    return [entry["id"] for entry in listed or () if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def build_rewards(config: Config) -> dict[str, Reward]:
    """Return the rewards of a run by name: prompt, identity."""
    device = reward_device(config)
    check_precision(config.rewards.local.precision, device, "rewards.local.")
    return load_rewards(config.rewards, device, config.policy.toybox.weights)


def reward_device(config: Config) -> torch.device:
    name = config.rewards.local.device
    return policy_device(config.policy) if name == "auto" else resolve_device(name, "rewards.local.")
