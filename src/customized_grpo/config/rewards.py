"""The settings of the rewards. Nothing here loads torch."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from customized_grpo.config.section import ReadWith, Section, Share

OWN = r"python:\w+(\.\w+)+"
"""How a reward of one's own is named."""
PROMPT_REWARDS = ("toybox", "hpsv3", "hpsv2", "pickscore", "clip_t", "siglip", "vlm_judge", "remote")
IDENTITY_REWARDS = ("toybox", "dino", "clip_i", "vlm_judge", "remote")
IDENTITY_ENCODERS = ("dino", "clip_i")
ENCODERS = (*IDENTITY_ENCODERS, "clip_t", "siglip", "pickscore", "hpsv2")
"""Rewards that are cosines in a pretrained encoder's space."""
READ_BY = {
    "micro_batch": (*ENCODERS, "hpsv3"),
    "device": (*ENCODERS, "hpsv3"),
    "precision": (*ENCODERS, "hpsv3"),
    "deadline": ("vlm_judge", "remote"),
}
"""Settings that some rewards read, on either side, and the others do not."""


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


class HPSv2Config(Section):
    """A CLIP tuned to people's choices among images for a prompt (arXiv 2306.09341); its weights are named in
    rewards.prompt_model."""

    backbone: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or hub id whose configuration, tokenizer and image processor it takes where it has none of its own."""


class HPSv3Config(Section):
    """The paper's prompt reward (arXiv 2508.03789); its weights are named in rewards.prompt_model."""

    backbone: str = "Qwen/Qwen2-VL-7B-Instruct"
    """Folder or hub id whose configuration, tokenizer and image processor it takes."""
    instruction: Path | None = None
    """File with the text that it was trained with; unset: read from the installed hpsv3 distribution."""
    positions: Literal["sequential", "mrope"] = "sequential"
    """Positions of its tokens: 0, 1, 2, ... as the published scorer feeds them, or Qwen2-VL's own (M-RoPE)."""


class RewardsConfig(Section):
    """The two rewards, in the order (prompt, identity)."""

    prompt: Annotated[str, AfterValidator(partial(_known, PROMPT_REWARDS))] = "toybox"
    """Prompt reward: hpsv3 (paper); cosine of image and prompt in the encoder of toybox, hpsv2, pickscore, clip_t or
    siglip; a judge, vlm_judge; a server, remote; or python:module.function of your own (docs/rewards.md)."""
    identity: Annotated[str, AfterValidator(partial(_known, IDENTITY_REWARDS))] = "toybox"
    """Identity reward: cosine to the reference in the encoder of toybox, dino (paper: DINOv2) or clip_i; a judge,
    vlm_judge; a server, remote; or python:module.function of your own (docs/rewards.md)."""
    prompt_model: str | None = None
    """Folder or hub id of the prompt reward's model (hpsv2, hpsv3: or a safetensors file), or the URL of a remote one;
    unset: the usual model."""
    identity_model: str | None = None
    """Folder or hub id of the identity reward's model, or the URL of a remote one; unset: the usual model."""
    identity_leak: Literal["low", "medium", "high"] = "high"
    """Which of ToyBox's identity encoders: how much of the reference's background and pose it takes for identity."""
    identity_reference: Literal["whole", "segmented"] = "whole"
    """Compare with the whole reference, or with the subject cut out by its mask (paper: segmented)."""
    several_references: Literal["mean", "max"] = "mean"
    """dino, clip_i: identity to several references is the mean of the cosines, or the largest."""
    background: Share = 1.0
    """dino, clip_i: grey level behind a segmented reference, from black to white."""
    micro_batch: int = Field(32, ge=1)
    """Images that go through a pretrained encoder or HPSv3 at once: bounds memory, does not change the result."""
    device: str = "auto"
    """Where pretrained encoders and HPSv3 run: cpu, cuda, cuda:1, mps; auto: where the generator does."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """In what pretrained encoders and HPSv3 compute; auto: HPSv3 in bf16 on CUDA, everything else in fp32."""
    deadline: float = Field(120.0, gt=0)
    """vlm_judge, remote: seconds in which each answer must come, further tries included; without it, there is no score.
    When a server has answered nothing for so long, the rest of that scoring (a batch of images) is not asked."""
    hpsv2: HPSv2Config = HPSv2Config()
    """HPSv2, where it is the prompt reward."""
    hpsv3: HPSv3Config = HPSv3Config()
    """HPSv3, where it is the prompt reward."""
    vlm_judge: VlmJudgeConfig = VlmJudgeConfig()
    """The judge, where one of the rewards is vlm_judge."""
    max_invalid_share: Share = 0.5
    """Stop when more than this share of an iteration's scores of one of the rewards could not be computed."""

    READ_WITH: ClassVar[ReadWith] = {
        "hpsv2": ("prompt", ["hpsv2"]),
        "hpsv3": ("prompt", ["hpsv3"]),
        "identity_leak": ("identity", ["toybox"]),
        "several_references": ("identity", IDENTITY_ENCODERS),
        "background": ("identity", IDENTITY_ENCODERS),
    }

    def reads(self, name: str) -> bool:
        """Whether one of the two rewards reads the setting `name`, of READ_BY."""
        return self.prompt in READ_BY[name] or self.identity in READ_BY[name]

    @model_validator(mode="after")
    def _models(self) -> "RewardsConfig":
        for side, kind, model in (
            ("prompt", self.prompt, self.prompt_model),
            ("identity", self.identity, self.identity_model),
        ):
            if kind == "remote":
                _check_address(f"{side}_model", model)
            if kind == "remote" and not (model or "").startswith(("http://", "https://")):
                raise ValueError(f"{side}_model: a remote reward wants its URL, http://host:port (found {model!r})")
            if model is not None and (kind in ("toybox", "vlm_judge") or kind.startswith("python:")):
                raise ValueError(f"{side}_model: {side}={kind} takes none; leave it out")
        if self.prompt == "hpsv2" and self.prompt_model is None:
            raise ValueError(
                "prompt_model: hpsv2 has no usual one, since its published weights are a pickle; name a safetensors "
                "file made of them, or a CLIP's folder or hub id (docs/rewards.md)"
            )
        return self

    @model_validator(mode="after")
    def _parts(self) -> "RewardsConfig":
        _check_address("vlm_judge.url", self.vlm_judge.url)
        judged = "vlm_judge" in (self.prompt, self.identity)
        if judged and None in (self.vlm_judge.url, self.vlm_judge.model):
            raise ValueError("vlm_judge.url, vlm_judge.model: name the judge's server and its model there")
        if not judged and self.vlm_judge != VlmJudgeConfig():
            raise ValueError("vlm_judge: neither reward is vlm_judge; leave it out")
        return self

    @model_validator(mode="after")
    def _for_these_rewards(self) -> "RewardsConfig":
        for name, readers in READ_BY.items():
            if self.differs_from_default(name) and not self.reads(name):
                raise ValueError(
                    f"{name}: only for {', '.join(readers)} (found prompt={self.prompt}, identity={self.identity}); "
                    "leave it out"
                )
        if self.differs_from_default("background") and self.identity_reference != "segmented":
            raise ValueError("background: only behind segmented references; set identity_reference to segmented")
        return self


def _check_address(field: str, url: str | None) -> None:
    """Raise ValueError, which does not repeat it, for a URL with what is often secret: configurations are written down
    and told."""
    if url is not None and any(mark in url for mark in "@?#"):
        raise ValueError(
            f"{field}: the URL has a user, a query or a fragment (one of @, ? and #), expected http://host:port/path; "
            "leave it out, since what is secret in it would be written down, and keep keys in the environment"
        )
