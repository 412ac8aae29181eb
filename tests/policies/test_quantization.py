"""Frozen weights in 8 or 4 bits, on the CPU: the same method runs on them, and adapters fit the model as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from families import EVERY_FAMILY_OR_FAST, QUANTIZATION
from torch import Tensor

from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.factory.pipelines import PIPELINES
from customized_grpo.policies.diffusers_policy import DiffusersPolicy
from customized_grpo.policies.quantization import is_quantized, layers_to_quantize, quantize, saved_bytes
from customized_grpo.testing.tiny_pipelines import save_tiny
from customized_grpo.training.dry_run import dry_run

pytestmark = QUANTIZATION
Load = Callable[..., DiffusersPolicy]
Picture = Callable[..., Tensor]
ERROR = {"int8": 0.03, "fp8": 0.15, "nf4": 0.4}
"""Bounds of the velocity's relative error. Measured on these models, whose weights are random: 0.008 to 0.017, 0.033 to
0.062, 0.14 to 0.23."""
EVERY_QUANTIZATION = pytest.mark.parametrize("quantization", tuple(ERROR))


@pytest.fixture
def velocity(picture: Picture) -> Callable[..., Tensor]:
    """Computes velocities of two prompts, whose references have two shapes."""

    def velocity(policy: DiffusersPolicy, rows: slice = slice(None)) -> Tensor:
        pictures = [[picture(64, 64)], [picture(48, 80, 1)]][rows]
        condition = policy.encode(["a toy in the snow", "a toy on the beach"][rows], pictures)
        latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
        return policy.velocity(latents[rows], torch.tensor([0.3, 0.9])[rows], condition)

    return velocity


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def stored_bytes(model: torch.nn.Module) -> int:
    """The bytes of all tensors that a model holds, those within tensor subclasses and beside 4-bit weights too."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        inner = getattr(parameter.data, "__tensor_flatten__", None)
        parts = [getattr(parameter.data, name) for name in inner()[0]] if inner else [parameter.data]
        total += sum(part.nbytes for part in parts) + (0 if state is None else state.absmax.nbytes)
    return total


@EVERY_QUANTIZATION
@EVERY_FAMILY_OR_FAST
@torch.no_grad()
def test_velocities_are_close_and_do_not_depend_on_the_batch(
    load: Load, velocity: Callable[..., Tensor], kind: str, quantization: str
) -> None:
    expected = velocity(load(kind))
    policy = load(kind, quantization=quantization)
    found = velocity(policy)
    assert 0 < relative(found, expected) < ERROR[quantization]
    for row in range(2):
        assert torch.equal(velocity(policy, slice(row, row + 1))[0], found[row])


@EVERY_QUANTIZATION
def test_a_gradient_step_starts_where_the_rollout_was(
    load: Load, velocity: Callable[..., Tensor], perturb: Callable[..., None], quantization: str
) -> None:
    """With gradients and checkpointing the velocity is the rollout's to the bit, and the factors alone learn, fp32."""
    policy = load("flux1-kontext", quantization=quantization, gradient_checkpointing=True)
    perturb(policy)
    with torch.no_grad():
        drawn = velocity(policy)
    updated = velocity(policy)
    assert torch.equal(drawn, updated)
    updated.square().mean().backward()
    trained = dict(policy.trainable_parameters())
    for name, parameter in policy._transformer.named_parameters():
        assert parameter.requires_grad == (name in trained)
    assert all(p.dtype == torch.float32 and p.grad is not None and bool(p.grad.any()) for p in trained.values())


