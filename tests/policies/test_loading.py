"""What cannot be loaded is refused early, in one line that names the field and the remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from customized_grpo.config.policy import PipelineConfig, PolicyConfig
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.factory.pipelines import MODELS, PIPELINES, load_policy
from customized_grpo.policies import loading
from customized_grpo.policies.diffusers_policy import DiffusersPolicy
from customized_grpo.policies.loading import resolve_model
from customized_grpo.runtime import device as runtime
from customized_grpo.runtime.device import resolve_device
from customized_grpo.testing.tiny_pipelines import flux_transformer

Load = Callable[..., DiffusersPolicy]


@pytest.fixture
def broken(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Kontext, to break."""
    return Path(shutil.copytree(tiny_models["flux1-kontext"], tmp_path / "broken"))


def test_another_pipelines_folder(load: Load, tiny_models: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=r"policy\.pipeline\.model: .* holds a Flux2KleinPipeline, but .* FluxKontextPipeline"
    ):
        load("flux1-kontext", model=str(tiny_models["flux2-klein"]))


def test_a_folder_without_a_pipeline(load: Load, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"policy\.pipeline\.model: .* holds no diffusers pipeline: it has no model_index\.json"
    ):
        load("flux1-kontext", model=str(tmp_path))


def test_a_missing_component(load: Load, broken: Path) -> None:
    shutil.rmtree(broken / "vae")
    with pytest.raises(UserError, match=r"lacks vae, which its model_index\.json lists"):
        load("flux1-kontext", model=str(broken))


def test_missing_weights(load: Load, broken: Path) -> None:
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"policy\.pipeline\.model: .* could not be loaded: "):
        load("flux1-kontext", model=str(broken))


def test_truncated_weights(load: Load, broken: Path) -> None:
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"policy\.pipeline\.model: .* could not be loaded: "):
        load("flux1-kontext", model=str(broken))


def test_a_transformer_of_another_class(load: Load, broken: Path) -> None:
    index = json.loads((broken / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "SD3Transformer2DModel"]
    (broken / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=r"the transformer in .* is a SD3Transformer2DModel, but policy\.kind takes a Flux"
    ):
        load("flux1-kontext", model=str(broken))


def test_a_damaged_configuration(load: Load, broken: Path) -> None:
    path = broken / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": None}))
    with pytest.raises(UserError, match=r"policy\.pipeline\.model: .* could not be loaded: "):
        load("flux1-kontext", model=str(broken))


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_pickles_are_not_read(part: str, load: Load, broken: Path) -> None:
    (weights,) = (broken / part).glob("*.safetensors")
    torch.save(load_file(weights), weights.with_name(f"{weights.stem.replace('model', 'pytorch_model')}.bin")
               if part == "text_encoder" else weights.with_suffix(".bin"))  # fmt: skip
    weights.unlink()
    with pytest.raises(UserError, match=r"policy\.pipeline\.model: .* could not be loaded: "):
        load("flux1-kontext", model=str(broken))


def test_a_damaged_index(load: Load, broken: Path) -> None:
    (broken / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json is damaged"):
        load("flux1-kontext", model=str(broken))


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "only-a-name", "a/b/c"])
def test_neither_folder_nor_hub_id(load: Load, model: str) -> None:
    with pytest.raises(UserError, match=r"policy\.pipeline\.model: .* is neither a folder nor a hub id \(owner/name\)"):
        load("flux1-kontext", model=model)


def test_an_unreachable_hub(load: Load) -> None:
    with pytest.raises(
        UserError, match=r"policy\.pipeline\.model: nobody/nothing is no folder here, and could not be had from"
    ):
        load("flux1-kontext", model="nobody/nothing")


def test_a_gated_hub_id(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, file: str) -> str:
        assert file == "model_index.json"
        response = httpx2.Response(403, request=httpx2.Request("GET", "https://hub.invalid"))
        raise GatedRepoError("no access", response=response)

    monkeypatch.setattr(loading, "hf_hub_download", refuse)
    with pytest.raises(
        UserError, match=r"policy\.pipeline\.model: some/one is gated: accept its licence .* `hf auth login`"
    ):
        load("flux1-kontext", model="some/one")


