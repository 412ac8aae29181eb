"""The ToyBox generator as a policy: LoRA factors or the whole denoiser are trained, the context tower never is."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from customized_grpo.algorithm import shift_sigmas
from customized_grpo.data.images import resize_square
from customized_grpo.errors import UserError
from customized_grpo.io.files import save_tensors, writing
from customized_grpo.io.tensors import mismatch
from customized_grpo.policies.lora_files import METADATA, adapter_file, header_settings, read_tensors, saved_name
from customized_grpo.policies.policy import Policy
from customized_grpo.runtime.device import resolve_precision
from customized_grpo.toybox.drawing import SIZE
from customized_grpo.toybox.language import tokenize, words_of
from customized_grpo.toybox.network import Context, Denoiser, Generator
from customized_grpo.toybox.weights import load_network
from customized_grpo.types import References

LORA_TARGETS = ["qkv", "out", "up", "down", "modulation"]
OWN_SHIFT = 2.0
"""Shift of the times that pre-training drew."""
ADAPTER_FILE = "adapter_model.safetensors"


class OneProduct(LoraLinear):
    """A LoRA layer that multiplies once, by its weight plus the product of its factors.

    PEFT's own multiplies three times, and keeps more for the backward pass. For fp32 alone: bf16 would round a small
    update away in the sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base_layer
        if self.disable_adapters:
            return F.linear(x, base.weight, base.bias)
        (name,) = self.active_adapters
        up, down = self.lora_B[name].get_parameter("weight"), self.lora_A[name].get_parameter("weight")
        return F.linear(x, torch.addmm(base.weight, up, down, alpha=self.scaling[name]), base.bias)


class ToyBoxPolicy(Policy[Context]):
    """A policy whose latents are the pixels [3, 32, 32] in [-1, 1].

    Its encoder is small, reads all of every prompt that `check` accepts, and each process has the whole generator: so
    `precompute`, `prompt_lengths` and `lockstep` do nothing, as in `Policy`.
    """

    size = (SIZE, SIZE)
    device = torch.device("cpu")
    latent_shape = torch.Size((3, SIZE, SIZE))

    def __init__(
        self,
        generator: Generator,
        *,
        adapter: Literal["lora", "full"] = "lora",
        lora_rank: int = 32,
        lora_alpha: int = 32,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        seed: int = 0,
    ) -> None:
        """`seed` draws the LoRA factors' starting point, at which they change nothing."""
        self._context = generator.context.requires_grad_(False)
        self._base = generator.denoiser.requires_grad_(False)
        self._autocast = resolve_precision(precision) == "bf16"
        self._lora = (lora_rank, lora_alpha) if adapter == "lora" else None
        self._tuned: Denoiser | PeftModel
        if adapter == "lora":
            config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=LORA_TARGETS)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._tuned = get_peft_model(self._base, config)
            for layer in self._tuned.modules() if not self._autocast else ():
                if type(layer) is LoraLinear:
                    layer.__class__ = OneProduct
        else:
            self._tuned = copy.deepcopy(self._base).requires_grad_(True)
        self._active: nn.Module = self._tuned

    @classmethod
    def load(cls, weights: Path | None = None, **settings: object) -> "ToyBoxPolicy":
        """Load the shipped generator, or the one in the folder `weights`; `settings` as for the constructor."""
        return cls(load_network(Generator(), "generator", weights), **settings)  # type: ignore[arg-type]

    def check(self, prompt: str, num_references: int) -> None:
        """See `Policy.check`: words of its vocabulary, and one reference."""
        words_of(prompt)
        if num_references != 1:
            raise UserError(f'ToyBox takes one reference image, not {num_references}; leave one in "references"')

    def prepare_reference(self, picture: Tensor, count: int) -> Tensor:
        """See `Policy.prepare_reference`: the square at its centre, 32 x 32."""
        return resize_square(picture, SIZE)

    def encode(self, prompts: Sequence[str], references: References) -> Context:
        """See `Policy.encode`; one reference [3, 32, 32] each."""
        pictures = torch.stack([row[0] for row in references])
        with torch.no_grad(), self._precision():
            context: Context = self._context(tokenize(prompts), pictures * 2 - 1)
        return context

    def sigmas(self, num_steps: int, shift: float | None) -> Tensor:
        """See `Policy.sigmas`."""
        return shift_sigmas(num_steps, OWN_SHIFT if shift is None else shift)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Context) -> Tensor:
        """See `Policy.velocity`."""
        with self._precision():
            velocity: Tensor = self._active(latents, sigma, condition)
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        """See `Policy.decode`."""
        return (latents / 2 + 0.5).clamp(0, 1)

    def trainable_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """See `Policy.trainable_parameters`."""
        return [(name, p) for name, p in self._tuned.named_parameters() if p.requires_grad]

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """The context tower, and the denoiser with its tuned weights."""
        return self._context, self._tuned

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """See `Policy.base_weights`."""
        if isinstance(self._tuned, PeftModel):
            with self._tuned.disable_adapter():
                yield
        else:
            self._active = self._base
            try:
                yield
            finally:
                self._active = self._tuned

    def save_adapter(self, folder: Path) -> None:
        """See `Policy.save_adapter`: PEFT's file for LoRA, the denoiser's state otherwise."""
        save_weights(self.trainable_parameters(), folder, self._lora)

    def load_adapter(self, place: Path) -> None:
        """See `Policy.load_adapter`."""
        path = adapter_file(place, [ADAPTER_FILE])
        own = {saved_name(name): parameter for name, parameter in self.trainable_parameters()}
        state, header = read_tensors(path)
        wrong = mismatch(state, own)
        alpha = header_settings(path, header).get("lora_alpha")
        if not wrong and self._lora and alpha not in (None, self._lora[1]):
            wrong = f"its alpha is {alpha}, expected {self._lora[1]}"
        if wrong:
            raise UserError(
                f"{path}: this adapter does not fit the policy of the configuration ({wrong}); set "
                f"{_settings_of(state, alpha)}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._autocast)


def save_weights(parameters: Iterable[tuple[str, Tensor]], folder: Path, lora: tuple[int, int] | None) -> None:
    """Write an adapter of trained `parameters` into `folder`; `lora`: rank and alpha, None for whole weights."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    header = None if lora is None else {METADATA: json.dumps({"r": lora[0], "lora_alpha": lora[1]})}
    save_tensors({saved_name(name): tensor for name, tensor in parameters}, folder / ADAPTER_FILE, header)


def _settings_of(state: Mapping[str, Tensor], alpha: int | None) -> str:
    """Return the settings of a policy that an adapter of the tensors `state` fits."""
    ranks = {len(tensor) for name, tensor in state.items() if name.endswith(".lora_A.weight")}
    if not ranks:
        return "policy.toybox.adapter=full, and policy.toybox.weights to those that it was trained from"
    told = "" if alpha is None else f", policy.lora_alpha={alpha}"
    return f"policy.toybox.adapter=lora, policy.lora_rank={max(ranks)}{told}"
