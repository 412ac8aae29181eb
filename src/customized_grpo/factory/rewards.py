"""The rewards by the names that configurations have for them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from customized_grpo.config.rewards import ENCODERS, IDENTITY_ENCODERS, PRETRAINED, VLM_KINDS, ScoreConfig
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.factory.policy import policy_device
from customized_grpo.rewards.custom import CustomReward
from customized_grpo.rewards.http import Transport, read_token
from customized_grpo.rewards.remote import TOKEN, RemoteReward
from customized_grpo.rewards.reward import Reward
from customized_grpo.rewards.texture import TextureReward
from customized_grpo.rewards.vlm_judge import KEY, JudgeReward, VlmJudge
from customized_grpo.runtime.device import check_precision, resolve_device
from customized_grpo.runtime.libraries import silence_libraries

PICKSCORES_BACKBONE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Whose tokenizer and image processor PickScore takes, which is published without any."""
PartT = TypeVar("PartT")


class RewardLoader:
    """Loads rewards, and what several of them share once: a model, an encoder with its references, a judge."""

    def __init__(self, device: torch.device, toybox_weights: Path | None = None) -> None:
        """Load onto `device` what names no other; `toybox_weights`: the folder of ToyBox's, None for those shipped."""
        self._device, self._toybox_weights = device, toybox_weights
        self._parts: dict[tuple[Any, ...], Any] = {}

    def load(self, field: str, config: ScoreConfig) -> Reward:
        """Load the reward that `config` describes, at the configuration's `field` (rewards.identity).

        Raises `UserError` where a model or a server cannot be had.
        """
        loaders: dict[str, Callable[[str, ScoreConfig], Reward]] = {
            "toybox_prompt": self._toybox_prompt,
            "toybox_identity": self._toybox_identity,
            "python": _custom,
            "remote": _remote,
            "texture": lambda field, config: TextureReward(),
            "hpsv3": self._hpsv3,
            **dict.fromkeys(VLM_KINDS, self._judge),
            **dict.fromkeys(ENCODERS, self._encoder),
        }
        return loaders[config.kind](field, config)

    def device(self, field: str, config: ScoreConfig) -> torch.device:
        """Return the device of a pretrained model. Raises `UserError` if it is missing, or lacks the precision."""
        name = config.local.device
        device = self._device if name == "auto" else resolve_device(name, f"{field}.local.")
        check_precision(config.local.precision, device, f"{field}.local.")
        return device

    def bf16(self, field: str, config: ScoreConfig) -> bool:
        """Return whether a pretrained model runs in bf16; with precision "auto", HPSv3 on CUDA does and no other."""
        if config.local.precision == "auto":
            return config.kind == "hpsv3" and self.device(field, config).type == "cuda"
        return config.local.precision == "bf16"

    def _toybox_prompt(self, field: str, config: ScoreConfig) -> Reward:
        from customized_grpo.toybox.rewards import PromptReward

        return self._once(("toybox_prompt",), lambda: PromptReward(self._toybox_weights))

    def _toybox_identity(self, field: str, config: ScoreConfig) -> Reward:
        from customized_grpo.toybox.rewards import IdentityReward

        settings = config.toybox_identity
        return self._once(
            ("toybox_identity", settings),
            lambda: IdentityReward(settings.reference, self._toybox_weights, settings.leak),
        )

    def _encoder(self, field: str, config: ScoreConfig) -> Reward:
        silence_libraries()
        from customized_grpo.rewards.pretrained import MODELS, PretrainedEncoder

        kind, device = config.kind, self.device(field, config)
        backbone = {"hpsv2": config.hpsv2.backbone, "pickscore": PICKSCORES_BACKBONE}.get(kind)
        bf16, micro_batch = self.bf16(field, config), config.local.micro_batch
        name = config.model or MODELS[kind]
        encoder = self._once(
            (_FAMILIES.get(kind, kind), name, backbone, device, bf16, micro_batch),
            lambda: PretrainedEncoder(
                f"{field}.{kind}.model", kind, config.model, backbone, device, micro_batch=micro_batch, bf16=bf16
            ),
        )
        if kind not in IDENTITY_ENCODERS:
            return encoder.to_prompt()
        settings = getattr(config, kind)
        return encoder.to_identity(
            segmented=config.segmented, background=settings.background, several=settings.several_references
        )

    def _hpsv3(self, field: str, config: ScoreConfig) -> Reward:
        silence_libraries()
        from customized_grpo.rewards.hpsv3 import load_hpsv3

        settings, device = config.hpsv3, self.device(field, config)
        bf16 = self.bf16(field, config)
        return self._once(
            ("hpsv3", settings, device, bf16, config.local.micro_batch),
            lambda: load_hpsv3(
                settings.model, settings.backbone, settings.instruction, field=f"{field}.hpsv3",
                sequential=settings.positions == "sequential", micro_batch=config.local.micro_batch, device=device,
                bf16=bf16,
            ),
        )  # fmt: skip

    def _judge(self, field: str, config: ScoreConfig) -> Reward:
        settings = config.vlm_judge
        key = ("vlm_judge", settings.model_dump_json())
        judge = self._once(key, lambda: _connect_judge(f"{field}.vlm_judge", config))
        return JudgeReward(judge, "prompt" if config.kind == "vlm_prompt" else "subject")

    def _once(self, key: tuple[Any, ...], load: Callable[[], PartT]) -> PartT:
        if key not in self._parts:
            self._parts[key] = load()
        part: PartT = self._parts[key]
        return part


