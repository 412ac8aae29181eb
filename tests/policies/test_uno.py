"""UNO's published weights: its LoRA, and it merged into a whole transformer, in the names of the first release."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from photographs import OLD_PILLOW
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from customized_grpo.policies.diffusers_policy import DiffusersPolicy
from customized_grpo.policies.pipelines import flux1, uno
from customized_grpo.policies.pipelines.uno import diagonal_ids, fused_to_diffusers, is_fused

Load = Callable[..., DiffusersPolicy]
WIDTH, RANK, MLP = 64, 3, 256


def published(seed: int = 0) -> dict[str, Tensor]:
    """Factors in the names and shapes of `dit_lora.safetensors`, for the tiny transformer."""
    draw = torch.Generator().manual_seed(seed)
    state = {}

    def add(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.down.weight"] = torch.randn(RANK, inputs, generator=draw) / RANK
        state[f"{name}.up.weight"] = 0.3 * torch.randn(outputs, RANK, generator=draw)

    for block in range(2):
        for stream in "12":
            add(f"double_blocks.{block}.processor.qkv_lora{stream}", WIDTH, 3 * WIDTH)
            add(f"double_blocks.{block}.processor.proj_lora{stream}", WIDTH, WIDTH)
        add(f"single_blocks.{block}.processor.qkv_lora", WIDTH, 3 * WIDTH)
        add(f"single_blocks.{block}.processor.proj_lora", WIDTH + MLP, WIDTH)
    return state


def merged_weights(policy: DiffusersPolicy) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer", ""): tensor
        for name, tensor in policy._transformer.state_dict().items()
        if "lora_" not in name
    }


def test_the_published_lora_is_merged_where_it_belongs(load: Load, tmp_path: Path) -> None:
    state = published()
    save_file(state, tmp_path / "dit_lora.safetensors")
    plain, tuned = (
        merged_weights(load("uno", **more)) for more in ({}, {"base_adapter": str(tmp_path / "dit_lora.safetensors")})
    )
    expected = {name: torch.zeros_like(tensor) for name, tensor in plain.items()}
    for block in range(2):
        for stream, names in (("1", ("to_q", "to_k", "to_v")), ("2", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            prefix = f"double_blocks.{block}.processor.qkv_lora{stream}"
            delta = state[f"{prefix}.up.weight"] @ state[f"{prefix}.down.weight"]
            for name, part in zip(names, delta.split(WIDTH), strict=True):
                expected[f"transformer_blocks.{block}.attn.{name}.weight"] = part
        for stream, name in (("1", "to_out.0"), ("2", "to_add_out")):
            prefix = f"double_blocks.{block}.processor.proj_lora{stream}"
            expected[f"transformer_blocks.{block}.attn.{name}.weight"] = (
                state[f"{prefix}.up.weight"] @ state[f"{prefix}.down.weight"]
            )
        prefix = f"single_blocks.{block}.processor."
        delta = state[f"{prefix}qkv_lora.up.weight"] @ state[f"{prefix}qkv_lora.down.weight"]
        for name, part in zip(("to_q", "to_k", "to_v"), delta.split(WIDTH), strict=True):
            expected[f"single_transformer_blocks.{block}.attn.{name}.weight"] = part
        expected[f"single_transformer_blocks.{block}.proj_out.weight"] = (
            state[f"{prefix}proj_lora.up.weight"] @ state[f"{prefix}proj_lora.down.weight"]
        )
    assert tuned.keys() == plain.keys()
    for name, tensor in tuned.items():
        assert torch.allclose(tensor - plain[name], expected[name], atol=1e-5), name


def test_a_whole_transformer_in_the_first_names_is_known() -> None:
    """UNO merged into FLUX.1-dev, as `merge_dit.safetensors` has it; on the meta device, for it is 3,072 wide."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    ours = transformer.state_dict()
    state = _first_names(ours)
    assert is_fused(state) and not is_fused(published())
    converted = fused_to_diffusers(state)
    assert {name: tensor.shape for name, tensor in converted.items()} == {n: t.shape for n, t in ours.items()}


def test_a_whole_transformer_replaces_ours(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, tmp_path / "merge_dit.safetensors")
    weights = {name: tensor + 0.01 for name, tensor in merged_weights(load("uno")).items()}
    monkeypatch.setattr(uno, "fused_to_diffusers", lambda state: weights)
    found = merged_weights(load("uno", base_adapter=str(tmp_path / "merge_dit.safetensors")))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())


