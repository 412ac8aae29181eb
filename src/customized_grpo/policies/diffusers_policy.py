"""A policy of a diffusers pipeline: its transformer gets LoRA factors, its encoders run once, ahead of training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from customized_grpo.algorithm import shift_sigmas
from customized_grpo.data.images import image_size, resize
from customized_grpo.distributed.env import local_rank
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.distributed.lockstep import LockstepForward
from customized_grpo.errors import UserError, first_line
from customized_grpo.io.files import writing
from customized_grpo.policies.checkpointing import enable_checkpointing
from customized_grpo.policies.conditions import ConditionCache, Planned, bytes_of_rows
from customized_grpo.policies.lora import add_lora, load_lora, save_lora
from customized_grpo.policies.lora_files import NAME
from customized_grpo.policies.pipelines.encoded import EncodedBatch, EncodedPrompt, UniformBatch
from customized_grpo.policies.pipelines.resolution import token_count
from customized_grpo.policies.pipelines.spec import PipelineSpec
from customized_grpo.policies.placement import How, Placement
from customized_grpo.policies.policy import Policy, PromptRow
from customized_grpo.types import PromptLengths, References

MOST_GRAPHS = 64
"""Of compiled blocks. torch's usual 8 do not reach: all blocks count as one function, and each kind is compiled again
with gradients and without, with the adapter and without, for one sample and for several. Beyond, blocks run
uncompiled."""


def plan_row(family: PipelineSpec, row: PromptRow, side: int | None) -> Planned:
    """Plan the encoding of `row`, from the headers of its pictures."""
    pictures = tuple(row.references)
    sizes = tuple(family.reference_size(*image_size(path), len(pictures), side) for path in pictures)
    return Planned(row.prompt, pictures, sizes)


@dataclass(frozen=True)
class Settings:
    """Settings of a diffusers policy, resolved for this machine."""

    device: torch.device
    size: tuple[int, int]
    lora_rank: int
    lora_alpha: int
    guidance: float | None = None
    reference_side: int | None = None
    offload: bool = False
    how: How = "whole"
    gradient_checkpointing: bool = True
    keep_every: int | None = None
    compile: bool = False
    attention_backend: str | None = None
    seed: int = 0


class DiffusersPolicy(Policy[EncodedBatch]):
    """A diffusers pipeline as a policy; latents are packed tokens [N, C]."""

    def __init__(self, family: PipelineSpec, pipe: Any, cache: ConditionCache, settings: Settings) -> None:
        """Wrap `pipe`, which is on the CPU. Raises `UserError` for guidance or an attention backend that it cannot
        use."""
        family.check_guidance(pipe, settings.guidance)
        self._family, self._pipe, self._cache, self._settings = family, pipe, cache, settings
        self._guidance = family.guidance if settings.guidance is None else settings.guidance
        self._transformer = pipe.transformer.eval()
        self._trainable = add_lora(
            pipe.transformer, family.lora_targets, settings.lora_rank, settings.lora_alpha, settings.seed
        )
        self._placement = Placement(
            pipe,
            family.text_encoders,
            [parameter for _, parameter in self._trainable],
            settings.device,
            how=settings.how,
            keep_encoders=settings.offload,
        )
        if settings.gradient_checkpointing:
            enable_checkpointing(self._transformer, settings.keep_every)
        if settings.attention_backend is not None:
            self._use_backend(settings.attention_backend)
        if settings.compile:
            self._transformer.compile_repeated_blocks(dynamic=True, recompile_limit=MOST_GRAPHS)
        # The processes run a sharded transformer together; a whole one each runs by itself.
        self._lockstep = LockstepForward(self._idle) if settings.how == "fsdp" else None

    @property
    def size(self) -> tuple[int, int]:
        """See `Policy.size`."""
        return self._settings.size

    @property
    def latent_shape(self) -> torch.Size:
        """See `Policy.latent_shape`: (N, C), a token for 16 x 16 pixels."""
        return torch.Size((token_count([self.size]), self._pipe.transformer.config.in_channels))

    @property
    def device(self) -> torch.device:
        """See `Policy.device`."""
        return self._settings.device

    @property
    def guided(self) -> bool:
        """Whether guidance takes a second pass, with a negative prompt, at every step."""
        return self._family.uses_cfg(self._pipe, self._guidance)

    def check(self, prompt: str, num_references: int) -> None:
        """See `Policy.check`."""
        most = self._family.max_references
        if num_references > most:
            raise UserError(f'this generator takes at most {most} references, not {num_references}; see "references"')

    def prompt_lengths(self, prompts: Sequence[str]) -> PromptLengths | None:
        """See `Policy.prompt_lengths`."""
        return self._family.prompt_lengths(self._pipe, prompts)

    def prepare_reference(self, picture: Tensor, count: int) -> Tensor:
        """See `Policy.prepare_reference`."""
        height, width = picture.shape[-2:]
        # The pipelines resize with Lanczos.
        size = self._family.reference_size(height, width, count, self._settings.reference_side)
        return resize(picture, size, "lanczos")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], references: References) -> EncodedBatch:
        """See `Policy.encode`; what was encoded before comes from the cache."""
        rows = [self._row(prompt, list(pictures)) for prompt, pictures in zip(prompts, references, strict=True)]
        return EncodedBatch(tuple(rows), torch.arange(len(rows)))

    @torch.no_grad()
    def precompute(
        self,
        rows: Sequence[PromptRow],
        references: Callable[[int], Sequence[Tensor]],
        share: Sequence[int],
        on_progress: Callable[[int], None],
    ) -> None:
        """See `Policy.precompute`: results go to the cache."""
        self._reserve(rows, references)
        for done, number in enumerate(share, start=1):
            self._encode(rows[number].prompt, references(number))
            on_progress(done)
        self._placement.release_encoders()

    def _reserve(self, rows: Sequence[PromptRow], references: Callable[[int], Sequence[Tensor]]) -> None:
        """Make room for `rows` in the cache. The first process of a machine does so; the others only check."""
        planned = [plan_row(self._family, row, self._settings.reference_side) for row in rows]
        needed = bytes_of_rows(
            self._family, self._transformer.config, self._pipe.vae.dtype, planned, guided=self.guided
        )
        if local_rank() > 0:
            self._cache.check(needed)
        else:
            self._cache.reserve(needed, lambda: ((row.prompt, references(number)) for number, row in enumerate(rows)))

    def sigmas(self, num_steps: int, shift: float | None) -> Tensor:
        """See `Policy.sigmas`."""
        if shift is None:
            return self._family.sigmas(self._pipe, num_steps, self.size)
        return shift_sigmas(num_steps, shift)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: EncodedBatch) -> Tensor:
        """See `Policy.velocity`. A sharded transformer runs within `lockstep` only."""
        self._placement.bring_transformer()
        compute = partial(self._velocity, latents, sigma, condition)
        if self._lockstep is None:
            return compute()
        return self._lockstep.forward(len(condition.batches(self.device)), compute)

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: EncodedBatch) -> Tensor:
        parts, places = [], []
        for batch in condition.batches(self.device):
            rows = batch.indices.to(latents.device)
            at = sigma[batch.indices.to(sigma.device)]
            part = self._family.velocity(self._transformer, latents[rows], at, batch, self.size, self._guidance)
            parts.append(part.float())
            places.append(rows)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def lockstep(self, ranks: DistributedGroup) -> AbstractContextManager[None]:
        """See `Policy.lockstep`."""
        return nullcontext() if self._lockstep is None else self._lockstep.phase(ranks)

    def _idle(self) -> Tensor:
        """Return a velocity that nothing uses: one image token with one small reference."""
        self._placement.bring_transformer()
        sizes = ((32, 32),)
        example = self._family.dummy_inputs(self._transformer.config, sizes, guided=self.guided)
        tensors = {
            name: torch.ones(1, *tensor.shape, dtype=self._pipe.vae.dtype, device=self.device)
            for name, tensor in example.items()
        }
        latents = torch.ones(1, 1, self.latent_shape[-1], device=self.device)
        half = torch.full((1,), 0.5, device=self.device)
        batch = UniformBatch(tensors, sizes, torch.zeros(1, dtype=torch.long))
        velocity = self._family.velocity(self._transformer, latents, half, batch, (16, 16), self._guidance)
        return velocity.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Policy.decode`."""
        self._placement.bring_transformer()
        images = self._family.decode(self._pipe, latents, self.size)
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def trainable_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """See `Policy.trainable_parameters`: the LoRA factors."""
        return self._trainable

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """See `Policy.base_weights`."""
        self._transformer.disable_adapters()
        try:
            yield
        finally:
            self._transformer.enable_adapters()

    def save_adapter(self, folder: Path) -> None:
        """See `Policy.save_adapter`: in diffusers' own format."""
        with writing(folder):
            save_lora(self._family.pipeline, self._transformer.peft_config[NAME], self._trainable, folder)

    def load_adapter(self, place: Path) -> None:
        """See `Policy.load_adapter`: a LoRA in any layout that is read (docs/adapters.md)."""
        load_lora(self._transformer, place)

    def _row(self, prompt: str, references: Sequence[Tensor]) -> EncodedPrompt:
        row = self._cache.read(prompt, references)
        if row is None:
            self._encode(prompt, references)
            row = self._cache.read(prompt, references)
        if row is None:
            raise UserError(
                f"policy.pipeline.cache: files go from {self._cache.folder} while it is in use; leave it alone"
            )
        return row

    def _encode(self, prompt: str, references: Sequence[Tensor]) -> None:
        """Leave in the cache what of a row is not there yet."""
        missing = self._cache.missing(prompt, references)
        if not missing:
            return
        # A negative prompt's part that is there already is not encoded again.
        guided = self.guided and self._family.depends_on["negative"] in missing
        with self._placement.encoding():
            encoded = self._family.encode(self._pipe, prompt, references, self.device, guided=guided)
            self._cache.write(prompt, references, {name: tensor.cpu() for name, tensor in encoded.tensors.items()})

    def _use_backend(self, name: str) -> None:
        try:
            self._transformer.set_attention_backend(name)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(
                f"policy.pipeline.attention_backend: '{name}' cannot be used: {first_line(error)}"
            ) from error