_FAMILIES = {"clip_i": "clip", "clip_t": "clip"}
"""Kinds that read one and the same model."""


def _custom(field: str, config: ScoreConfig) -> Reward:
    return CustomReward.load(f"{field}.python.function", config.python.function or "", masks=config.segmented)


def _remote(field: str, config: ScoreConfig) -> Reward:
    settings = config.remote
    transport = Transport(f"{field}.remote.url", settings.url or "", settings.timeout, token=read_token(TOKEN))
    return RemoteReward(transport, masks=config.segmented)


def _connect_judge(field: str, config: ScoreConfig) -> VlmJudge:
    settings = config.vlm_judge
    transport = Transport(f"{field}.url", settings.url or "", settings.timeout, token=read_token(KEY))
    known = _models(transport.get("/models", optional=True))
    if known and settings.model not in known:
        listed = transport.redact(", ".join(sorted(known)[:8]))
        raise UserError(f"{field}.model: {settings.url} has no '{settings.model}'; it has {listed}")
    judge = VlmJudge(transport, settings, field)
    judge.check()
    return judge


def _models(answer: Any) -> Sequence[str]:
    """Return the names of models in a server's answer to /models; none if it lists none."""
    listed = answer.get("data") if isinstance(answer, dict) else None
    return [entry["id"] for entry in listed or () if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def model_name(config: ScoreConfig) -> str | None:
    """Return the folder, file or hub id of a pretrained model; None of other kinds."""
    if config.kind not in PRETRAINED:
        return None
    if config.kind == "hpsv3":
        from customized_grpo.rewards.hpsv3 import WEIGHTS

        return config.model or WEIGHTS
    from customized_grpo.rewards.pretrained import MODELS

    return config.model or MODELS[config.kind]


def reward_loader(config: Config) -> RewardLoader:
    """Return the loader of a run's rewards and metrics: on the generator's device, unless they name another."""
    return RewardLoader(policy_device(config.policy), config.policy.toybox.weights)


def build_rewards(config: Config, loader: RewardLoader | None = None) -> dict[str, Reward]:
    """Return the rewards of a run by name. Raises `UserError` where a model or a server cannot be had."""
    loader = loader or reward_loader(config)
    return {name: loader.load(f"rewards.{name}", reward) for name, reward in config.rewards.items()}
