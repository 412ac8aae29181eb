"""What a run will take, before it is started: parameters, operations by phase, memory.

Operations are counted, not guessed: the generator runs a micro-batch forwards and backwards under torch's counter; a
large one on the meta device, without weights. So are the tensors that are there at once; not what an allocator adds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from customized_grpo.config.run import Config
from customized_grpo.policies.policy import Policy
from customized_grpo.training.objectives import build_objective
from customized_grpo.training.optimizer import NUMBER_BYTES, moment_bytes
from customized_grpo.training.rollout import plan_steps


@dataclass(frozen=True)
class Estimate:
    """What an iteration takes. FLOPs are by phase; memory is in bytes, on the generator's device; disk in bytes."""

    parameters: int
    trainable: int
    flops: dict[str, float]
    recomputed: float
    """FLOPs, of those of the update, that compute activations again."""
    memory: dict[str, float]
    """What of the generator is there from the first iteration to the last, by what it holds."""
    phases: dict[str, dict[str, float]]
    """What comes on top of it in each phase. Phases follow one another, so their memory does not add up."""
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    """What of the generator is there in each phase before the first iteration."""
    scores: dict[str, float] = field(default_factory=dict)
    """What rewards and metrics hold all the time."""
    host: dict[str, float] = field(default_factory=dict)
    """Bytes of the host's memory in the first process, by what they hold."""
    disk: dict[str, float] = field(default_factory=dict)
    """By what it holds, at its largest."""
    not_counted: tuple[str, ...] = ()
    """What else takes memory or disk, but is not known."""

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes of memory that are there at once, by phase."""
        scores, always = sum(self.scores.values()), sum(self.memory.values())
        return {phase: scores + sum(held.values()) for phase, held in self.before.items()} | {
            phase: scores + always + sum(top.values()) for phase, top in self.phases.items()
        }

    @property
    def peak_bytes(self) -> float:
        """Bytes of memory in the phase that needs the most."""
        return max(self.peaks.values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs the most memory."""
        return max(self.peaks, key=self.peaks.__getitem__)

    def rows(self) -> dict[str, str]:
        """Return names and values for people."""
        return {
            "parameters of the generator": _count(self.parameters),
            "trained": f"{_count(self.trainable)} ({self.trainable / self.parameters:.2%})",
            **{f"operations an iteration, {phase}": _scaled(value, "FLOP") for phase, value in self.flops.items()},
            "operations an iteration": _scaled(sum(self.flops.values()), "FLOP"),
            **{f"memory, {what}": _scaled(value, "B", 1024) for what, value in (self.memory | self.scores).items()},
            **{
                f"memory in the {phase}, {what}": _scaled(value, "B", 1024)
                for phase, top in (self.before | self.phases).items()
                for what, value in top.items()
            },
            **{f"peak memory in the {phase}": _scaled(value, "B", 1024) for phase, value in self.peaks.items()},
            "expected peak memory": f"{_scaled(self.peak_bytes, 'B', 1024)}, in the {self.peak_phase}",
            **{f"host memory, {what}": _scaled(value, "B", 1024) for what, value in self.host.items()},
            **{f"disk, {what}": _scaled(value, "B") for what, value in self.disk.items()},
            **{f"not counted ({number})": what for number, what in enumerate(self.not_counted, 1)},
        }


@dataclass(frozen=True)
class ProfileTarget:
    """What is measured: a policy, its network, and conditions of so many samples, as long as those of training."""

    policy: Policy[Any]
    network: nn.Module
    condition: Callable[[int], Any]
    weight_bytes: float
    """All that stays in memory through training but the trained parameters."""
    checkpoint: Callable[[], float] | None = None
    """Has the network compute activations again in the backward pass, and returns the share of the forward pass that
    is done again; None: it keeps all."""
    restored_bytes: float = 0.0
    """The largest weight that a layer restores from its quantized form, one at a time."""
    fused_tokens: int = 0
    """Length of the sequences whose attention is fused where the network really runs, though not where it is measured:
    no matrix of all pairs of tokens is kept then. 0: what is measured is what runs."""


