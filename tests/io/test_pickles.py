"""No pickle is ever loaded, and no code beside a model run: what would make a folder lies under each name that is read,
and none is made."""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from named_rewards import load_named

from customized_grpo.config.policy import PolicyConfig
from customized_grpo.errors import UserError
from customized_grpo.factory.pipelines import load_policy
from customized_grpo.policies.conditions import ConditionCache
from customized_grpo.policies.diffusers_policy import DiffusersPolicy
from customized_grpo.testing.tiny_pipelines import save_tiny
from customized_grpo.testing.tiny_rewards import save_tiny_hpsv3, save_tiny_reward
from customized_grpo.toybox.encoders import IdentityEncoder
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.toybox.weights import load_network
from customized_grpo.training.checkpoint import MANIFEST, TENSORS, State, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
PickleBomb = Callable[[Path], None]
PlantCode = Callable[[Path, str], None]


class Bomb:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def plain(bomb: Bomb, path: Path) -> None:
    path.write_bytes(pickle.dumps(bomb))


def of_torch(bomb: Bomb, path: Path) -> None:
    torch.save({"weight": bomb}, path)


@pytest.fixture(params=[plain, of_torch])
def plant(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Lays a bomb at a path. In the end none of them has gone off."""
    marker = tmp_path / "it-went-off"

    def plant(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        request.param(Bomb(marker), path)

    yield plant
    assert not marker.exists()


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("flux1-kontext", tmp_path_factory.mktemp("kontext") / "model")


def load_kontext(model: Path, cache: Path, **more: Any) -> DiffusersPolicy:
    settings = {
        "kind": "flux1-kontext", "lora_rank": 4, "lora_alpha": 4, "precision": "fp32",
        "pipeline": {
            "model": str(model), "height": 64, "width": 64, "cache": cache, "reference_side": 64, **more,
        },
    }  # fmt: skip
    return load_policy(PolicyConfig.model_validate(settings), 0, CPU, bf16=False)


@pytest.mark.parametrize("write", [plain, of_torch])
def test_the_bomb_goes_off_where_it_is_unpickled(write: Callable[[Bomb, Path], None], tmp_path: Path) -> None:
    write(Bomb(tmp_path / "marker"), tmp_path / "bomb")
    if write is plain:
        pickle.loads((tmp_path / "bomb").read_bytes())
    else:
        torch.load(tmp_path / "bomb", weights_only=False)
    assert (tmp_path / "marker").is_dir()


def test_a_checkpoint(plant: PickleBomb, tmp_path: Path) -> None:
    """Its manifest has the hash of the bomb: the folder was made by somebody else."""
    network = torch.nn.Linear(3, 2)
    state = State(list(network.named_parameters()), torch.optim.AdamW(network.parameters()))
    path = save_checkpoint(tmp_path / "checkpoints", 1, {}, state.tensors())
    plant(path / TENSORS)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["sha256"]["tensors"] = hashlib.sha256((path / TENSORS).read_bytes()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{TENSORS}: damaged"):
        load_checkpoint(path, {}, state)
    plant(path / MANIFEST)
    with pytest.raises(UserError, match=f"{MANIFEST}: damaged"):
        load_checkpoint(path, {}, state)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_an_adapter_of_toybox(
    adapter: str, plant: PickleBomb, make_policy: Callable[..., ToyBoxPolicy], tmp_path: Path
) -> None:
    plant(tmp_path / "run" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: damaged, or no safetensors file"):
        make_policy(adapter=adapter).load_adapter(tmp_path / "run")


def test_weights_of_toybox(plant: PickleBomb, tiny_weights: Path, tmp_path: Path) -> None:
    plant(tmp_path / "generator.safetensors")
    with pytest.raises(UserError, match=r"generator\.safetensors: these are not weights"):
        ToyBoxPolicy.load(tmp_path)
    plant(tmp_path / "identity_encoder_high.safetensors")
    with pytest.raises(UserError, match=r"identity_encoder_high\.safetensors: these are not weights"):
        load_network(IdentityEncoder(), "identity_encoder_high", tmp_path)


def test_an_adapter_of_a_pipeline(plant: PickleBomb, kontext: Path, tmp_path: Path) -> None:
    plant(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: damaged, or no safetensors file"):
        load_kontext(kontext, tmp_path / "cache").load_adapter(tmp_path / "run")


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.bin", "pytorch_lora_weights.bin"])
def test_a_base_adapter(name: str, plant: PickleBomb, kontext: Path, tmp_path: Path) -> None:
    plant(tmp_path / name)
    with pytest.raises(UserError, match=r"policy\.pipeline\.base_adapter: .* damaged, or no safetensors file"):
        load_kontext(kontext, tmp_path / "cache", base_adapter=str(tmp_path / name))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "diffusion_pytorch_model.safetensors"),
        ("transformer", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.ckpt"),
        ("text_encoder", "pytorch_model.bin"),
        ("text_encoder_2", "model.ckpt"),
    ],
)
def test_a_part_of_a_pipeline(part: str, name: str, plant: PickleBomb, kontext: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(kontext, tmp_path / "model"))
    for weights in (model / part).glob("*.safetensors*"):
        weights.unlink()
    plant(model / part / name)
    with pytest.raises(UserError, match=r"policy\.pipeline\.model: .* could not be loaded: "):
        load_kontext(model, tmp_path / "cache")


def test_a_row_of_the_condition_cache(plant: PickleBomb, tmp_path: Path) -> None:
    cache = ConditionCache(tmp_path, "model")
    (path,) = cache.paths("a cat", []).values()
    plant(path)
    with pytest.raises(UserError, match="a damaged file of the condition cache"):
        cache.read("a cat", [])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.ckpt"])
@pytest.mark.parametrize("side", ["prompt", "identity"])
def test_an_encoder_as_a_reward(name: str, side: str, plant: PickleBomb, tmp_path: Path) -> None:
    models = {
        "prompt": save_tiny_reward("clip", tmp_path / "clip"), "identity": save_tiny_reward("dino", tmp_path / "dino"),
    }  # fmt: skip
    (models[side] / "model.safetensors").unlink()
    plant(models[side] / name)
    kinds = {"prompt": "clip_t", "identity": "dino"}
    settings = kinds | {kinds[k]: {"model": str(path)} for k, path in models.items()}
    with pytest.raises(UserError, match=rf"rewards\.{side}\.{kinds[side]}\.model: .* could not be loaded"):
        load_named(settings)


@pytest.fixture
def plant_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has a file of settings name code beside it for what transformers does not know; who is asked says yes. In the end
    it has not run."""
    marker = tmp_path / "it-ran"
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")

    def plant(path: Path, loader: str) -> None:
        (path.parent / "code_of_mine.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
        own = {"model_type": "mine", "image_processor_type": "Mine", "auto_map": {loader: "code_of_mine.Mine"}}
        path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | own))

    yield plant
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "loader"), [("config.json", "AutoConfig"), ("preprocessor_config.json", "AutoImageProcessor")]
)
def test_code_beside_a_reward(file: str, loader: str, plant_code: PlantCode, tmp_path: Path) -> None:
    clip = save_tiny_reward("clip", tmp_path / "clip")
    plant_code(clip / file, loader)
    with pytest.raises(UserError, match=r"rewards\.prompt\.clip_t\.model: .* could not be loaded"):
        load_named({"prompt": "clip_t", "clip_t": {"model": str(clip)}})


