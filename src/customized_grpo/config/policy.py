"""The generator to tune, and how its weights are trained."""

from pathlib import Path
from typing import ClassVar, Literal, get_args

from pydantic import Field, model_validator

from customized_grpo.config.section import Section, Switches

Pipeline = Literal["flux1-kontext", "uno", "flux2-klein", "flux2", "qwen-image-edit-plus"]
Quantization = Literal["none", "int8", "fp8", "nf4"]
PIPELINES: tuple[str, ...] = get_args(Pipeline)
"""Kinds that are diffusers pipelines."""


class ToyBoxPolicyConfig(Section):
    """The ToyBox generator."""

    weights: Path | None = None
    """Folder of ToyBox weights (generator.safetensors, ...) to use instead of the shipped ones."""
    adapter: Literal["lora", "full"] = "lora"
    """Train LoRA factors, or every weight of the denoiser."""


class PipelineConfig(Section):
    """A diffusers pipeline."""

    model: str | None = None
    """Folder or hub id of the pipeline; unset: the one that docs/models.md names."""
    base_adapter: str | None = None
    """LoRA merged into the model before training starts: a safetensors file, or owner/name/file.safetensors on the
    hub."""
    height: int = Field(512, ge=16)
    """Height of images in pixels, a multiple of 16 (paper: 512)."""
    width: int = Field(512, ge=16)
    """Width of images in pixels, a multiple of 16 (paper: 512)."""
    reference_side: int | None = Field(None, ge=16)
    """Resize references to the area of a square of this side in pixels (uno: to this longer side), keeping their aspect
    ratio; unset: about the size that the model's own pipeline uses."""
    guidance_scale: float | None = Field(None, ge=1)
    """Guidance scale, in rollout and update; unset: the pipeline's own."""
    quantization: Quantization = "none"
    """Form of the frozen weights in the transformer's blocks: int8 and fp8 take half the memory of bf16, nf4 a quarter
    (docs/models.md). The LoRA factors on them stay fp32. Needs customized-grpo[quantization]."""
    text_encoder_quantization: Quantization = "none"
    """The same for the text encoders, while they encode."""
    text_encoders: Literal["free", "cpu"] = "free"
    """What to do with the text and image encoders once the data are encoded: free their memory, or keep them on the
    CPU."""
    fsdp: bool = False
    """Shard the frozen weights over the processes of the run (FSDP2) instead of keeping a copy in each."""
    block_offload: bool = False
    """Keep the frozen weights of the transformer's blocks in the host's memory; each block's come to the device one
    block ahead of its use. Takes time, and leaves two blocks' weights on the device (docs/models.md)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass instead of storing them."""
    keep_every: int | None = Field(None, ge=2)
    """Store the activations of every n-th block, where gradient_checkpointing recomputes the others: less time, more
    memory (`--dry_run --gpu_memory` says how far that goes)."""
    compile: bool = False
    """Compile the transformer's repeated blocks (torch.compile)."""
    attention_backend: str | None = None
    """diffusers' attention backend: native, _native_flash, flash, _flash_3_hub, ...; unset: its default."""
    cache: Path = Path("runs/conditions")
    """Folder of encoded prompts and references, shared by runs; `customized-grpo cache --clear` empties it."""
    cache_limit: float | None = Field(None, gt=0)
    """Size limit of the cache in gigabytes (10^9 bytes): the least recently used entries are removed when a run needs
    room, and a run that needs more does not begin; unset: no limit."""

    @model_validator(mode="after")
    def _check_quantization(self) -> "PipelineConfig":
        if self.fsdp and self.quantization != "none":
            raise ValueError(
                f"quantization={self.quantization}: quantized weights are not sharded; set fsdp=false or "
                "quantization=none"
            )
        return self

    @model_validator(mode="after")
    def _check_keep_every(self) -> "PipelineConfig":
        if self.keep_every is not None and not self.gradient_checkpointing:
            raise ValueError("keep_every: without gradient_checkpointing all blocks are kept; leave it out")
        return self

    @model_validator(mode="after")
    def _check_block_offload(self) -> "PipelineConfig":
        if not self.block_offload:
            return self
        against = {
            "fsdp": (self.fsdp, "weights that are spread over processes are not kept on the host", "false"),
            "compile": (self.compile, "blocks whose weights come and go are not compiled", "false"),
            "quantization": (self.quantization == "nf4", "nf4 cannot be moved back and forth", "int8"),
            "gradient_checkpointing": (
                not self.gradient_checkpointing, "the backward pass would keep the weights of all blocks", "true",
            ),
            "keep_every": (
                self.keep_every is not None, "the backward pass would keep the weights of the kept blocks", "null",
            ),
        }  # fmt: skip
        for name, (found, why, remedy) in against.items():
            if found:
                raise ValueError(f"block_offload: {why}; set {name}={remedy} or block_offload=false")
        return self

    @model_validator(mode="after")
    def _check_multiples(self) -> "PipelineConfig":
        for name in ("height", "width"):
            if getattr(self, name) % 16:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a multiple of 16, an image token's side in pixels"
                )
        return self


class PolicyConfig(Section):
    """The generator to tune."""

    kind: Literal["toybox", Pipeline] = "toybox"
    """Which generator: 'toybox' is the CPU-scale one whose weights ship with the package; the others are diffusers
    pipelines (docs/models.md)."""
    init_from: str | None = None
    """Adapter whose values the trained factors (with toybox.adapter=full, the weights) start from, unmerged: the folder
    of a run or of `export`, a LoRA file, or owner/name/file.safetensors on the hub. The base model stays without it."""
    lora_rank: int = Field(32, ge=1)
    """Rank of the LoRA factors (paper: 512, for a 12 B model)."""
    lora_alpha: int = Field(32, ge=1)
    """Scale of the LoRA update is lora_alpha / lora_rank."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the generator's matrix products; log-probabilities are always fp32. auto: bf16 if the processor
    multiplies it in hardware."""
    device: str = "auto"
    """Device of the generator: cpu, cuda, cuda:1, mps; auto: cuda if available. ToyBox runs on the CPU."""
    toybox: ToyBoxPolicyConfig = ToyBoxPolicyConfig()
    """Settings for policy.kind=toybox."""
    pipeline: PipelineConfig = PipelineConfig()
    """Settings for a policy.kind that is a diffusers pipeline."""

    SWITCHES: ClassVar[Switches] = {"kind": ("toybox", *PIPELINES)}
    SHARED: ClassVar[Switches] = {"pipeline": PIPELINES}

    @model_validator(mode="after")
    def _check_toybox(self) -> "PolicyConfig":
        if self.kind == "toybox" and self.device not in ("auto", "cpu"):
            raise ValueError(f"device={self.device}: ToyBox runs on the CPU; leave it out")
        for name in ("lora_rank", "lora_alpha") if self.toybox.adapter == "full" else ():
            if self.differs_from_default(name):
                raise ValueError(f"{name}: only for toybox.adapter=lora (found full); leave it out")
        return self
