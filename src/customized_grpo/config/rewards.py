"""The settings of the rewards. Nothing here loads torch."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from customized_grpo.config.section import Section, Share, Switches, Weight

PROMPT_KINDS = ("toybox_prompt", "hpsv3", "hpsv2", "pickscore", "clip_t", "siglip", "vlm_prompt")
IDENTITY_KINDS = ("toybox_identity", "dino", "clip_i", "vlm_identity")
VLM_KINDS = ("vlm_prompt", "vlm_identity")
TOYBOX_KINDS = ("toybox_prompt", "toybox_identity")
IDENTITY_ENCODERS = ("dino", "clip_i")
ENCODERS = (*IDENTITY_ENCODERS, "clip_t", "siglip", "pickscore", "hpsv2")
"""Kinds that are cosines in a pretrained encoder's space."""
PRETRAINED = (*ENCODERS, "hpsv3")
"""Kinds whose pretrained model runs in the training processes."""
KINDS = (*PROMPT_KINDS, *IDENTITY_KINDS, "texture", "remote", "python")
Reference = Literal["whole", "segmented"]
Timeout = Annotated[float, Field(gt=0)]


def kind_hue(kind: str) -> Literal["prompt", "identity", "plain"]:
    """Return what a kind measures, as far as it says: how an image follows the prompt, or keeps the identity."""
    return "prompt" if kind in PROMPT_KINDS else "identity" if kind in IDENTITY_KINDS else "plain"


class VlmJudgeConfig(Section):
    """A vision-language model that scores prompt and subject from 0 to 4, on a server that speaks OpenAI's chat
    protocol. Rewards with equal settings share its answers."""

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
    """A reward served by `customized-grpo serve-reward` or another server of its protocol (docs/rewards.md)."""

    url: str | None = None
    """URL of the server, http://host:port; required."""
    timeout: Timeout = 120.0
    """Timeout of each answer in seconds, retries included; a later answer is no score. A server that has answered
    nothing for so long is asked no more in that scoring (a batch of images)."""
    reference: Reference = "whole"
    """segmented: the server receives the masks of the references too; all data must have some."""


class PythonConfig(Section):
    """A function of your own (docs/rewards.md)."""

    function: str | None = None
    """module.function, found from the folder in which the command runs; required."""
    reference: Reference = "whole"
    """segmented: the function receives the masks of the references too; all data must have some."""

    @field_validator("function")
    @classmethod
    def _named(cls, function: str | None) -> str | None:
        if function is not None and not re.fullmatch(r"\w+(\.\w+)+", function):
            raise ValueError("expected module.function")
        return function


class PromptEncoderConfig(Section):
    """Cosine of image and prompt in a pretrained encoder."""

    model: str | None = None
    """Folder or hub id of the model; unset: the usual one (docs/rewards.md)."""


class IdentityEncoderConfig(Section):
    """Cosine of image and reference in a pretrained encoder."""

    model: str | None = None
    """Folder or hub id of the model; unset: the usual one (docs/rewards.md)."""
    reference: Reference = "whole"
    """Compare with the whole reference, or with the subject cut out by its mask (paper: segmented); segmented: all data
    must have masks."""
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


class ToyBoxIdentityConfig(Section):
    """ToyBox's identity reward."""

    leak: Literal["low", "medium", "high"] = "high"
    """Encoder, by how much of the reference's background and pose it takes for identity."""
    reference: Reference = "whole"
    """Compare with the whole reference, or with the subject cut out by its mask."""


class LocalConfig(Section):
    """Where and how pretrained encoders and HPSv3 run."""

    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto: the generator's."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision; auto: HPSv3 in bf16 on CUDA, everything else in fp32."""
    micro_batch: int = Field(32, ge=1)
    """Images that go through a model at once: bounds memory, does not change the result."""


