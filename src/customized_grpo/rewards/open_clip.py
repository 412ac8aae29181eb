"""A CLIP in open_clip's tensor names, as HPSv2 is published, onto transformers' CLIPModel.

open_clip keeps queries, keys and values of an attention in one matrix, one after the other, and its projections to the
common space as [width, E], where transformers has [E, width].
"""

import re
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from customized_grpo.errors import UserError
from customized_grpo.io.tensors import mismatch, read_tensors

TOWERS = {"visual.": "vision_model.", "": "text_model."}
OUTER = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Parts of a block, by open_clip's names."""
_BLOCK = re.compile(r"(visual\.|)transformer\.resblocks\.(\d+)\.(.+?)(\.|\.in_proj_)(weight|bias)")


def load_open_clip(path: Path, config: CLIPConfig, field: str) -> CLIPModel:
    """Return the CLIP of `config` with the weights in the safetensors file `path`, in open_clip's names, in fp32.

    Raises `UserError`, naming the configuration `field`, where the tensors are others in name or shape.
    """
    state = converted(read_tensors(path, field))
    # Position indices are made, weights only outlined.
    with init_empty_weights(include_buffers=False):
        model: Any = CLIPModel(config)
    wrong = mismatch(state, model.state_dict())
    if wrong:
        raise UserError(
            f"{field}: {path} does not hold a CLIP of the backbone's architecture in open_clip's names ({wrong}); name "
            "one that does, or the backbone that it was made from"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` in transformers' names; what open_clip has no such name for keeps its own."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _BLOCK.fullmatch(name)
        if name in OUTER:
            found[OUTER[name]] = tensor
        elif name in PROJECTIONS:
            found[PROJECTIONS[name]] = tensor.T.contiguous()
        elif block is None:
            found[name] = tensor
        else:
            tower, number, part, joint, kind = block.groups()
            layer = f"{TOWERS[tower]}encoder.layers.{number}"
            if joint == ".in_proj_" and part == "attn":
                for letter, third in zip("qkv", tensor.tensor_split(3), strict=True):
                    found[f"{layer}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
            else:
                found[f"{layer}.{INNER.get(part, part)}.{kind}"] = tensor
    return found
