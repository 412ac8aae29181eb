"""Frozen weights in 8 or 4 bits, so that a generator of billions of parameters trains on one small GPU.

int8: integers with a scale for each output channel; fp8: floats (e4m3), the same; nf4: 4 bits with a scale for 64
numbers, as in QLoRA (arXiv 2305.14314). Weights alone are quantized: a layer restores them as it multiplies, in the
precision of what comes in. Layers outside of the repeated blocks (embedders, the last projection) keep theirs.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from customized_grpo.config.policy import Quantization
from customized_grpo.errors import UserError

LIBRARY = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
EXTRA = "customized-grpo[quantization]"
BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 1 / 64 * 4}
"""Of a quantized weight: nf4 keeps a fp32 scale for every 64 numbers."""
SCALE_BYTES = {"int8": 5, "fp8": 4, "nf4": 0}
"""Of an output channel: its scale, and for int8 its zero point."""


def check_quantization(kind: Quantization, field: str) -> None:
    """Raise `UserError` where the library that quantizes to `kind` is missing; `field` is named in the message."""
    if kind != "none" and importlib.util.find_spec(LIBRARY[kind]) is None:
        raise UserError(f"{field}: {kind} takes {LIBRARY[kind]}, which is not installed: pip install '{EXTRA}'")


def layers_to_quantize(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model's repeated blocks by name; of a model without named blocks, of its lists.

    LoRA factors are left out.
    """
    repeated = getattr(model, "_repeated_blocks", None)
    blocks = [
        (name, module)
        for name, module in model.named_modules()
        if (type(module).__name__ in repeated if repeated else isinstance(module, nn.ModuleList))
    ]
    return {
        f"{block}.{name}": layer
        for block, module in blocks
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and "lora_" not in name
    }


@torch.no_grad()
def quantize(model: nn.Module, kind: Quantization, field: str) -> None:
    """Quantize the layers of `layers_to_quantize` in place, on the device where they are.

    "none" leaves weights as they were saved; layers that were saved quantized are made ready for training all the same.
    Raises `UserError` where the library is missing, and for a model that is quantized already; the messages name
    `field`.
    """
    if kind != "none":
        check_quantization(kind, field)
        if is_quantized(model):
            raise UserError(f"{field}: the weights are quantized already; leave it out, or name a model that is not")
        layers = layers_to_quantize(model)
        if kind == "nf4":
            for name, layer in layers.items():
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, _nf4(layer))
        else:
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

            config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
            quantize_(model, config, filter_fn=lambda layer, name: name in layers)
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight.data) is not Tensor:
            module.__class__ = RestoringLinear
        elif hasattr(module, "support_avx512bf16_for_cpu"):
            # Where a CPU multiplies in bf16, bitsandbytes packs 4-bit weights anew for passes without gradients, and
            # rounds their scales: a rollout and its update would use two models.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


class RestoringLinear(nn.Linear):
    """A linear layer whose weight is frozen and in 8 bits, and whose backward pass restores it again.

    torch's own keeps the restored weight for the backward pass, and so needs as much memory as without quantization.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute input [*, in] times the weight, plus the bias: [*, out]."""
        product: Tensor = _RestoringProduct.apply(input, self.weight)
        return product if self.bias is None else product + self.bias


class _RestoringProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.weight.dequantize().to(gradient.dtype), None


def is_quantized(model: nn.Module) -> bool:
    """Return whether a weight of `model` is kept in another form than a plain floating-point tensor."""
    return any(
        type(parameter.data) is not torch.Tensor or not parameter.is_floating_point()
        for parameter in model.parameters()
    )


def saved_bytes(model: nn.Module, kind: Quantization) -> float:
    """Return by how many bytes quantizing to `kind` makes `model` smaller."""
    if kind == "none":
        return 0.0
    layers = layers_to_quantize(model).values()
    return float(
        sum(
            layer.weight.nbytes - BYTES[kind] * layer.weight.numel() - SCALE_BYTES[kind] * layer.out_features
            for layer in layers
        )
    )


def restored_bytes(model: nn.Module, kind: Quantization) -> float:
    """Return the most bytes that a restored weight takes, of a model that is to be quantized to `kind`."""
    layers = {} if kind == "none" else layers_to_quantize(model)
    return float(max((layer.weight.nbytes for layer in layers.values()), default=0))


def _nf4(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    device, dtype = layer.weight.device, layer.weight.dtype
    made = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    made.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    quantized: nn.Module = made.to(device)
    return quantized