class ScoreConfig(Section):
    """What scores images: a kind, and the section named as the kind."""

    kind: str
    hpsv3: HPSv3Config = HPSv3Config()
    """Settings for kind=hpsv3."""
    hpsv2: HPSv2Config = HPSv2Config()
    """Settings for kind=hpsv2."""
    pickscore: PromptEncoderConfig = PromptEncoderConfig()
    """Settings for kind=pickscore."""
    clip_t: PromptEncoderConfig = PromptEncoderConfig()
    """Settings for kind=clip_t."""
    siglip: PromptEncoderConfig = PromptEncoderConfig()
    """Settings for kind=siglip."""
    dino: IdentityEncoderConfig = IdentityEncoderConfig()
    """Settings for kind=dino."""
    clip_i: IdentityEncoderConfig = IdentityEncoderConfig()
    """Settings for kind=clip_i."""
    toybox_identity: ToyBoxIdentityConfig = ToyBoxIdentityConfig()
    """Settings for kind=toybox_identity."""
    vlm_judge: VlmJudgeConfig = VlmJudgeConfig()
    """Settings for kind=vlm_prompt and kind=vlm_identity."""
    remote: RemoteConfig = RemoteConfig()
    """Settings for kind=remote."""
    python: PythonConfig = PythonConfig()
    """Settings for kind=python."""
    local: LocalConfig = LocalConfig()
    """Where and how a pretrained model runs: of dino, clip_i, clip_t, siglip, pickscore, hpsv2, hpsv3."""

    SWITCHES: ClassVar[Switches] = {"kind": KINDS}
    SHARED: ClassVar[Switches] = {"local": PRETRAINED, "vlm_judge": VLM_KINDS}

    @property
    def model(self) -> str | None:
        """The model that the section of a pretrained kind names; None if it names none, and for other kinds."""
        return getattr(self.section, "model", None) if self.kind in PRETRAINED else None

    @property
    def section(self) -> Section | None:
        """The section of the kind; None for a kind without settings."""
        name = "vlm_judge" if self.kind in VLM_KINDS else self.kind
        found = getattr(self, name, None)
        return found if isinstance(found, Section) else None

    def same_score(self, other: "ScoreConfig") -> bool:
        """Return whether the two score alike, wherever they run."""
        return self.kind == other.kind and self.section == other.section

    @property
    def segmented(self) -> bool:
        """Whether references are compared, or handed on, with their masks."""
        return getattr(self.section, "reference", "whole") == "segmented"

    @model_validator(mode="after")
    def _check_needed(self) -> "ScoreConfig":
        if self.kind == "hpsv2" and self.hpsv2.model is None:
            raise ValueError(
                "hpsv2.model: HPSv2 has no usual model, since its published weights are a pickle; name a safetensors "
                "file made of them, or a CLIP's folder or hub id (docs/rewards.md)"
            )
        if self.kind == "remote":
            _check_address("remote.url", self.remote.url)
            if not (self.remote.url or "").startswith(("http://", "https://")):
                raise ValueError(
                    f"remote.url: a remote reward needs its URL, http://host:port (found {self.remote.url!r})"
                )
        if self.kind == "python" and self.python.function is None:
            raise ValueError("python.function: name the function, as module.function")
        if self.kind in VLM_KINDS:
            _check_address("vlm_judge.url", self.vlm_judge.url)
            if None in (self.vlm_judge.url, self.vlm_judge.model):
                raise ValueError("vlm_judge.url, vlm_judge.model: name the judge's server and its model there")
        if self.kind in IDENTITY_ENCODERS:
            settings: IdentityEncoderConfig = getattr(self, self.kind)
            if settings.differs_from_default("background") and settings.reference != "segmented":
                raise ValueError(
                    f"{self.kind}.background: only behind segmented references; set {self.kind}.reference to segmented"
                )
        return self