@pytest.mark.parametrize("kind", MODELS)
def test_another_familys_model_is_refused_before_its_weights_are_downloaded(
    kind: str, load: Load, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As when `policy.kind` is changed in a recipe, and `policy.pipeline.model` is left as it was."""
    fetched: list[str] = []
    place: list[Path] = []

    def fetch(model: str, file: str) -> str:
        fetched.append(file)
        return str(place[-1] / file)

    def refuse(*arguments: object, **settings: object) -> str:
        raise AssertionError(f"{arguments} is downloaded")

    monkeypatch.setattr(loading, "hf_hub_download", fetch)
    monkeypatch.setattr(loading, "snapshot_download", refuse)
    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    others = [name for name in MODELS if name != kind]
    for other in others:
        place.append(tiny_models[other])
        expected = PIPELINES[kind].pipeline_names[0]
        said = rf"policy\.pipeline\.model: some/one holds a \w+Pipeline, but policy\.kind takes a {expected}"
        with pytest.raises(UserError, match=said):
            load(kind, model="some/one", base_adapter="some/lora/lora.safetensors")
        with pytest.raises(UserError, match=said):
            resolve_model("some/one", PIPELINES[kind], weights=False)
    assert set(fetched) == {"model_index.json"} and len(fetched) == 2 * len(others)


def test_a_hub_id_of_no_pipeline(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, file: str) -> str:
        response = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.invalid"))
        raise RemoteEntryNotFoundError("no such file", response=response)

    monkeypatch.setattr(loading, "hf_hub_download", refuse)
    with pytest.raises(
        UserError, match=r"policy\.pipeline\.model: some/one holds no diffusers pipeline: it has no model_index"
    ):
        load("flux1-kontext", model="some/one")


def test_bf16_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "resolve_precision", lambda precision, device: "fp32")
    with pytest.raises(UserError, match=r"policy\.precision: bf16 is asked for, but the CPU here emulates it"):
        runtime.check_precision("bf16", torch.device("cpu"))
    runtime.check_precision("fp32", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.safetensors", "is neither a file nor owner/name/file.safetensors"),
        ("nobody/nothing/lora.bin", "only safetensors files are read"),
        ("nobody/nothing/lora.safetensors", "could not be had from the hub"),
    ],
)
def test_no_such_base_adapter(load: Load, name: str, said: str) -> None:
    with pytest.raises(UserError, match=r"policy\.pipeline\.base_adapter: ") as found:
        load("flux1-kontext", base_adapter=name)
    assert said in str(found.value)


def test_a_base_adapter_of_another_model(load: Load, tmp_path: Path) -> None:
    load("flux2-klein").save_adapter(tmp_path)
    with pytest.raises(
        UserError, match=r"policy\.pipeline\.base_adapter: .* does not fit the transformer .* made for this model"
    ):
        load("flux1-kontext", base_adapter=str(tmp_path / "pytorch_lora_weights.safetensors"))


def test_a_base_adapter_of_other_widths(load: Load, tmp_path: Path) -> None:
    load("flux1-kontext").save_adapter(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({name: tensor.repeat(1, 2 if "lora_A" in name else 1) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"policy\.pipeline\.base_adapter: .* does not fit the transformer"):
        load("flux1-kontext", base_adapter=str(path))


def test_a_base_adapter_that_is_no_safetensors_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match=r"policy\.pipeline\.base_adapter: .* damaged, or no safetensors file"):
        load("flux1-kontext", base_adapter=str(tmp_path / "lora.safetensors"))


def test_a_base_adapter_in_diffusers_format_is_merged(
    load: Load, tmp_path: Path, perturb: Callable[..., None], picture: Callable[..., torch.Tensor]
) -> None:
    tuned = load("flux1-kontext")
    perturb(tuned)
    tuned.save_adapter(tmp_path)
    merged = load("flux1-kontext", base_adapter=str(tmp_path / "pytorch_lora_weights.safetensors"))
    condition = tuned.encode(["a cat"], [[tuned.prepare_reference(picture(64, 64), 1)]])
    latents, sigma = torch.randn(1, *tuned.latent_shape), torch.tensor([0.6])
    with torch.no_grad(), merged.base_weights():
        found, expected = (policy.velocity(latents, sigma, condition) for policy in (merged, tuned))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_base_adapter_is_merged_at_its_own_scale(
    prefixed: bool, load: Load, tmp_path: Path, perturb: Callable[..., None]
) -> None:
    """alpha is twice the rank; and `save_lora_adapter` leaves the names without the prefix "transformer."."""
    tuned = load("flux1-kontext", lora_alpha=8)
    perturb(tuned)
    if prefixed:
        tuned.save_adapter(tmp_path)
    else:
        tuned._transformer.save_lora_adapter(tmp_path, adapter_name="default")
    merged = load("flux1-kontext", base_adapter=str(tmp_path / "pytorch_lora_weights.safetensors"))
    for name, layer in tuned._transformer.named_modules():
        if hasattr(layer, "get_delta_weight"):
            before = layer.base_layer.weight
            after = merged._transformer.get_submodule(name).base_layer.weight
            assert torch.allclose(after - before, layer.get_delta_weight("default"), atol=1e-5)
            assert (after - before).abs().max() > 1e-3


def test_an_adapter_of_another_alpha(load: Load, tmp_path: Path) -> None:
    load("flux1-kontext", lora_alpha=8).save_adapter(tmp_path)
    load("flux1-kontext", lora_alpha=8, seed=1).load_adapter(tmp_path)
    with pytest.raises(UserError, match=r"rank 4 and alpha 4; set policy\.lora_rank=4 and policy\.lora_alpha=8"):
        load("flux1-kontext").load_adapter(tmp_path)


def test_an_adapter_of_another_rank(load: Load, tmp_path: Path) -> None:
    load("flux1-kontext", lora_rank=8).save_adapter(tmp_path)
    with pytest.raises(UserError, match=r"does not fit the policy .* set policy\.lora_rank=8 and policy\.lora_alpha=4"):
        load("flux1-kontext").load_adapter(tmp_path)


def test_an_adapter_of_another_base(load: Load, tmp_path: Path) -> None:
    load("flux2-klein").save_adapter(tmp_path)
    with pytest.raises(UserError, match=r"does not fit the transformer .* one that was made for this model"):
        load("flux1-kontext").load_adapter(tmp_path)


def test_no_adapter(load: Load, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter there; name the folder of a finished run"):
        load("flux1-kontext").load_adapter(tmp_path)


@pytest.mark.parametrize("backend", ["sage", "_sage_qk_int8_pv_fp16_cuda", "_flash_3"])
def test_a_backend_that_cannot_train(load: Load, backend: str) -> None:
    with pytest.raises(UserError, match=rf"policy\.pipeline\.attention_backend: '{backend}' has no backward pass"):
        load("flux1-kontext", attention_backend=backend)


@pytest.mark.parametrize("backend", ["flash", "_flash_3_hub", "_native_cudnn"])
def test_a_backend_that_wants_cuda(load: Load, backend: str) -> None:
    with pytest.raises(
        UserError, match=rf"policy\.pipeline\.attention_backend: '{backend}' runs on CUDA, and the device is cpu"
    ):
        load("flux1-kontext", attention_backend=backend)


def test_an_unknown_backend(load: Load) -> None:
    with pytest.raises(UserError, match=r"policy\.pipeline\.attention_backend: 'fast' cannot be used: "):
        load("flux1-kontext", attention_backend="fast")


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_device_that_is_not_here(device: str) -> None:
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("there is one here")
    with pytest.raises(UserError, match=rf"policy\.device: there is no '{device}' here"):
        resolve_device(device)


@pytest.mark.parametrize(("device", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_policys_device_is_the_current_one(
    device: str, current: list[str], tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(str(device)))
    config = PolicyConfig(
        kind="flux1-kontext",
        pipeline=PipelineConfig(model=str(tiny_models["flux1-kontext"])),
        lora_rank=4,
        lora_alpha=4,
    )
    load_policy(config, 0, torch.device(device), bf16=False)
    assert made == current


def test_no_device() -> None:
    with pytest.raises(UserError, match=r"policy\.device: 'gpu0' is no device"):
        resolve_device("gpu0")


def test_guidance_of_a_distilled_model(load: Load, tmp_path: Path) -> None:
    from customized_grpo.testing.tiny_pipelines import flux2_klein

    flux2_klein(distilled=True).save_pretrained(tmp_path / "distilled")
    with pytest.raises(
        UserError, match=r"policy\.pipeline\.guidance_scale: this model is distilled and takes none, found 3\.0"
    ):
        load("flux2-klein", model=str(tmp_path / "distilled"), guidance_scale=3.0)


def test_guidance_of_a_model_that_embeds_none(load: Load, broken: Path) -> None:
    path = broken / "transformer"
    with torch.random.fork_rng():
        flux_transformer(guidance_embeds=False).save_pretrained(path)
    load("flux1-kontext", model=str(broken))
    with pytest.raises(UserError, match=r"policy\.pipeline\.guidance_scale: this model embeds no guidance, found 3\.0"):
        load("flux1-kontext", model=str(broken), guidance_scale=3.0)


@pytest.mark.parametrize(("kind", "most"), [("flux1-kontext", 1), ("uno", 4), ("qwen-image-edit-plus", 3)])
def test_too_many_references(load: Load, kind: str, most: int) -> None:
    policy = load(kind)
    policy.check("a cat", most)
    with pytest.raises(UserError, match=rf"at most {most} references, not {most + 1}"):
        policy.check("a cat", most + 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "flux2", "pipeline": {"height": 500}}, "height=500 is not a multiple of 16"),
        ({"kind": "flux2", "toybox": {"weights": "folder"}}, "toybox.weights: only for kind=toybox .found kind=flux2"),
        ({"kind": "flux2", "toybox": {"adapter": "full"}}, "toybox.adapter: only for kind=toybox .found kind=flux2"),
        (
            {"pipeline": {"model": "a/b", "guidance_scale": 2}},
            "pipeline.model, pipeline.guidance_scale: only for .*found kind=toybox.; leave it out",
        ),
        ({"device": "cuda"}, "ToyBox runs on the CPU"),
    ],
)
def test_settings_of_another_kind(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PolicyConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "rewards.prompt.kind=toybox_prompt, rewards.identity.kind=toybox_identity: toybox does not read"),
        (
            {"rewards": {"one": {"kind": "clip_t"}, "two": {"kind": "toybox_prompt"}}},
            "rewards.two.kind=toybox_prompt",
        ),
        (
            {"rewards": {"a": {"kind": "dino"}}, "evaluation": {"metrics": {"b": {"kind": "toybox_prompt"}}}},
            "evaluation.metrics.b.kind=toybox_prompt: toybox does not read the pictures of policy.kind=uno",
        ),
    ],
)
def test_parts_of_two_worlds(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Config.model_validate({"policy": {"kind": "uno"}} | changes)
