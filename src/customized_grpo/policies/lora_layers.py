"""Putting the factors of a LoRA file where they belong in a diffusers transformer, and merging them there."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from customized_grpo.errors import UserError, truncated
from customized_grpo.policies.lora_files import Factors, LoraFile

_QKV, _ADDED_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
FIRST_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "double_blocks.img_attn.qkv": (_QKV,),
    "double_blocks.txt_attn.qkv": (_ADDED_QKV,),
    "double_blocks.img_attn.proj": (("attn.to_out.0",),),
    "double_blocks.txt_attn.proj": (("attn.to_add_out",),),
    "double_blocks.img_mlp.0": (("ff.net.0.proj",), ("ff.linear_in",)),
    "double_blocks.img_mlp.2": (("ff.net.2",), ("ff.linear_out",)),
    "double_blocks.txt_mlp.0": (("ff_context.net.0.proj",), ("ff_context.linear_in",)),
    "double_blocks.txt_mlp.2": (("ff_context.net.2",), ("ff_context.linear_out",)),
    "double_blocks.img_mod.lin": (("norm1.linear",),),
    "double_blocks.txt_mod.lin": (("norm1_context.linear",),),
    "double_blocks.processor.qkv_lora1": (_QKV,),
    "double_blocks.processor.qkv_lora2": (_ADDED_QKV,),
    "double_blocks.processor.proj_lora1": (("attn.to_out.0",),),
    "double_blocks.processor.proj_lora2": (("attn.to_add_out",),),
    "single_blocks.linear1": ((*_QKV, "proj_mlp"), ("attn.to_qkv_mlp_proj",)),
    "single_blocks.linear2": (("proj_out",), ("attn.to_out",)),
    "single_blocks.modulation.lin": (("norm.linear",),),
    "single_blocks.processor.qkv_lora": (_QKV,),
    "single_blocks.processor.proj_lora": (("proj_out",),),
}
"""Layers of a block in the names of FLUX's first release, and of UNO's and XLabs' processors, to those that they are in
diffusers (of FLUX.1, and of FLUX.2): the rows of one are those of the others, one after the other."""
OUTSIDE_OF_BLOCKS: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
} | {
    f"{first}_in.{place}_layer": tuple(
        f"{part}.{ours}_embedder.linear_{number}" for part in ("time_text_embed", "time_guidance_embed")
    )
    for first, ours in (("time", "timestep"), ("guidance", "guidance"))
    for place, number in (("in", 1), ("out", 2))
}
"""The same for the other layers. The last norm's is left out: diffusers has its halves in another order."""
BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}


def place_factors(lora: LoraFile, transformer: Any) -> dict[str, Factors]:
    """Return the factors of `lora` by the names of the transformer's linear layers.

    A layer that the file has as one, and the transformer as several, is split. Raises `UserError` for a layer that the
    transformer lacks, or that has another shape.
    """
    layers = {name.replace(".base_layer", ""): module for name, module in transformer.named_modules()
              if isinstance(module, nn.Linear) and ".lora_" not in name}  # fmt: skip
    places = _places(layers)
    placed: dict[str, Factors] = {}
    unknown = [name for name in lora.layers if name.replace(".", "_") not in places]
    if unknown:
        raise UserError(
            f"{lora.path} does not fit the transformer (it has no layer for {len(unknown)} of {len(lora.layers)}: "
            f"{truncated(unknown, ', ', 3)}); name one that was made for this model{_hint(unknown[0])}"
        )
    for name, factors in lora.layers.items():
        targets = places[name.replace(".", "_")]
        widths = [layers[target].out_features for target in targets]
        wanted = [[factors.rank, layers[targets[0]].in_features], [sum(widths), factors.rank]]
        found = [list(factors.down.shape), list(factors.up.shape)]
        if found != wanted:
            raise UserError(
                f"{lora.path} does not fit the transformer (the factors of {name} are {found[0]} and {found[1]}, "
                f"expected {wanted[0]} and {wanted[1]}); name one that was made for this model"
            )
        for target, up in zip(targets, factors.up.split(widths), strict=True):
            if target in placed:
                raise UserError(f"{lora.path}: has the layer {target} twice, under two names; remove one")
            placed[target] = Factors(factors.down, up, factors.scale)
    return placed


@torch.no_grad()
def merge_factors(transformer: Any, factors: Mapping[str, Factors], path: Path) -> None:
    """Add `factors`, which were read from `path`, to the weights of the transformer's layers.

    Raises `UserError` where that changes nothing: in the whole, or in a layer whose factors are not 0 but too small
    for the precision of its weight.
    """
    lost, changed = [], 0
    for name, each in factors.items():
        weight = transformer.get_submodule(name).weight
        update = each.scale * (each.up.float() @ each.down.float())
        merged = (weight.float() + update).to(weight.dtype)
        if not merged.isfinite().all():
            raise UserError(f"{path}: merged into {name}, it makes numbers that are not finite; its scale is damaged")
        if not torch.equal(merged, weight):
            changed += 1
        elif update.count_nonzero():
            lost.append(name)
        weight.copy_(merged)
    if lost:
        raise UserError(
            f"{path}: merging changes nothing in {len(lost)} of {len(factors)} layers ({truncated(lost, ', ', 3)}): "
            f"the update is lost in rounding to {str(weight.dtype).removeprefix('torch.')}; use "
            "policy.precision=fp32, or begin from it unmerged with policy.init_from"
        )
    if not changed:
        raise UserError(
            f"{path}: merging changes nothing: in all of its {len(factors)} layers the product of the factors times "
            "the scale is 0; it was never trained, or is damaged"
        )


def _places(layers: Mapping[str, nn.Linear]) -> dict[str, tuple[str, ...]]:
    """Return the layers that a file may name, with underscores for dots as kohya's files have them, to those they stand
    for."""
    places = dict(_first_names(layers))
    places |= {name.replace(".", "_"): (name,) for name in layers}
    return places


def _first_names(layers: Mapping[str, nn.Linear]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for first, names in OUTSIDE_OF_BLOCKS.items():
        yield from ((first.replace(".", "_"), (name,)) for name in names if name in layers)
    blocks = {match[0] for name in layers if (match := re.match(r"(single_)?transformer_blocks\.\d+", name))}
    for first, alternatives in FIRST_NAMES.items():
        kind, _, layer = first.partition(".")
        for block in blocks:
            ours, _, number = block.rpartition(".")
            if ours != BLOCKS[kind]:
                continue
            for parts in alternatives:
                targets = tuple(f"{block}.{part}" for part in parts)
                if all(target in layers for target in targets):
                    yield f"{kind}.{number}.{layer}".replace(".", "_"), targets
                    break


def _hint(name: str) -> str:
    if re.match(r"(blocks|single_blocks)\.\d+\.(attn\.)?([ab]_to_|to_qkv_mlp|ff_[ab]|norm1_[ab])", name):
        return ". These are DiffSynth's own names for FLUX.1: save it with --align_to_opensource_format"
    return ""