@EVERY_QUANTIZATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_restored_weight_which_is_not_kept(quantization: str, dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(96, 160).to(dtype).requires_grad_(False)
    model = torch.nn.Sequential(torch.nn.ModuleList([layer]))
    quantize(model, quantization, "f")  # type: ignore[arg-type]
    layer, kept = model[0][0], []
    x = torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        y = layer(x)
    assert not any(tensor.numel() >= 96 * 160 for tensor in kept)
    with torch.no_grad():
        matrix = layer(torch.eye(96, dtype=dtype)) - layer.bias  # the transposed weight, as it multiplies
    assert relative(y, x.float() @ matrix.float() + layer.bias.float()) < (1e-5 if dtype == torch.float32 else 1e-2)
    y.sum().backward()
    expected = torch.ones(3, 7, 160) @ matrix.float().T
    assert x.grad is not None and relative(x.grad.float(), expected) < (1e-5 if dtype == torch.float32 else 1e-2)


@EVERY_QUANTIZATION
def test_the_layers_of_blocks_are_quantized_and_no_others(load: Load, quantization: str) -> None:
    whole, transformer = (load("flux1-kontext", **s)._transformer for s in ({}, {"quantization": quantization}))
    layers = layers_to_quantize(whole)
    quantized = {
        name.removesuffix(".base_layer")
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and is_quantized(module)
    }
    assert quantized == {name.removesuffix(".base_layer") for name in layers}
    assert all(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in quantized)
    saved = stored_bytes(whole) - stored_bytes(transformer)
    assert saved == pytest.approx(saved_bytes(whole, quantization), rel=0.02)  # type: ignore[arg-type]
    assert saved > 0.5 * stored_bytes(whole)


def test_an_adapter_of_quantized_weights_fits_the_whole_ones(
    load: Load, velocity: Callable[..., Tensor], perturb: Callable[..., None], tmp_path: Path
) -> None:
    policy, whole = load("flux1-kontext", quantization="int8"), load("flux1-kontext")
    perturb(policy)
    policy.save_adapter(tmp_path)
    whole.load_adapter(tmp_path)
    for (name, factor), (other, copy) in zip(policy.trainable_parameters(), whole.trainable_parameters(), strict=True):
        assert name == other and torch.equal(factor, copy)
    with torch.no_grad():
        assert relative(velocity(policy), velocity(whole)) < ERROR["int8"]
        with policy.base_weights(), whole.base_weights():
            assert relative(velocity(policy), velocity(whole)) < ERROR["int8"]


def test_a_base_adapter_is_merged_before(
    load: Load, velocity: Callable[..., Tensor], perturb: Callable[..., None], tmp_path: Path
) -> None:
    made = load("flux1-kontext")
    perturb(made, 0.3)
    made.save_adapter(tmp_path)
    merged, quantized = (
        load("flux1-kontext", base_adapter=str(tmp_path / "pytorch_lora_weights.safetensors"), quantization=kind)
        for kind in ("none", "int8")
    )
    with torch.no_grad():
        expected = velocity(merged)
        assert (
            relative(velocity(quantized), expected)
            < ERROR["int8"]
            < relative(velocity(load("flux1-kontext")), expected)
        )


def test_text_encoders_are_quantized_and_cached_apart(load: Load, picture: Picture, tmp_path: Path) -> None:
    prompt, pictures = ["a toy in the snow"], [[picture(64, 64)]]
    whole, policy = load("flux1-kontext"), load("flux1-kontext", text_encoder_quantization="int8")
    assert is_quantized(policy._pipe.text_encoder_2) and not is_quantized(policy._transformer)
    texts = [each.encode(prompt, pictures).rows[0].tensors["text"] for each in (whole, policy)]
    assert 0 < relative(texts[1], texts[0]) < ERROR["int8"]


def test_a_model_that_was_saved_quantized(load: Load, velocity: Callable[..., Tensor], tmp_path: Path) -> None:
    """It is read as it is, needs no setting, and takes neither a second quantization nor a merged adapter."""
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    folder = save_tiny("flux1-kontext", tmp_path / "model")
    transformer = PIPELINES["flux1-kontext"].transformer.from_pretrained(
        folder / "transformer", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), torch_dtype=torch.float32
    )
    transformer.save_pretrained(folder / "transformer")
    policy = load("flux1-kontext", model=str(folder))
    assert is_quantized(policy._transformer)
    with torch.no_grad():
        assert relative(velocity(policy), velocity(load("flux1-kontext"))) < ERROR["int8"]
    with pytest.raises(UserError, match=r"policy\.pipeline\.quantization: the weights are quantized already; leave it"):
        load("flux1-kontext", model=str(folder), quantization="fp8")
    policy.save_adapter(tmp_path)
    with pytest.raises(UserError, match=r"policy\.pipeline\.base_adapter: .* holds quantized weights, and nothing is"):
        load("flux1-kontext", model=str(folder), base_adapter=str(tmp_path / "pytorch_lora_weights.safetensors"))


def test_4_bit_weights_stay_as_they_are_on_a_cpu_that_multiplies_in_bf16(
    load: Load, velocity: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes packs them there for passes without gradients alone, in layers of models of its own making."""
    import bitsandbytes.nn.modules as bnb

    monkeypatch.setattr(bnb, "has_avx512bf16", lambda: True)
    packed = MagicMock(side_effect=AssertionError("weights were packed"))
    monkeypatch.setattr(bnb, "_convert_weight_packed_for_cpu", packed)
    policy = load("flux1-kontext", quantization="nf4", text_encoder_quantization="nf4")
    with torch.no_grad():
        velocity(policy)
    packed.assert_not_called()


def test_a_missing_library_is_named_before_weights_are_read(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("customized_grpo.factory.pipelines.load_pipeline", lambda *_: pytest.fail("weights were read"))
    for field, library in (("quantization", "torchao"), ("text_encoder_quantization", "bitsandbytes")):
        kind = "fp8" if library == "torchao" else "nf4"
        with pytest.raises(
            UserError, match=rf"policy\.pipeline\.{field}: {kind} takes {library}, .* 'customized-grpo\[quantization\]'"
        ):
            load("flux1-kontext", **{field: kind})


def test_what_quantization_does_not_go_with() -> None:
    with pytest.raises(ValueError, match="quantization=int8: quantized weights are not sharded; set fsdp=false"):
        PolicyConfig.model_validate({"kind": "uno", "pipeline": {"fsdp": True, "quantization": "int8"}})
    with pytest.raises(ValueError, match="pipeline.quantization: only for"):
        PolicyConfig.model_validate({"kind": "toybox", "pipeline": {"quantization": "int8"}})
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(64, 64)]))
    quantize(model, "int8", "f")
    with pytest.raises(UserError, match="f: the weights are quantized already"):
        quantize(model, "int8", "f")


def test_the_estimate_counts_quantized_weights(tiny_models: dict[str, Path], load: Load) -> None:
    def frozen(quantization: str) -> float:
        pipeline = {
            "model": str(tiny_models["flux1-kontext"]), "height": 32, "width": 32, "quantization": quantization,
        }  # fmt: skip
        tree: dict[str, Any] = {"rewards": {"prompt": {"kind": "clip_t"}, "identity": {"kind": "dino"}}}
        policy = {"kind": "flux1-kontext", "precision": "fp32", "lora_rank": 4, "pipeline": pipeline}
        return dry_run(Config.model_validate(tree | {"policy": policy})).memory["frozen weights"]

    whole = load("flux1-kontext")._transformer
    for kind in ("int8", "nf4"):
        saved = stored_bytes(whole) - stored_bytes(load("flux1-kontext", quantization=kind)._transformer)
        assert frozen("none") - frozen(kind) == pytest.approx(saved, rel=0.02)