def test_code_beside_the_backbone_of_hpsv3(plant_code: PlantCode, tmp_path: Path) -> None:
    weights, backbone = save_tiny_hpsv3(tmp_path / "tiny")
    (tmp_path / "instruction").write_text("Rate {text_prompt} <|Reward|>")
    plant_code(backbone / "config.json", "AutoConfig")
    settings = {
        "prompt": "hpsv3",
        "hpsv3": {
            "model": str(weights), "backbone": str(backbone), "instruction": str(tmp_path / "instruction"),
        },
    }  # fmt: skip
    with pytest.raises(UserError, match=r"rewards\.prompt\.hpsv3\.backbone: .* could not be loaded"):
        load_named(settings)


def test_no_class_that_files_choose_may_run_their_code(repository: Path) -> None:
    """Left to themselves, these ask on the terminal."""
    sources = [path.read_text(encoding="utf-8") for path in (repository / "src").rglob("*.py")]
    calls = [call for text in sources for call in re.findall(r"Auto\w+\.from_pretrained\([^)]*\)", text)]
    assert len(calls) >= 4 and all("trust_remote_code=False" in call for call in calls)


def point_index(folder: Path, name: str, weights: str) -> None:
    """Have the weights in `folder` be in one shard, the file `name`, by an index that replaces `weights`."""
    (folder / weights).unlink()
    about = {"metadata": {"total_size": 1}, "weight_map": {"weight": name}}
    (folder / f"{weights}.index.json").write_text(json.dumps(about))