class RewardConfig(ScoreConfig):
    """A reward: what it scores by, and how it counts."""

    kind: Literal[
        "toybox_prompt", "toybox_identity", "hpsv3", "hpsv2", "pickscore", "clip_t", "siglip", "dino", "clip_i",
        "vlm_prompt", "vlm_identity", "texture", "remote", "python"
    ]  # fmt: skip
    """Prompt following: hpsv3 (paper), or the cosine of image and prompt in the encoder of toybox_prompt, hpsv2,
    pickscore, clip_t or siglip. Identity: cosine to the reference in the encoder of toybox_identity, dino (paper:
    DINOv2) or clip_i. A judge: vlm_prompt, vlm_identity. Roughness against the reference: texture (a constraint). A
    server: remote. A function of your own: python (docs/rewards.md)."""
    role: Literal["objective", "constraint"] = "objective"
    """objective: more is better. constraint: must keep its bounds, and counts only in groups that break them."""
    schedule: Literal["constant", "early", "late"] = "constant"
    """Weight over the denoising steps: early follows TDW's curve for the prompt, late its complement (paper: prompt
    early, identity late); constant: `weight` at every step."""
    weight: Weight = 1.0
    """Share among the rewards of one schedule, relative to theirs; beside early and late, a constant weight is a share
    of the whole. 0: scored and logged, and nothing else."""
    up_to: float | None = None
    """Count no further than this value of the reward (hinge); unset: no limit."""
    at_least: float | None = None
    """Lower bound of a constraint, in the reward's units."""
    at_most: float | None = None
    """Upper bound of a constraint, in the reward's units."""
    max_invalid_share: Share = 0.5
    """Stop when more than this share of an iteration's scores could not be computed."""

    SWITCHES: ClassVar[Switches] = {**ScoreConfig.SWITCHES, "role": ("objective", "constraint")}
    SHARED: ClassVar[Switches] = {
        **ScoreConfig.SHARED,
        **dict.fromkeys(("schedule", "weight", "up_to"), ("objective",)),
        **dict.fromkeys(("at_least", "at_most"), ("constraint",)),
    }

    @property
    def is_objective(self) -> bool:
        """Whether training follows the reward."""
        return self.role == "objective" and self.weight > 0

    @model_validator(mode="after")
    def _check_bounds(self) -> "RewardConfig":
        if self.role == "constraint" and self.at_least is None and self.at_most is None:
            raise ValueError("role: a constraint needs a bound; set at_least or at_most")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least={self.at_least} is more than at_most={self.at_most}; nothing would hold both")
        return self


Rewards = Mapping[str, RewardConfig]
NAME = re.compile("[a-z][a-z0-9_]*")


def objectives(rewards: Rewards) -> dict[str, RewardConfig]:
    """Return the rewards that training follows, by name."""
    return {name: reward for name, reward in rewards.items() if reward.is_objective}


def constraints(rewards: Rewards) -> dict[str, RewardConfig]:
    """Return the rewards that are constraints, by name."""
    return {name: reward for name, reward in rewards.items() if reward.role == "constraint"}


def wants_masks(scores: Mapping[str, ScoreConfig]) -> str | None:
    """Return the name of the first score that reads the references' masks, None if none does."""
    return next((name for name, score in scores.items() if score.segmented), None)


def check_rewards(rewards: Rewards) -> None:
    """Raise ValueError for names that cannot be shown, and where none of the rewards is an objective."""
    for name in rewards:
        check_name(name)
    if not objectives(rewards):
        raise ValueError("no reward is an objective with a weight above 0, so nothing would be learned; add one")


def check_schedules(rewards: Rewards) -> None:
    """Raise ValueError for schedules and weights that do not fit together."""
    followed = objectives(rewards).values()
    weights = {
        schedule: sum(reward.weight for reward in followed if reward.schedule == schedule)
        for schedule in ("constant", "early", "late")
    }
    if bool(weights["early"]) != bool(weights["late"]):
        there, missing = ("early", "late") if weights["early"] else ("late", "early")
        raise ValueError(
            f"schedule: a reward is {there} and none is {missing}; the two divide the weight between them. Give "
            f"another reward schedule={missing}, or let all be constant"
        )
    if weights["early"] and weights["constant"] >= 1:
        raise ValueError(
            f"weight: the constant weights come to {weights['constant']:g}, expected less than 1: the rewards with "
            "schedule early and late share the rest"
        )


def check_name(name: str) -> None:
    """Raise ValueError for a name of a reward or metric that is no lower-case word."""
    if not NAME.fullmatch(name):
        raise ValueError(f"'{name}' is no name; expected lower-case letters, digits and _, as identity or my_reward")


def _check_address(field: str, url: str | None) -> None:
    """Raise ValueError, which does not repeat it, for a URL with what is often secret: configurations are written down
    and shown."""
    if url is not None and any(mark in url for mark in "@?#"):
        raise ValueError(
            f"{field}: the URL has a user, a query or a fragment (one of @, ? and #), expected http://host:port/path; "
            "leave it out, since what is secret in it would be written down, and keep keys in the environment"
        )
