"""The generator to tune, and how its weights are trained."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from customized_grpo.config.section import ReadWith, Section

NOT_FOR_TOYBOX = (
    "model", "base_adapter", "height", "width", "reference_side", "guidance", "offload", "shard",
    "gradient_checkpointing", "compile", "attention_backend", "cache", "cache_limit",
)  # fmt: skip
ONLY_FOR_TOYBOX = ("weights", "adapter")


class PolicyConfig(Section):
    """The generator to tune."""

    kind: Literal["toybox", "flux1-kontext", "uno", "flux2-klein", "flux2", "qwen-image-edit-plus"] = "toybox"
    """Which generator: 'toybox' is the CPU-scale one whose weights ship with the package; the others are diffusers
    pipelines (docs/models.md)."""
    model: str | None = None
    """Folder or hub id of the pipeline; unset: the one that docs/models.md names. Not for toybox."""
    base_adapter: str | None = None
    """LoRA merged into the model before training starts: a safetensors file, or owner/name/file.safetensors on the hub.
    Not for toybox."""
    init_from: str | None = None
    """Adapter whose values the trained factors (with adapter=full, the weights) start from, unmerged: the folder of a
    run or of `export`, a LoRA file, or owner/name/file.safetensors on the hub. The base stays the model without it."""
    weights: Path | None = None
    """Folder of ToyBox weights (generator.safetensors, ...) to use instead of the shipped ones. Only for toybox."""
    adapter: Literal["lora", "full"] = "lora"
    """Train LoRA factors, or (only for toybox) every weight of the denoiser."""
    lora_rank: int = Field(32, ge=1)
    """Rank of the LoRA factors (paper: 512, for a 12 B model)."""
    lora_alpha: int = Field(32, ge=1)
    """Scale of the LoRA update is lora_alpha / lora_rank."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the generator's matrix products; log-probabilities are always fp32. auto: bf16 where the
    processor multiplies it."""
    device: str = "auto"
    """Where the generator runs: cpu, cuda, cuda:1, mps; auto: cuda where there is one. ToyBox runs on the CPU."""
    height: int = Field(512, ge=16)
    """Height of images in pixels, a multiple of 16 (paper: 512). Not for toybox."""
    width: int = Field(512, ge=16)
    """Width of images in pixels, a multiple of 16 (paper: 512). Not for toybox."""
    reference_side: int | None = Field(None, ge=16)
    """References are seen in the area of a square of this side in pixels (uno: with this longer side), their shape
    kept; unset: about what the model's own pipeline takes. Not for toybox."""
    guidance: float | None = Field(None, ge=1)
    """Guidance scale, in rollout and update; unset: the pipeline's own. Not for toybox."""
    offload: bool = False
    """Keep the encoders on the CPU once the data are encoded, instead of letting them go. Not for toybox."""
    shard: bool = False
    """Spread the frozen weights over the processes of the run instead of keeping them whole in each. Not for toybox."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass instead of keeping them. Not for toybox, which keeps them."""
    compile: bool = False
    """Compile the transformer's repeated blocks (torch.compile). Not for toybox."""
    attention_backend: str | None = None
    """diffusers' attention backend: native, _native_flash, flash, _flash_3_hub, ...; unset: its default. Not for
    toybox."""
    cache: Path = Path("runs/conditions")
    """Folder of encoded prompts and references, shared by runs; `customized-grpo cache --clear` empties it. Not for
    toybox."""
    cache_limit: float | None = Field(None, gt=0)
    """Most gigabytes (10^9 bytes) that the folder may take: what was used least recently goes when a run needs room for
    its own, and a run that needs more does not begin; unset: no limit. Not for toybox."""

    READ_WITH: ClassVar[ReadWith] = {"lora_rank": ("adapter", ["lora"]), "lora_alpha": ("adapter", ["lora"])}

    @model_validator(mode="after")
    def _for_this_kind(self) -> "PolicyConfig":
        given = [
            name
            for name in (NOT_FOR_TOYBOX if self.kind == "toybox" else ONLY_FOR_TOYBOX)
            if self.differs_from_default(name)
        ]
        if given:
            raise ValueError(f"{', '.join(given)}: not for kind='{self.kind}'; leave it out")
        if self.kind == "toybox" and self.device not in ("auto", "cpu"):
            raise ValueError(f"device={self.device}: ToyBox runs on the CPU; leave it out")
        for name in ("height", "width"):
            if getattr(self, name) % 16:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a multiple of 16, an image token's side in pixels"
                )
        return self
