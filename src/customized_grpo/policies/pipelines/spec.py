"""What one family of diffusers pipelines does in its own way; `diffusers_policy` makes a policy of it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from customized_grpo.policies.pipelines.encoded import EncodedPrompt, Inputs, Sizes, UniformBatch
from customized_grpo.types import PromptLengths


class PipelineSpec(Protocol):
    """A pipeline's tokens, position ids, schedule and guidance.

    N = H/16 * W/16 image tokens, S reference tokens, C channels of a packed latent.
    """

    pipeline: Any
    """Class of the pipeline, which loads it and knows the format of its LoRAs."""
    transformer: Any
    """Class of its transformer."""
    pipeline_names: tuple[str, ...]
    """Names of pipeline classes whose folders hold the parts."""
    text_encoders: tuple[str, ...]
    """Names of the parts that are let go once all prompts are encoded."""
    lora_targets: str
    """Regular expression of the names of the linear layers that get LoRA factors."""
    depends_on: Mapping[str, Inputs]
    """For each tensor of a row what it depends on: what rows share is encoded, kept and read once. The tensor named
    "negative" is of guided rows alone."""
    max_references: int
    guidance: float
    """Used where the configuration gives none."""

    def load_components(self, folder: str) -> dict[str, Any]:
        """Load the parts of the pipeline that its class would not load as needed here."""
        ...

    def check_guidance(self, pipe: Any, guidance: float | None) -> None:
        """Raise `UserError` for guidance that would have no effect."""
        ...

    def uses_cfg(self, pipe: Any, guidance: float) -> bool:
        """Return whether `guidance` takes a second pass, with a negative prompt, at every step."""
        ...

    def reference_size(self, height: int, width: int, count: int, side: int | None) -> tuple[int, int]:
        """Return the size in which a picture of `height` x `width` is seen as one of `count` references; `side`: what
        the configuration asks for."""
        ...

    def prompt_lengths(self, pipe: Any, prompts: Sequence[str]) -> PromptLengths | None:
        """Return the lengths of `prompts` as the encoder of the transformer's text tokens gets them; None where it
        reads the whole."""
        ...

    def encode(
        self, pipe: Any, prompt: str, references: Sequence[Tensor], device: torch.device, *, guided: bool
    ) -> EncodedPrompt:
        """Encode one prompt and its references [3, h, w] in [0, 1]; `guided`: also a negative prompt, as "negative"."""
        ...

    def dummy_inputs(self, config: Any, sizes: Sizes, *, guided: bool) -> dict[str, Tensor]:
        """Return tensors of a row of a common length, on the meta device.

        They look like the result of `encode` for references of `sizes` and a transformer of `config`.
        """
        ...

    def sigmas(self, pipe: Any, num_steps: int, size: tuple[int, int]) -> Tensor:
        """Return the pipeline's own schedule [num_steps + 1] for images of (height, width) `size`."""
        ...

    def velocity(
        self,
        transformer: Any,
        latents: Tensor,
        sigma: Tensor,
        batch: UniformBatch,
        size: tuple[int, int],
        guidance: float,
    ) -> Tensor:
        """Predict the velocity [b, N, C] of `latents` [b, N, C] at `sigma` [b], guidance included."""
        ...

    def decode(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Decode packed latents [b, N, C] to images [b, 3, H, W], about [-1, 1]."""
        ...