def test_a_factor_for_each_projection_is_more_than_the_published_one() -> None:
    """At rank 512 of FLUX.1: 1.195 B parameters, where one `down` for query, key and value makes 0.956 B."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    layers = {name: module for name, module in transformer.named_modules() if re.fullmatch(flux1.LORA_TARGETS, name)}
    assert all(isinstance(layer, torch.nn.Linear) for layer in layers.values())
    ours = sum(512 * (layer.in_features + layer.out_features) for layer in layers.values())
    shared = sum(
        2 * 512 * layer.in_features for name, layer in layers.items() if name.endswith(("attn.to_q", "attn.add_q_proj"))
    )
    assert (ours, ours - shared) == (1_195_376_640, 956_301_312)


@pytest.mark.skipif(OLD_PILLOW, reason="Pillow before 13 rounds some pixels otherwise")
@pytest.mark.parametrize(("height", "width"), [(600, 400), (427, 640), (1000, 301), (300, 300), (200, 330)])
@pytest.mark.parametrize(("count", "side"), [(1, 512), (2, 320)])
def test_references_are_prepared_as_by_the_published_code(height: int, width: int, count: int, side: int) -> None:
    """Resized with Lanczos until the longer side fits, and then cut to whole tokens around the centre."""
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    longer = max(height, width)
    new_height, new_width = (side * length // longer for length in (height, width))
    resized = Image.fromarray(levels).resize((new_width, new_height), Image.Resampling.LANCZOS)
    kept_height, kept_width = (length // 16 * 16 for length in (new_height, new_width))
    left, top = (new_width - kept_width) // 2, (new_height - kept_height) // 2
    cut = np.array(resized.crop((left, top, left + kept_width, top + kept_height)))
    policy = SimpleNamespace(_family=uno.Uno(), _settings=SimpleNamespace(reference_side=None))
    picture = torch.from_numpy(levels).permute(2, 0, 1).float() / 255
    found = DiffusersPolicy.prepare_reference(policy, picture, count)  # type: ignore[arg-type]
    assert torch.equal(found, torch.from_numpy(cut).permute(2, 0, 1).float() / 255)


def test_each_reference_begins_where_the_last_one_ended() -> None:
    ids = diagonal_ids((32, 48), ((16, 32), (32, 16)))
    assert ids[:6].tolist() == [[0, i, j] for i in range(2) for j in range(3)]
    assert ids[6:8].tolist() == [[0, 2, 3], [0, 2, 4]]
    assert ids[8:].tolist() == [[0, 3, 5], [0, 4, 5]]


def _first_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names to those of the first release: fused projections, and halves of the last norm swapped."""
    named = {
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    }  # fmt: skip
    fused: dict[str, list[str]] = {}
    scales = {}
    for block in range(2):
        ours, theirs = f"transformer_blocks.{block}.", f"double_blocks.{block}."
        attention = ours + "attn."
        named |= {
            theirs + "img_mod.lin": ours + "norm1.linear", theirs + "txt_mod.lin": ours + "norm1_context.linear",
            theirs + "img_mlp.0": ours + "ff.net.0.proj", theirs + "img_mlp.2": ours + "ff.net.2",
            theirs + "txt_mlp.0": ours + "ff_context.net.0.proj", theirs + "txt_mlp.2": ours + "ff_context.net.2",
            theirs + "img_attn.proj": attention + "to_out.0", theirs + "txt_attn.proj": attention + "to_add_out",
        }  # fmt: skip
        fused[theirs + "img_attn.qkv"] = [attention + name for name in ("to_q", "to_k", "to_v")]
        fused[theirs + "txt_attn.qkv"] = [attention + name for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
        for stream, added in (("img", ""), ("txt", "added_")):
            for which in "qk":
                place = {"q": "query", "k": "key"}[which]
                scales[f"{theirs}{stream}_attn.norm.{place}_norm.scale"] = f"{attention}norm_{added}{which}.weight"
        ours, theirs = f"single_transformer_blocks.{block}.", f"single_blocks.{block}."
        named |= {theirs + "modulation.lin": ours + "norm.linear", theirs + "linear2": ours + "proj_out"}
        fused[theirs + "linear1"] = [ours + name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        scales |= {f"{theirs}norm.{w}_norm.scale": f"{ours}attn.norm_{w[0]}.weight" for w in ("query", "key")}
    state = {}
    for kind in ("weight", "bias"):
        state |= {f"{name}.{kind}": weights[f"{source}.{kind}"] for name, source in named.items()}
        state |= {f"{name}.{kind}": torch.cat([weights[f"{s}.{kind}"] for s in parts]) for name, parts in fused.items()}
        scale, shift = weights[f"norm_out.linear.{kind}"].chunk(2)
        state[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    return {name: tensor.contiguous() for name, tensor in (state | {n: weights[s] for n, s in scales.items()}).items()}
