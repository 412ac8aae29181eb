"""Which metrics images of a benchmark are measured by."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from customized_grpo.config.rewards import HPSv3Config
from customized_grpo.config.section import Section, Switches

MetricName = Literal["dino", "clip_i", "clip_t", "dinov2", "hpsv3", "copy"]


class MetricsConfig(Section):
    """What pictures are measured by. ToyBox's own rewards and judge measure ToyBox, and none of this is read."""

    names: tuple[MetricName, ...] = ("dino", "clip_i", "clip_t", "dinov2", "hpsv3", "copy")
    """Which metrics, of dino, clip_i, clip_t, dinov2, hpsv3, copy."""
    dino: str = "facebook/dino-vits16"
    """Folder or hub id of DINO's ViT-S/16: the identity that is published."""
    clip: str = "openai/clip-vit-base-patch32"
    """Folder or hub id of the CLIP of clip_i and clip_t."""
    dinov2: str = "facebook/dinov2-base"
    """Folder or hub id of DINOv2."""
    hpsv3: HPSv3Config = HPSv3Config()
    """Settings of HPSv3."""
    device: str = "auto"
    """Where the metrics run, beside the generator: cpu, cuda, cuda:1, mps; auto: cuda if there is one."""
    micro_batch: int = Field(32, ge=1)
    """Pictures that go through an encoder at once: bounds memory, does not change the result."""

    SWITCHES: ClassVar[Switches] = {"names": ("hpsv3",)}

    @model_validator(mode="after")
    def _used(self) -> "MetricsConfig":
        if not self.names:
            raise ValueError("names: empty; name at least one metric")
        return self