def estimate(config: Config, subject: ProfileTarget, processes: int = 1) -> Estimate:
    """Estimate one iteration on the process with the most groups, and the disk that checkpoints take.

    Rewards are not counted: see `factory.footprint`.
    """
    rollout, policy = config.rollout, subject.policy
    plan = plan_steps(rollout, policy.sigmas(rollout.num_steps, rollout.shift), config.seed, 0)
    prompts = -(-rollout.prompts_per_iteration // processes)
    images = prompts * rollout.group_size
    shared = plan.num_prefix_steps if rollout.same_initial_noise else 0
    num_forward_evals = prompts * shared + images * (rollout.num_steps - shared)
    objective = build_objective(config)
    items = images * objective.num_passes(plan)
    measured = _measure(subject, min(rollout.micro_batch, images), min(config.optimizer.micro_batch, items))
    extra_forwards = measured.recomputed + objective.reference_forwards
    an_item = measured.update_flops + extra_forwards * measured.forward_flops
    parameters = [parameter for _, parameter in policy.trainable_parameters()]
    trained = sum(parameter.numel() for parameter in parameters)
    lora = config.policy.toybox.adapter == "lora"
    trajectories = 2.0 * items * measured.latent_bytes
    pictures = float(images * measured.image_bytes)
    # While the averaged parameters stand in for the trained ones, these are kept.
    swapped = config.ema.decay is not None and config.ema.evaluate
    evaluation = {
        "copy of the trained parameters": float(NUMBER_BYTES * trained),
        "activations of a micro-batch": measured.drawing_peak,
    }
    disk = checkpoint_disk(config, policy.trainable_parameters())
    return Estimate(
        parameters=sum(p.numel() for p in subject.network.parameters()) - (trained if lora else 0),
        trainable=trained,
        flops={
            "rollout": float(num_forward_evals * measured.forward_flops),
            "decoding": float(images * measured.decoding_flops),
            "update": float(items * an_item),
        },
        recomputed=items * measured.recomputed * measured.forward_flops,
        memory={
            "frozen weights": subject.weight_bytes,
            **({"a restored weight": subject.restored_bytes} if subject.restored_bytes else {}),
            "trained parameters and moments": NUMBER_BYTES * trained + moment_bytes(config.optimizer, parameters),
            **({} if config.ema.decay is None else {"averaged parameters": float(NUMBER_BYTES * trained)}),
        },
        phases={
            "rollout": {
                "trajectories": trajectories,
                "pictures": pictures,
                "activations of a micro-batch": measured.drawing_peak,
            },
            "decoding": {
                "trajectories": trajectories,
                "pictures": pictures,
                "activations of a micro-batch": measured.decoding_peak,
            },
            "update": {
                "trajectories": trajectories,
                "pictures": pictures,
                "gradients": float(NUMBER_BYTES * trained),
                "activations of a micro-batch": measured.update_peak,
            },
            **({"evaluation": evaluation} if swapped else {}),
        },
        host={"copy of the last whole iteration": disk["a checkpoint"]},
        disk=disk,
    )


@dataclass(frozen=True)
class _Measured:
    """Operations and bytes of one sample, and the most bytes that a micro-batch makes at once, by what is done."""

    forward_flops: int
    update_flops: int
    decoding_flops: int
    latent_bytes: int
    image_bytes: int
    drawing_peak: float
    decoding_peak: float
    update_peak: float
    """Without the gradients of the trained parameters."""
    recomputed: float
    """Share of the forward pass that the backward pass does again."""


def _measure(subject: ProfileTarget, drawn: int, learned: int) -> _Measured:
    """Run `drawn` samples forwards and through the decoder, and `learned` forwards and backwards; and count."""
    policy = subject.policy
    latents = torch.zeros(drawn, *policy.latent_shape, device=policy.device)
    sigma = torch.full((drawn,), 0.5, device=policy.device)
    drawing, painting, learning = LivePeak(subject.fused_tokens), LivePeak(), LivePeak(subject.fused_tokens)
    with FlopCounterMode(display=False) as forward, torch.no_grad(), drawing:
        policy.velocity(latents, sigma, subject.condition(drawn))
    with FlopCounterMode(display=False) as decoding, torch.no_grad(), painting:
        image_bytes = policy.decode(latents).nbytes
    for _, parameter in policy.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)  # as after the first micro-batch
    with FlopCounterMode(display=False) as update:
        _learn(subject, 1)
    recomputed = 0.0 if subject.checkpoint is None else subject.checkpoint()
    with learning:
        _learn(subject, learned)
    subject.network.zero_grad()
    return _Measured(
        forward.get_total_flops() // drawn,
        update.get_total_flops(),
        decoding.get_total_flops() // drawn,
        latents.nbytes // drawn,
        image_bytes // drawn,
        drawing.peak,
        painting.peak,
        learning.peak,
        recomputed,
    )


