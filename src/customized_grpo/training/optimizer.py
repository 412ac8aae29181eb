"""The optimizer of the trained parameters: AdamW, whose moments take 32 bits or 8 (arXiv 2110.02861)."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from customized_grpo.config.training import OptimizerConfig
from customized_grpo.errors import UserError

NUMBER_BYTES = 4
"""Of a trained parameter, its gradient, its average and a moment in 32 bits: all fp32."""
SMALLEST_8BIT = 4096
"""Numbers of a parameter from which its moments take 8 bits."""
BLOCK = 256
"""8-bit numbers that share a scale in bitsandbytes."""
CONSTANT = {"qmap1", "qmap2"}
"""What bitsandbytes keeps of each parameter though it never changes: the values that 8 bits stand for."""


def check_optimizer(settings: OptimizerConfig, device: torch.device) -> None:
    """Raise `UserError` where the optimizer wants a library that is missing, or has no kernel for `device`."""
    if settings.kind == "adamw":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optimizer.kind: adamw_8bit takes bitsandbytes, which is not installed: pip install "
            "'customized-grpo[quantization]'"
        )
    if device.type not in ("cuda", "xpu", "cpu"):
        raise UserError(f"optimizer.kind: adamw_8bit runs on cuda, xpu and cpu, not on {device.type}; use adamw")


def build_optimizer(settings: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer of `parameters`, which are on one device.

    Raises what `check_optimizer` does.
    """
    device = parameters[0].device
    check_optimizer(settings, device)
    if settings.kind == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            # On a GPU the usual way makes a copy as large as the weights at every step.
            fused=True if device.type == "cuda" else None,
        )
    from bitsandbytes.optim import AdamW8bit

    made: Any = AdamW8bit(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        min_8bit_size=SMALLEST_8BIT,
    )
    for index, parameter in enumerate(parameters):
        # Now rather than in the first step: a checkpoint is held against what is there.
        made.init_state(made.param_groups[0], parameter, 0, index)
    optimizer: torch.optim.Optimizer = made
    return optimizer


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return what changes of the optimizer's state of a parameter, by name; AdamW has none before its first step."""
    state = optimizer.state.get(parameter, {})
    return {name: torch.as_tensor(value) for name, value in state.items() if name not in CONSTANT}


def moment_like(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return tensors of the names, shapes and types that `moments` has after a step."""
    return moments(optimizer, parameter) or {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}


def restore_moments(optimizer: torch.optim.Optimizer, found: Sequence[dict[str, Tensor]]) -> None:
    """Take over what `moments` gave of each parameter, in order; nothing of a parameter: as before the first step."""
    state = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, (parameter, changed) in enumerate(zip(parameters, found, strict=True)):
        if changed:
            own = optimizer.state.get(parameter, {})
            state[index] = dict(own) | {
                # Copies: the file that they are mapped from may be removed, and some disks keep it while it is open.
                name: value.item()
                if isinstance(own.get(name), int)
                else value.to("cpu" if name == "step" else parameter.device, copy=True)
                for name, value in changed.items()
            }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def moment_bytes(settings: OptimizerConfig, parameters: Sequence[Tensor]) -> float:
    """Return the bytes of both moments of `parameters`."""

    def of_one(numbers: int) -> float:
        if settings.kind == "adamw" or numbers < SMALLEST_8BIT:
            return 2.0 * NUMBER_BYTES * numbers
        return 2.0 * (numbers + NUMBER_BYTES * -(-numbers // BLOCK))

    return sum(of_one(parameter.numel()) for parameter in parameters)
