"""Settings of a benchmark. Their defaults are the paper's (arXiv 2510.18263): 512 x 512, 25 steps, guidance 4, seed
3407."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from customized_grpo.config.metrics import MetricsConfig
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.section import Section

PUBLISHED_GUIDANCE = 4.0
DRAWN = ("num_steps", "guidance_scale", "shift", "seed", "micro_batch")
"""Fields of drawing."""


class BenchmarkConfig(Section):
    """A benchmark of one generator, or of pictures made elsewhere."""

    benchmark: Literal["dreambench", "folder"] | None = None
    """dreambench: its folder or list of prompts (30 subjects, 750 prompts); folder: a data folder as training has."""
    data: Path | None = None
    """The benchmark's folder; with --run a data folder: the run's test, validation or training data if unset."""
    output: Path = Path("runs/benchmark")
    """Folder for pictures, scores and page; a benchmark begun there goes on, picture by picture."""
    images: Path | None = None
    """Folder of pictures made elsewhere, SUBJECT-NN.png or N_0.png in the benchmark's order: measured, none drawn."""
    adapter: Path | None = None
    """Folder of a run: its generator, as tuned. Unset: the generator that policy names, untuned."""
    ema: bool = False
    """Of a run the averaged weights (ema.decay), not those that training ended with."""
    policy: PolicyConfig = PolicyConfig()
    """The generator; with an adapter it is the run's, and this is left out."""
    identity_to: Literal["reference", "all"] = "reference"
    """Identity is the cosine to the reference that was drawn from (as the paper's script has it), or the mean over
    all pictures of the subject (DreamBooth's protocol)."""
    num_steps: int = Field(25, ge=1)
    """Denoising steps (paper: 25)."""
    guidance_scale: float | None = Field(None, ge=1)
    """Guidance scale; unset: 4 (paper), and for flux2-klein the pipeline's own. ToyBox has none."""
    shift: float | None = Field(None, gt=0)
    """Shift of the sigma schedule; unset: the generator's own schedule."""
    seed: int = Field(3407, ge=0, lt=2**64)
    """Seed of the noise (paper: 3407)."""
    micro_batch: int = Field(4, ge=1)
    """Pictures drawn at once: bounds memory, does not change the result."""
    hpsv3_as_published: bool = False
    """Score the first character of each prompt by HPSv3, as the script does whose figures are published."""
    metrics: MetricsConfig = MetricsConfig()
    """What pictures are measured by."""

    @model_validator(mode="after")
    def _one_source(self) -> "BenchmarkConfig":
        given = self.policy != PolicyConfig()
        if self.images is not None and (self.adapter is not None or given):
            raise ValueError("images: they are drawn already; leave adapter and policy out")
        usual = BenchmarkConfig.model_fields
        drawn = [name for name in DRAWN if getattr(self, name) != usual[name].default]
        if self.images is not None and drawn:
            raise ValueError(f"images: they are drawn already; leave {', '.join(drawn)} out")
        if self.adapter is not None and given:
            raise ValueError("policy: with an adapter it is the run's own; leave it out")
        if self.ema and (self.images is not None or given):
            raise ValueError("ema: only of a run; name it with adapter")
        if self.policy.pipeline.guidance_scale is not None:
            raise ValueError(
                "policy.pipeline.guidance_scale: a benchmark's is the field guidance_scale; leave this out"
            )
        if self.hpsv3_as_published and "hpsv3" not in self.metrics.names:
            raise ValueError("hpsv3_as_published: metrics.names has no hpsv3; add it, or leave this out")
        return self
