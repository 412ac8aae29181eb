"""The settings of the rewards. Nothing here loads torch."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from customized_grpo.config.section import Section, Share, Switches

OWN = r"python:\w+(\.\w+)+"
"""Pattern of the name of a custom reward."""
PROMPT_REWARDS = ("toybox", "hpsv3", "hpsv2", "pickscore", "clip_t", "siglip", "vlm_judge", "remote")
IDENTITY_REWARDS = ("toybox", "dino", "clip_i", "vlm_judge", "remote")
IDENTITY_ENCODERS = ("dino", "clip_i")
ENCODERS = (*IDENTITY_ENCODERS, "clip_t", "siglip", "pickscore", "hpsv2")
"""Rewards that are cosines in a pretrained encoder's space."""
PRETRAINED = (*ENCODERS, "hpsv3")
"""Rewards whose pretrained model runs in the training processes."""


Timeout = Annotated[float, Field(gt=0)]


def _known(rewards: Sequence[str], name: str) -> str:
    if name not in rewards and not re.fullmatch(OWN, name):
        raise ValueError(f"expected one of {', '.join(rewards)}, or python:module.function")
    return name


class VlmJudgeConfig(Section):
    """A vision-language model that scores both rewards from 0 to 4, on a server that speaks OpenAI's chat protocol."""

    url: str | None = None
    """Where its /chat/completions is, as http://host:port/v1; needed. The key comes from the environment variable
    OPENAI_API_KEY alone: no user, password or query in it."""
    model: str | None = None
    """The model's name on that server; needed."""
    timeout: Timeout = 120.0
    """Timeout of each answer in seconds, retries included; a later answer is no score. A judge that has answered
    nothing for so long is asked no more in that scoring (a batch of images)."""
    concurrency: int = Field(8, ge=1)
    """Questions under way at once."""
    attempts: int = Field(3, ge=1)
    """How often an image is asked about whose answers hold no scores."""
    reasoning: bool = False
    """Have the model reason before it scores: slower, and steadier."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest answer in tokens, a thought included; unset: 60, with reasoning 400. A model that thinks takes more."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls that limit; OpenAI's newer models: max_completion_tokens."""
    temperature: float = Field(0.0, ge=0)
    """Of the first try at an image. Further tries, which show the model its unusable answer, are at 0.7 at least."""
    omit: tuple[Literal["temperature", "seed", "max_tokens"], ...] = ()
    """Fields that the server does not take: they are left out of every question, as [temperature, seed]."""
    extra_body: dict[str, Any] = Field({})
    """Further fields of every question, as {chat_template_kwargs: {enable_thinking: false}}. They are written down with
    the configuration, so nothing secret belongs here."""

    @field_validator("extra_body")
    @classmethod
    def _can_be_sent(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for name in fields:
            if name in ("model", "temperature", "max_tokens", "max_completion_tokens"):
                raise ValueError(f"{name} has a setting of its own in this section; leave it out here")
            if name in ("messages", "seed", "stream", "n"):
                raise ValueError(f"{name} is set by the judge itself, which reads one whole answer; leave it out")
        try:
            json.dumps(fields, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the fields are sent as JSON, which they cannot be written as ({error})") from error
        return fields

    @model_validator(mode="after")
    def _sent(self) -> "VlmJudgeConfig":
        for name, fields in {"temperature": ("temperature",), "max_tokens": ("max_tokens", "max_tokens_field")}.items():
            if name in self.omit and any(self.differs_from_default(field) for field in fields):
                raise ValueError(f"omit: {name} is left out of every question, and set all the same; choose one")
        return self


class RemoteConfig(Section):
    """Rewards served by `customized-grpo serve-reward` or another server of its protocol (docs/rewards.md)."""

    prompt_url: str | None = None
    """URL of the server of a remote prompt reward, http://host:port; required there."""
    identity_url: str | None = None
    """URL of the server of a remote identity reward, http://host:port; required there."""
    timeout: Timeout = 120.0
    """Timeout of each answer in seconds, retries included; a later answer is no score. A server that has answered
    nothing for so long is asked no more in that scoring (a batch of images)."""


class PromptEncoderConfig(Section):
    """Cosine of image and prompt in a pretrained encoder."""

    model: str | None = None
    """Folder or hub id of the model; unset: the usual one (docs/rewards.md)."""


class IdentityEncoderConfig(Section):
    """Cosine of image and reference in a pretrained encoder."""

    model: str | None = None
    """Folder or hub id of the model; unset: the usual one (docs/rewards.md)."""
    several_references: Literal["mean", "max"] = "mean"
    """Identity to several references is the mean of the cosines, or the largest."""
    background: Share = 1.0
    """Gray level behind a segmented reference, from black (0) to white (1)."""


class HPSv2Config(Section):
    """A CLIP tuned to people's choices among images for a prompt (arXiv 2306.09341)."""

    model: str | None = None
    """Safetensors file of its weights, or a CLIP's folder or hub id; required (docs/rewards.md)."""
    backbone: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or hub id of the configuration, tokenizer and image processor, used if the model has none of its own."""


class HPSv3Config(Section):
    """The paper's prompt reward (arXiv 2508.03789)."""

    model: str | None = None
    """HPSv3.safetensors, or owner/name/file on the hub; unset: the published weights."""
    backbone: str = "Qwen/Qwen2-VL-7B-Instruct"
    """Folder or hub id of the configuration, tokenizer and image processor."""
    instruction: Path | None = None
    """File with the text that HPSv3 was trained with; unset: read from the installed hpsv3 distribution."""
    positions: Literal["sequential", "mrope"] = "sequential"
    """Positions of its tokens: 0, 1, 2, ... as in the published scorer, or Qwen2-VL's own (M-RoPE)."""


class ToyBoxRewardConfig(Section):
    """ToyBox's rewards."""

    identity_leak: Literal["low", "medium", "high"] = "high"
    """Identity encoder, by how much of the reference's background and pose it takes for identity."""


class LocalConfig(Section):
    """Where and how pretrained encoders and HPSv3 run."""

    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto: the generator's."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision; auto: HPSv3 in bf16 on CUDA, everything else in fp32."""
    micro_batch: int = Field(32, ge=1)
    """Images that go through a model at once: bounds memory, does not change the result."""


class RewardsConfig(Section):
    """The two rewards, in the order (prompt, identity)."""

    prompt: Annotated[str, AfterValidator(partial(_known, PROMPT_REWARDS))] = "toybox"
    """Prompt reward: hpsv3 (paper); cosine of image and prompt in the encoder of toybox, hpsv2, pickscore, clip_t or
    siglip; a judge, vlm_judge; a server, remote; or python:module.function of your own (docs/rewards.md)."""
    identity: Annotated[str, AfterValidator(partial(_known, IDENTITY_REWARDS))] = "toybox"
    """Identity reward: cosine to the reference in the encoder of toybox, dino (paper: DINOv2) or clip_i; a judge,
    vlm_judge; a server, remote; or python:module.function of your own (docs/rewards.md)."""
    identity_reference: Literal["whole", "segmented"] = "whole"
    """Compare with the whole reference, or with the subject cut out by its mask (paper: segmented). segmented: all data
    must have masks, and custom and remote rewards receive them."""
    max_invalid_share: Share = 0.5
    """Stop when more than this share of an iteration's scores of one of the rewards could not be computed."""
    toybox: ToyBoxRewardConfig = ToyBoxRewardConfig()
    """Settings for rewards.prompt=toybox and rewards.identity=toybox."""
    hpsv3: HPSv3Config = HPSv3Config()
    """Settings for rewards.prompt=hpsv3."""
    hpsv2: HPSv2Config = HPSv2Config()
    """Settings for rewards.prompt=hpsv2."""
    pickscore: PromptEncoderConfig = PromptEncoderConfig()
    """Settings for rewards.prompt=pickscore."""
    clip_t: PromptEncoderConfig = PromptEncoderConfig()
    """Settings for rewards.prompt=clip_t."""
    siglip: PromptEncoderConfig = PromptEncoderConfig()
    """Settings for rewards.prompt=siglip."""
    dino: IdentityEncoderConfig = IdentityEncoderConfig()
    """Settings for rewards.identity=dino."""
    clip_i: IdentityEncoderConfig = IdentityEncoderConfig()
    """Settings for rewards.identity=clip_i."""
    vlm_judge: VlmJudgeConfig = VlmJudgeConfig()
    """Settings for rewards.prompt=vlm_judge and rewards.identity=vlm_judge."""
    remote: RemoteConfig = RemoteConfig()
    """Settings for rewards.prompt=remote and rewards.identity=remote."""
    local: LocalConfig = LocalConfig()
    """Settings for rewards with a pretrained model in the training processes: dino, clip_i, clip_t, siglip, pickscore,
    hpsv2, hpsv3."""

    SWITCHES: ClassVar[Switches] = {"prompt": PROMPT_REWARDS, "identity": IDENTITY_REWARDS}
    SHARED: ClassVar[Switches] = {"local": PRETRAINED}

    def model_of(self, kind: str) -> str | None:
        """Return the model that the section of a pretrained reward names, None if it names none."""
        section: PromptEncoderConfig | IdentityEncoderConfig | HPSv2Config | HPSv3Config = getattr(self, kind)
        return section.model

    @model_validator(mode="after")
    def _check_remote(self) -> "RewardsConfig":
        for side, kind in (("prompt", self.prompt), ("identity", self.identity)):
            field, url = f"remote.{side}_url", getattr(self.remote, f"{side}_url")
            if kind == "remote":
                _check_address(field, url)
            if kind == "remote" and not (url or "").startswith(("http://", "https://")):
                raise ValueError(f"{field}: a remote reward needs its URL, http://host:port (found {url!r})")
            if kind != "remote" and url is not None:
                raise ValueError(f"{field}: only for {side}=remote (found {side}={kind}); leave it out")
        return self

    @model_validator(mode="after")
    def _check_needed(self) -> "RewardsConfig":
        if self.prompt == "hpsv2" and self.hpsv2.model is None:
            raise ValueError(
                "hpsv2.model: HPSv2 has no usual model, since its published weights are a pickle; name a safetensors "
                "file made of them, or a CLIP's folder or hub id (docs/rewards.md)"
            )
        _check_address("vlm_judge.url", self.vlm_judge.url)
        if self.is_read("vlm_judge") and None in (self.vlm_judge.url, self.vlm_judge.model):
            raise ValueError("vlm_judge.url, vlm_judge.model: name the judge's server and its model there")
        for kind in IDENTITY_ENCODERS:
            if getattr(self, kind).differs_from_default("background") and self.identity_reference != "segmented":
                raise ValueError(
                    f"{kind}.background: only behind segmented references; set identity_reference to segmented"
                )
        return self


def _check_address(field: str, url: str | None) -> None:
    """Raise ValueError, which does not repeat it, for a URL with what is often secret: configurations are written down
    and shown."""
    if url is not None and any(mark in url for mark in "@?#"):
        raise ValueError(
            f"{field}: the URL has a user, a query or a fragment (one of @, ? and #), expected http://host:port/path; "
            "leave it out, since what is secret in it would be written down, and keep keys in the environment"
        )
