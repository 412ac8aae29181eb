"""What a run will take, before it is started: parameters, operations by phase, memory.

Operations are counted, not guessed: the generator runs once, forwards and backwards, under torch's counter; a large one
on the meta device, without weights. Memory is an estimate: what must be there at once, not what an allocator adds.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from customized_grpo.config import Config
from customized_grpo.policies import Policy
from customized_grpo.rollout import plan_steps

ADAM_BYTES = 16
"""Of a trained parameter in fp32: itself, its gradient and two moments."""


@dataclass(frozen=True)
class Estimate:
    """FLOPs are of one iteration, by phase; bytes of memory on the generator's device, by what they hold."""

    parameters: int
    trainable: int
    flops: dict[str, float]
    recomputed: float
    """FLOPs, of those of the update, that compute activations again."""
    memory: dict[str, float]

    @property
    def peak_bytes(self) -> float:
        """All that is there at once in the update, which needs the most."""
        return sum(self.memory.values())

    def rows(self) -> dict[str, str]:
        """Names and values, as a person reads them."""
        return {
            "parameters of the generator": _count(self.parameters),
            "trained": f"{_count(self.trainable)} ({self.trainable / self.parameters:.2%})",
            **{f"operations an iteration, {phase}": _scaled(value, "FLOP") for phase, value in self.flops.items()},
            "operations an iteration": _scaled(sum(self.flops.values()), "FLOP"),
            **{f"memory, {what}": _scaled(value, "B", 1024) for what, value in self.memory.items()},
            "expected peak memory": _scaled(self.peak_bytes, "B", 1024),
        }


@dataclass(frozen=True)
class Subject:
    """What is measured: a policy, its network, and a condition of one row, as long as those of training."""

    policy: Policy[Any]
    network: nn.Module
    condition: Any
    weight_bytes: float
    """All that stays in memory through training but the trained parameters."""
    checkpointed: int = 0
    """Blocks whose activations are computed again in the backward pass; the network itself must keep them here."""
    block_input_bytes: float = 0.0
    """What a checkpointed block keeps of one sample."""
    fused_tokens: int = 0
    """Length of the sequences whose attention is fused where the network really runs, though not where it is measured:
    no matrix of all pairs of tokens is kept then. 0: what is measured is what runs."""


def estimate(config: Config, subject: Subject, processes: int = 1) -> Estimate:
    """What an iteration of `config` takes of that one of its `processes` which has the most groups. Scoring is not
    counted: it depends on the rewards alone."""
    rollout, policy = config.rollout, subject.policy
    latents = torch.zeros(1, *policy.latent_shape, device=policy.device)
    sigma = torch.full((1,), 0.5, device=policy.device)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        policy.velocity(latents, sigma, subject.condition)
    with FlopCounterMode(display=False) as both:
        kept, output = _kept_for_backward(subject, latents, sigma)
        output.square().mean().backward()
    with FlopCounterMode(display=False) as decoding, torch.no_grad():
        policy.decode(latents)
    subject.network.zero_grad()
    if subject.checkpointed:
        # The input of every block, and all that the one keeps which is being computed again.
        kept = kept / subject.checkpointed + subject.checkpointed * subject.block_input_bytes

    plan = plan_steps(rollout, policy.sigmas(rollout.num_steps, rollout.shift), config.seed, 0)
    prompts = -(-rollout.prompts_per_iteration // processes)
    images = prompts * rollout.group_size
    shared = plan.shared_steps if rollout.initial_noise == "shared" else 0
    forwards = prompts * shared + images * (rollout.num_steps - shared)
    extra_forwards = bool(subject.checkpointed) + (config.objective.kl_weight > 0)
    an_item = both.get_total_flops() + extra_forwards * forward.get_total_flops()
    items = images * len(plan.trained)
    trained = sum(parameter.numel() for _, parameter in policy.trainable_parameters())
    lora = config.policy.adapter == "lora"
    return Estimate(
        parameters=sum(p.numel() for p in subject.network.parameters()) - (trained if lora else 0),
        trainable=trained,
        flops={
            "rollout": float(forwards * forward.get_total_flops()),
            "decoding": float(images * decoding.get_total_flops()),
            "update": float(items * an_item),
        },
        recomputed=float(items * bool(subject.checkpointed) * forward.get_total_flops()),
        memory={
            "frozen weights": subject.weight_bytes,
            "trained parameters, gradients, moments": float(ADAM_BYTES * trained),
            "trajectories": 2.0 * items * latents.nbytes,
            "activations of a micro-batch": kept * min(config.optimizer.micro_batch, items),
        },
    )


def _kept_for_backward(subject: Subject, latents: Tensor, sigma: Tensor) -> tuple[float, Tensor]:
    """Bytes that autograd keeps of the forward pass of one sample, weights left out, and its output."""
    weights = {parameter.untyped_storage()._cdata for parameter in subject.network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage, length = tensor.untyped_storage(), subject.fused_tokens
        pairs = length > 0 and tensor.shape[-2:] == (length, length)
        if storage._cdata not in weights and not pairs:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = subject.policy.velocity(latents, sigma, subject.condition)
    return float(sum(kept.values())), output


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _scaled(value: float, unit: str, step: int = 1000) -> str:
    prefixes = ("", "Ki", "Mi", "Gi", "Ti") if step == 1024 else ("", "k", "M", "G", "T", "P", "E")
    index = 0
    while value >= step and index < len(prefixes) - 1:
        value, index = value / step, index + 1
    return f"{value:.1f} {prefixes[index]}{unit}"
