"""LoRA files of other trainers are read at their own scale, or refused by name; none is merged without an effect."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from customized_grpo.errors import UserError
from customized_grpo.io import hub as loading
from customized_grpo.policies.base_adapter import merge_base_adapter, resolve_adapter
from customized_grpo.policies.diffusers_policy import DiffusersPolicy
from customized_grpo.policies.lora import lora_config
from customized_grpo.policies.lora_files import Factors, LoraFile, parse_lora, read_lora
from customized_grpo.policies.lora_layers import merge_factors, place_factors
from customized_grpo.policies.pipelines.uno import Uno
from customized_grpo.testing.tiny_pipelines import flux2_transformer, flux_transformer

Load = Callable[..., DiffusersPolicy]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
A, B = torch.ones(4, 6), torch.ones(5, 4)


class Holder:
    """A pipeline as far as merging needs one."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return flux_transformer()


def trained(transformer: nn.Module, **settings: Any) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """PEFT's model of a copy of `transformer`, its factors drawn; their tensors and settings, as PEFT writes them."""
    twin = flux_transformer()
    twin.load_state_dict(transformer.state_dict())
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ATTENTION} | settings
    model = get_peft_model(twin, LoraConfig(**settings))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
    config = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config["default"].to_dict().items()
    }
    return model, get_peft_model_state_dict(model), json.loads(json.dumps(config, default=str))


def assert_merged_as_by_peft(transformer: nn.Module, model: nn.Module, path: Path) -> None:
    merge_base_adapter(Holder(transformer), path)
    expected = model.merge_and_unload().state_dict()
    for name, tensor in transformer.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-4), name


def bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"to_q": 2, r"single_transformer_blocks\.1\.attn\.to_v": 7}},
        {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 3}},
        {"rank_pattern": {"to_k": 2}, "use_rslora": True},
    ],
)
@pytest.mark.parametrize("prefix", ["base_model.model.", "", "transformer."])
def test_an_adapter_of_peft_is_merged_as_peft_merges_it(
    settings: dict[str, Any], prefix: str, transformer: FluxTransformer2DModel, tmp_path: Path
) -> None:
    model, state, config = trained(transformer, **settings)
    save_file({prefix + name: tensor for name, tensor in bare(state).items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_merged_as_by_peft(transformer, model, resolve_adapter(str(tmp_path), "policy.pipeline.base_adapter"))


def test_an_adapter_of_diffusers_with_patterns_in_its_header(
    transformer: FluxTransformer2DModel, tmp_path: Path
) -> None:
    model, state, config = trained(transformer, use_rslora=True, alpha_pattern={"to_q": 2})
    path = tmp_path / "pytorch_lora_weights.safetensors"
    header = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    save_file({f"transformer.{n}": t for n, t in bare(state).items()}, path, {"lora_adapter_metadata": header})
    assert_merged_as_by_peft(transformer, model, path)


def test_the_name_of_the_adapter_in_tensor_names(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    """As DiffSynth writes them; alpha is its rank."""
    model, state, _ = trained(transformer, lora_alpha=4)
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in bare(state).items()}
    save_file(renamed, tmp_path / "step-500.safetensors")
    assert_merged_as_by_peft(transformer, model, tmp_path / "step-500.safetensors")


@pytest.mark.parametrize("down", ["lora_A", "lora_down", "lora.down"])
def test_alpha_beside_the_factors(down: str, transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    model, state, _ = trained(transformer, alpha_pattern={"to_q": 2})
    up = down.replace("A", "B").replace("down", "up")
    found = {}
    for name, tensor in bare(state).items():
        layer, _, factor = name.partition(".lora_")
        found[f"transformer.{layer}.{down if factor[0] == 'A' else up}.weight"] = tensor
        found[f"transformer.{layer}.alpha"] = torch.tensor(2.0 if layer.endswith("to_q") else 16.0)
    save_file(found, tmp_path / "lora.safetensors")
    assert_merged_as_by_peft(transformer, model, tmp_path / "lora.safetensors")


def test_a_file_without_an_alpha_is_merged_at_scale_1(tmp_path: Path) -> None:
    save_file({"x.lora_A.weight": A, "x.lora_B.weight": B}, tmp_path / "lora.safetensors")
    assert read_lora(tmp_path / "lora.safetensors").layers["x"].scale == 1


FIRST = {
    "double_blocks.1.img_attn.qkv": ["transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_k",
                                     "transformer_blocks.1.attn.to_v"],
    "double_blocks.0.txt_attn.qkv": ["transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.attn.add_k_proj",
                                     "transformer_blocks.0.attn.add_v_proj"],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "single_blocks.1.linear1": ["single_transformer_blocks.1.attn.to_q", "single_transformer_blocks.1.attn.to_k",
                                "single_transformer_blocks.1.attn.to_v", "single_transformer_blocks.1.proj_mlp"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
    "img_in": ["x_embedder"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "final_layer.linear": ["proj_out"],
}  # fmt: skip
FIRST_2 = {
    "double_blocks.0.img_attn.qkv": ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k",
                                     "transformer_blocks.0.attn.to_v"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.linear_out"],
    "single_blocks.1.linear1": ["single_transformer_blocks.1.attn.to_qkv_mlp_proj"],
    "single_blocks.1.linear2": ["single_transformer_blocks.1.attn.to_out"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
}  # fmt: skip


@pytest.mark.parametrize("style", ["kohya", "comfy", "peft"])
@pytest.mark.parametrize("flux2", [False, True])
def test_the_names_of_flux_first_release(style: str, flux2: bool, tmp_path: Path) -> None:
    """Alpha is half the rank in kohya's files, and not told in the others."""
    torch.manual_seed(1)
    transformer = flux2_transformer(48, guidance_embeds=False) if flux2 else flux_transformer()
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    state, updates = {}, {}
    for name, targets in (FIRST_2 if flux2 else FIRST).items():
        layers = [transformer.get_submodule(target) for target in targets]
        rows = [layer.out_features for layer in layers]
        down, up = torch.randn(4, layers[0].in_features), torch.randn(sum(rows), 4)
        if style == "kohya":
            key = f"lora_unet_{name.replace('.', '_')}"
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
        else:
            key = f"{'diffusion_model.' if style == 'comfy' else 'base_model.model.'}{name}"
            state |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        product = (0.5 if style == "kohya" else 1.0) * up @ down
        updates |= dict(zip(targets, product.split(rows), strict=True))
    save_file(state, tmp_path / "lora.safetensors")
    merge_base_adapter(Holder(transformer), tmp_path / "lora.safetensors")
    for name, tensor in transformer.state_dict().items():
        expected = before[name] + updates.get(name.removesuffix(".weight"), 0)
        assert torch.allclose(tensor, expected, atol=1e-4), name


def test_the_names_of_kohya_for_qwen_image(load: Load, tmp_path: Path) -> None:
    transformer = load("qwen-image-edit-plus")._transformer
    name = "transformer_blocks.1.img_mlp.net.0.proj"
    layer = transformer.get_submodule(name)
    key = f"lora_unet_{name.replace('.', '_')}"
    save_file(
        {f"{key}.lora_down.weight": torch.ones(2, layer.in_features),
         f"{key}.lora_up.weight": torch.ones(layer.out_features, 2)},
        tmp_path / "lora.safetensors",
    )  # fmt: skip
    placed = place_factors(read_lora(tmp_path / "lora.safetensors"), transformer)
    assert list(placed) == [name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.dora_scale", "this is DoRA"),
        ("x.lora_magnitude_vector", "this is DoRA"),
        ("lora_unet_x.lokr_w1", "this is LoKr"),
        ("lora_unet_x.hada_w1_a", "this is LoHa"),
        ("x.oft_blocks", "this is OFT"),
        ("x.lora_mid.weight", "LoCon"),
        ("diffusion_model.x.diff_b", "differences of whole weights"),
        ("x.lora_B.bias", "biases"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "change a text encoder"),
        ("text_encoder.text_model.q_proj.lora_A.weight", "change a text encoder"),
        ("diffusion_model.x.weight", "is no tensor of a LoRA that is read here"),
        ("x.lora_A.other.weight", "holds several adapters"),
        ("y.lora_A.weight", "of layer 'y' it holds only down"),
        ("y.alpha", "of layer 'y' it holds only alpha"),
    ],
)
def test_other_tensors_are_refused_by_name(name: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {"x.lora_A.weight": A, "x.lora_B.weight": B, name: torch.ones(1 if name.endswith("alpha") else 4)}
    with pytest.raises(UserError, match=f"{path}: .*{said}"):
        parse_lora(path, tensors, {})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "LOKR"}, r"this is LOKR \(peft_type\)"),
        ({"use_dora": True}, "a LoRA with use_dora is not read"),
        ({"bias": "all", "modules_to_save": ["proj_out"]}, "a LoRA with modules_to_save, bias is not read"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 changed the base model"),
        ({"r": 8}, "factors of 'x' have rank 4, and the LoRA's settings say 8"),
        ({"r": None}, "the settings of the LoRA are damaged"),
    ],
)
def test_settings_of_more_than_a_plain_lora_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_file({"x.lora_A.weight": A, "x.lora_B.weight": B}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "none"} | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        read_lora(tmp_path / "adapter_model.safetensors")


def test_a_peft_file_without_its_settings_has_no_scale(tmp_path: Path) -> None:
    save_file({"x.lora_A.weight": A, "x.lora_B.weight": B}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"PEFT keeps alpha in adapter_config\.json, and there is none beside it"):
        read_lora(tmp_path / "adapter_model.safetensors")


def test_an_alpha_that_is_told_twice(tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": A, "x.lora_B.weight": B, "x.alpha": torch.tensor(4.0)}
    with pytest.raises(UserError, match="tells alpha twice"):
        parse_lora(tmp_path, tensors, {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 4}'})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["base_adapter", "load_adapter"])
def test_a_number_that_is_not_finite(kind: str, value: float, load: Load, tmp_path: Path) -> None:
    policy = load("flux1-kontext")
    policy.save_adapter(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    state = load_file(path)
    name = sorted(state)[3]
    state[name][0, 0] = value
    save_file(state, path)
    read = policy.load_adapter if kind == "load_adapter" else lambda path: merge_base_adapter(policy._pipe, path)
    with pytest.raises(UserError, match=rf"{path}: 1 of its {len(state)} tensors hold numbers .* \({name}\)"):
        read(path)


def test_a_merge_that_changes_nothing(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    """A layer whose factors are 0 may stay as it is: a transformer's last block has some that never get a gradient."""
    name, other = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
    down, up = torch.ones(4, 64), torch.ones(64, 4)
    empty = Factors(down, torch.zeros(64, 4), 1.0)
    with pytest.raises(UserError, match="merging changes nothing: in all of its 1 layers the product"):
        merge_factors(transformer, {name: empty}, tmp_path)
    merge_factors(transformer, {name: empty, other: Factors(down, up, 1.0)}, tmp_path)
    transformer.bfloat16()
    tiny = Factors(down, up * 1e-9, 1.0)
    with pytest.raises(
        UserError, match=rf"changes nothing in 1 of 2 layers \({name}\): .* lost in rounding to bfloat16"
    ):
        merge_factors(transformer, {name: tiny, other: Factors(down, up, 1.0)}, tmp_path)


@pytest.mark.parametrize(
    ("layer", "shape", "said"),
    [
        ("transformer_blocks.9.attn.to_q", (4, 64), "it has no layer for 1 of 1: transformer_blocks.9.attn.to_q"),
        ("blocks.0.attn.a_to_qkv", (4, 64), "DiffSynth's own names for FLUX.1: save it with --align_to_opensource"),
        ("transformer_blocks.0.attn.to_q", (4, 8), r"are \[4, 8\] and \[64, 4\], expected \[4, 64\] and \[64, 4\]"),
    ],
)
def test_factors_for_another_model(
    layer: str, shape: tuple[int, int], said: str, transformer: FluxTransformer2DModel, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"does not fit the transformer .*{said}"):
        place_factors(LoraFile(tmp_path, {layer: Factors(torch.ones(shape), torch.ones(64, 4), 1.0)}), transformer)


def test_two_adapters_in_one_folder(tmp_path: Path) -> None:
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        save_file({"x": A}, tmp_path / name)
    with pytest.raises(
        UserError, match=r"policy\.pipeline\.base_adapter: .* holds two adapters .* name one of the files"
    ):
        resolve_adapter(str(tmp_path), "policy.pipeline.base_adapter")


@given(rank=st.integers(1, 9), alpha=st.floats(0.01, 100))
def test_the_scale_is_alpha_by_rank_wherever_alpha_stands(rank: int, alpha: float) -> None:
    down, up = torch.ones(rank, 3), torch.ones(2, rank)
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": rank, "transformer.lora_alpha": alpha})}
    place = Path("lora.safetensors")
    factors = {"x.lora_A.weight": down, "x.lora_B.weight": up}
    told = parse_lora(place, factors, header).layers["x"].scale
    beside = parse_lora(place, factors | {"x.alpha": torch.tensor(alpha, dtype=torch.float64)}, {}).layers["x"].scale
    assert told == pytest.approx(alpha / rank) and beside == pytest.approx(alpha / rank)


def test_a_run_takes_a_lora_in_any_layout(load: Load, tmp_path: Path, perturb: Callable[..., None]) -> None:
    """Kohya's names, and alpha beside the factors."""
    policy, fresh = load("flux1-kontext", lora_alpha=8), load("flux1-kontext", lora_alpha=8, seed=1)
    perturb(policy)
    policy.save_adapter(tmp_path / "run")
    state = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    found = {}
    for name, tensor in state.items():
        layer, _, factor = name.removeprefix("transformer.").partition(".lora_")
        key = f"lora_unet_{layer.replace('.', '_')}"
        found[f"{key}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"] = tensor
        found[f"{key}.alpha"] = torch.tensor(8.0)
    save_file(found, tmp_path / "kohya.safetensors")
    fresh.load_adapter(tmp_path / "kohya.safetensors")
    for (name, ours), (_, theirs) in zip(fresh.trainable_parameters(), policy.trainable_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_settings_that_are_written_are_the_ones_that_peft_trains_with(load: Load) -> None:
    found = load("uno")._transformer.peft_config["default"]
    assert found.to_dict() == lora_config(Uno.lora_targets, 4, 4).to_dict()


def test_the_settings_of_an_adapter_on_the_hub_come_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / Path(file).name)

    monkeypatch.setattr(loading, "hf_hub_download", download)
    path = resolve_adapter("owner/name/best/adapter_model.safetensors", "policy.pipeline.base_adapter")
    assert path == tmp_path / "adapter_model.safetensors"
    assert asked == [
        ("owner/name", "best/adapter_model.safetensors"), ("owner/name", "best/adapter_config.json"),
    ]  # fmt: skip
    resolve_adapter("owner/name/lora.safetensors", "policy.pipeline.base_adapter")
    assert asked[2:] == [("owner/name", "lora.safetensors")]