def _learn(subject: ProfileTarget, count: int) -> None:
    """Predict velocities of `count` samples, and go backwards from them."""
    policy = subject.policy
    latents = torch.zeros(count, *policy.latent_shape, device=policy.device)
    sigma = torch.full((count,), 0.5, device=policy.device)
    policy.velocity(latents, sigma, subject.condition(count)).square().mean().backward()


def checkpoint_disk(config: Config, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Return bytes of a checkpoint, which has the trained `parameters`, their moments and their average, and of all
    that are there at once: the newest of those that are kept is written before the oldest goes."""
    found = list(parameters)
    kept = 1 if config.ema.decay is None else 2
    weights = NUMBER_BYTES * sum(parameter.numel() for _, parameter in found)
    # A step count for each parameter; in the header, for each tensor, about 80 bytes beside its name.
    beside = 3 if config.optimizer.kind == "adamw" else 5
    header = sum(8 + (kept + beside) * (80 + len(name)) for name, _ in found)
    one = kept * weights + moment_bytes(config.optimizer, [parameter for _, parameter in found]) + header
    settings, last = config.checkpoint, config.iterations
    made = -(-last // settings.every)
    for_good = last // settings.keep_every if settings.keep_every else 0
    count = min(made, settings.keep_last + 1 + for_good)
    # The last one, the averaged one where it is kept, and the best validation's.
    adapters = float((kept + (config.select is not None)) * weights)
    return {"a checkpoint": one, f"at most {count} checkpoints": count * one, "adapters at the end": adapters}


class LivePeak(TorchDispatchMode):
    """The most bytes of tensors that are there at once of those made within, on any device, the meta device too.

    What was there before does not count, nor what views of it take.
    """

    def __init__(self, fused_tokens: int = 0) -> None:
        """Count operations. `fused_tokens`: matrices of all pairs of so many tokens do not count; see
        `ProfileTarget`."""
        super().__init__()
        self.peak = 0
        self._fused_tokens, self._now = fused_tokens, 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor, given)
        return result

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = _storage(tensor)
        if storage not in self._holders:
            length = self._fused_tokens
            if storage in given or (length and tensor.shape[-2:] == (length, length)):
                return
            self._now += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self._now)
        self._holders[storage] = self._holders.get(storage, 0) + 1
        finalize(tensor, self._drop, storage, tensor.untyped_storage().nbytes())

    def _drop(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        if self._holders[storage] == 0:
            del self._holders[storage]
            self._now -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _scaled(value: float, unit: str, step: int = 1000) -> str:
    prefixes = ("", "Ki", "Mi", "Gi", "Ti") if step == 1024 else ("", "k", "M", "G", "T", "P", "E")
    index = 0
    while value >= step and index < len(prefixes) - 1:
        value, index = value / step, index + 1
    return f"{value:.1f} {prefixes[index]}{unit}"