@pytest.mark.parametrize("name", ["w.bin", "../w.safetensors", "..\\w.safetensors", "sub/w.safetensors", "w"])
def test_an_index_of_a_pipeline_that_names_something_else(
    name: str, plant: PickleBomb, kontext: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(kontext, tmp_path / "model"))
    point_index(model / "transformer", name, "diffusion_pytorch_model.safetensors")
    plant(model / "transformer" / name)
    with pytest.raises(
        UserError, match=rf"policy\.pipeline\.model: .*index\.json names '{re.escape(name)}', expected safetensors"
    ):
        load_kontext(model, tmp_path / "cache")


@pytest.mark.parametrize("name", ["w.bin", "../w.safetensors"])
def test_an_index_of_a_reward_that_names_something_else(name: str, plant: PickleBomb, tmp_path: Path) -> None:
    dino = save_tiny_reward("dino", tmp_path / "dino")
    point_index(dino, name, "model.safetensors")
    plant(dino / name)
    with pytest.raises(
        UserError, match=rf"rewards\.identity\.dino\.model: .* names '{re.escape(name)}', expected safetensors"
    ):
        load_named({"identity": "dino", "dino": {"model": str(dino)}})


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": []}', '{"weight_map": null}'])
def test_an_index_that_is_none(index: str, tmp_path: Path) -> None:
    dino = save_tiny_reward("dino", tmp_path / "dino")
    (dino / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"rewards\.identity\.dino\.model: .*index\.json is no index of weights"):
        load_named({"identity": "dino", "dino": {"model": str(dino)}})


def test_an_index_on_the_hub(plant: PickleBomb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it lies in the cache once it is downloaded; offline, nothing else is asked."""
    cached = tmp_path / "hub" / "models--owner--dino"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    dino = save_tiny_reward("dino", cached / "snapshots" / ("0" * 40))
    point_index(dino, "w.bin", "model.safetensors")
    plant(dino / "w.bin")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        UserError, match=r"rewards\.identity\.dino\.model: owner/dino could not be loaded \(.*never read"
    ):
        load_named({"identity": "dino", "dino": {"model": "owner/dino"}})


def test_weights_that_a_configuration_names(plant: PickleBomb, tmp_path: Path) -> None:
    """The one name of a pickle that transformers takes there."""
    dino = save_tiny_reward("dino", tmp_path / "dino")
    about = json.loads((dino / "config.json").read_text())
    (dino / "config.json").write_text(json.dumps(about | {"transformers_weights": "adapter_model.bin"}))
    plant(dino / "adapter_model.bin")
    with pytest.raises(UserError, match=r"rewards\.identity\.dino\.model: .* could not be loaded \(.*never read"):
        load_named({"identity": "dino", "dino": {"model": str(dino)}})


@pytest.mark.parametrize("name", ["HPSv3.safetensors", "HPSv3.bin"])
def test_hpsv3(name: str, plant: PickleBomb, tmp_path: Path) -> None:
    _, backbone = save_tiny_hpsv3(tmp_path / "tiny")
    (tmp_path / "instruction").write_text("Rate {text_prompt} <|Reward|>")
    dino = save_tiny_reward("dino", tmp_path / "dino")
    plant(tmp_path / name)
    settings = {
        "prompt": "hpsv3", "identity": "dino", "dino": {"model": str(dino)},
        "hpsv3": {
            "model": str(tmp_path / name), "backbone": str(backbone), "instruction": str(tmp_path / "instruction"),
        },
    }  # fmt: skip
    with pytest.raises(UserError, match=r"rewards\.prompt\.hpsv3\.model: .* is damaged, or no safetensors file"):
        load_named(settings)
