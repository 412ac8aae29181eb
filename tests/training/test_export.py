"""The adapter of a checkpoint, and the run that starts from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from customized_grpo.cli import main as cli
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.run import Config, flatten
from customized_grpo.diagnosis.command import diagnose
from customized_grpo.errors import UserError
from customized_grpo.factory import pipelines
from customized_grpo.factory.policy import build_policy, build_start
from customized_grpo.generation import Options, write_pictures
from customized_grpo.testing.tiny_pipelines import MAKERS, save_tiny
from customized_grpo.tracking.console import Display
from customized_grpo.training.checkpoint import State, save_checkpoint
from customized_grpo.training.ema import EMA
from customized_grpo.training.export import export
from customized_grpo.training.run import evaluate_run

ADAPTER = "adapter_model.safetensors"
MakeConfig = Callable[..., Config]
RunTraining = Callable[..., Path]


@pytest.fixture(scope="module")
def trained_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of `trained` lie, once one test made them."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(params=["lora", "full"])
def trained(
    request: pytest.FixtureRequest, trained_place: Path, make_config: MakeConfig, run_training: RunTraining
) -> Config:
    """A run of two iterations with averaged weights, a checkpoint after each. Tests only read it."""
    changes = {"policy.toybox.adapter": request.param, "checkpoint.every": 1, "ema.decay": 0.5, "evaluation.every": 1}
    rank = {} if request.param == "lora" else {"policy.lora_rank": 32}
    config = make_config(changes | rank | {"output": trained_place / request.param, "ema.evaluate": False})
    if not config.output.exists():
        run_training(config)
    return config


@pytest.fixture
def draw(toybox_data: Path, tmp_path: Path) -> Callable[..., Image.Image]:
    def draw(run: Path, **changes: Any) -> Image.Image:
        reference = [toybox_data / "train" / "references" / "train-00000.png"]
        options = Options(run=run, reference=reference, prompt="a star on the beach", out=tmp_path / "out.png")
        return Image.open(write_pictures(Options(**vars(options) | changes))).convert("RGB")

    return draw


def same(first: Image.Image, second: Image.Image) -> bool:
    return ImageChops.difference(first, second).getbbox() is None


def test_an_exported_checkpoint_is_what_a_finished_run_leaves(
    trained: Config, tmp_path: Path, draw: Callable[..., Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained.output
    first, last = (run / "checkpoints" / f"00000{number}" for number in (1, 2))
    with monkeypatch.context() as patched:
        patched.setattr(
            "customized_grpo.factory.policy.build_policy", lambda *arguments: pytest.fail("the generator was loaded")
        )
        export(last, tmp_path / "last")
        export(last, tmp_path / "averaged", ema=True)
        export(first, tmp_path / "first")
        export(run, tmp_path / "copy")
        export(run, tmp_path / "copy-ema", ema=True)
    finished, averaged = (run / ADAPTER).read_bytes(), (run / "ema" / ADAPTER).read_bytes()
    assert finished != averaged
    found = {
        name: (tmp_path / name / ADAPTER).read_bytes() for name in ("last", "copy", "averaged", "copy-ema", "first")
    }
    assert found["last"] == found["copy"] == finished and found["averaged"] == found["copy-ema"] == averaged
    assert found["first"] not in (finished, averaged)
    assert same(draw(tmp_path / "last"), draw(run)) and same(draw(tmp_path / "first"), draw(run, checkpoint=first))
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["README.md", ADAPTER, "config.yaml"]


def test_an_export_is_evaluated_as_a_run(four: Path, tmp_path: Path, toybox_data: Path, display: Display) -> None:
    export(four / "checkpoints" / "000002", tmp_path / "out")
    folder = evaluate_run(tmp_path / "out", toybox_data / "test", 3, display)
    assert folder == tmp_path / "out" / "evaluation"
    assert json.loads((folder / "tuned.json").read_text())["iteration"] == 2


def contents(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Header and tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_checkpoint_of_a_pipeline_is_exported_without_the_pipeline(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "kind": kind, "lora_rank": 4, "lora_alpha": 8, "precision": "fp32", "device": "cpu",
        "pipeline": {"model": str(save_tiny(kind, tmp_path / "model")), "cache": str(tmp_path / "cache")},
    }  # fmt: skip
    rewards = {"prompt": {"kind": "clip_t"}, "identity": {"kind": "clip_i"}}
    config = Config.model_validate({"policy": settings, "rewards": rewards})
    policy = build_policy(config.policy, 0)
    average = EMA(policy.trainable_parameters(), 0.5)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    parameters = list(policy.trainable_parameters())
    state = State(parameters, torch.optim.AdamW([parameter for _, parameter in parameters]), average)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    checkpoint = save_checkpoint(
        tmp_path / "run" / "checkpoints", 1, flatten(config.model_dump(mode="json")), state.tensors()
    )
    policy.save_adapter(tmp_path / "saved")
    with average.swapped():
        policy.save_adapter(tmp_path / "saved-ema")
    shutil.rmtree(tmp_path / "model")
    monkeypatch.setattr(pipelines, "load_policy", lambda *arguments, **more: pytest.fail("the pipeline was loaded"))
    for name, ema in (("saved", False), ("saved-ema", True)):
        out = export(checkpoint, tmp_path / f"{name}-exported", ema=ema)
        # The bytes are not compared: safetensors writes the entries of a header in any order.
        found, expected = (contents(folder / "pytorch_lora_weights.safetensors") for folder in (out, tmp_path / name))
        assert found == expected and "lora_adapter_metadata" in found[0]


def test_what_cannot_be_exported(four: Path, tmp_path: Path) -> None:
    checkpoint = four / "checkpoints" / "000002"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    loose = shutil.copytree(checkpoint, tmp_path / "a" / "000002")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(four / "config.yaml", tmp_path / "run" / "config.yaml")
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / "000002")
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / "000003")
    for source, out, ema, said in (
        (checkpoint, "full", False, r"OUT: .*full is not empty; name a new folder"),
        (checkpoint, "full/file", False, r"OUT: .*file is a file"),
        (checkpoint, "out", True, "--ema: .* holds no averaged weights"),
        (four, "out", True, "--ema: .* holds no averaged weights"),
        (four / "checkpoints" / "000099", "out", False, r"SOURCE: .*000099 is no checkpoint: it has no manifest\.json"),
        (tmp_path / "nowhere", "out", False, "nowhere is not the folder of a run"),
        (loose, "out", False, "SOURCE: .*000002 does not stand in the folder of its run"),
        (tmp_path / "run", "out", False, r"SOURCE: .*run is not finished, .*; export its newest checkpoint, .*000003"),
        (tmp_path / "run" / "checkpoints" / "000003", "out", False, "damaged .iteration is 2 in the folder 000003"),
    ):
        with pytest.raises(UserError, match=said):
            export(source, tmp_path / out, ema=ema)
        assert not (tmp_path / "out").exists()
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["policy"]["lora_alpha"] = 8
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"of another generator than the run's \(policy\.lora_alpha: 32 -> 8\)"):
        export(tmp_path / "run" / "checkpoints" / "000002", tmp_path / "out")


def test_the_command_says_where_the_adapter_is(four: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["export", str(four / "checkpoints" / "000002"), str(tmp_path / "out")])
    assert capsys.readouterr().out == f"adapter: {tmp_path / 'out'}\n"


# a run that starts from an adapter


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_a_run_goes_on_from_an_exported_checkpoint(
    trained: Config, tmp_path: Path, make_settings: Callable[..., dict[str, Any]], run_training: RunTraining,
    draw: Callable[..., Image.Image],
) -> None:  # fmt: skip
    """It begins as the first one ended, trains on at another learning rate, and its base is still the first one's."""
    exported = export(trained.output / "checkpoints" / "000002", tmp_path / "exported")
    settings = trained.model_dump(mode="json")
    settings["policy"]["init_from"], settings["optimizer"]["learning_rate"] = str(exported), 1e-4
    settings["output"] = str(tmp_path / "second")
    config = Config.model_validate(settings)
    run_training(config)
    before, after = (rows(run, "evaluations.jsonl") for run in (trained.output, config.output))
    assert before[-1]["iteration"] == 2 and after[0]["iteration"] == 0
    assert {**after[0], "iteration": 2} == before[-1]
    # The row of references, and that of the base.
    first, second = (Image.open(run.output / "galleries" / "000000.png") for run in (trained, config))
    half = (0, 0, first.width, first.height * 2 // 3)
    assert same(first.crop(half), second.crop(half))
    assert (trained.output / ADAPTER).read_bytes() != (config.output / ADAPTER).read_bytes()
    shutil.rmtree(exported)  # what comes after training does without it
    assert same(draw(config.output, base=True), draw(trained.output, base=True))
    assert not same(draw(config.output), draw(trained.output))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_trained_values_are_the_adapters_and_untuned_is_the_base(
    adapter: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    settings = {"policy.toybox.adapter": adapter} | ({} if adapter == "lora" else {"policy.lora_rank": 32})
    plain = build_start(make_config(settings).policy, 0)
    other = build_start(make_config(settings).policy, 1)
    with torch.no_grad():
        for _, parameter in other.trainable_parameters():
            parameter.add_(0.05)
    other.save_adapter(tmp_path / "adapter")
    for place in (tmp_path / "adapter", tmp_path / "adapter" / ADAPTER):
        policy = build_start(make_config(settings | {"policy.init_from": place}).policy, 0)
        for (name, found), (_, expected) in zip(
            policy.trainable_parameters(), other.trainable_parameters(), strict=True
        ):
            assert torch.equal(found, expected), name
    condition = plain.encode(["a star on the beach"], torch.rand(1, 1, 3, 32, 32))
    latents, sigma = torch.randn(1, *plain.latent_shape), torch.tensor([0.5])
    with torch.no_grad(), policy.base_weights():
        assert torch.equal(policy.velocity(latents, sigma, condition), plain.velocity(latents, sigma, condition))
    with torch.no_grad():
        assert not torch.equal(policy.velocity(latents, sigma, condition), plain.velocity(latents, sigma, condition))


def test_a_pipeline_starts_from_a_lora(tmp_path: Path) -> None:
    settings = {
        "kind": "flux1-kontext", "lora_rank": 4, "lora_alpha": 4, "precision": "fp32", "device": "cpu",
        "pipeline": {
            "model": str(save_tiny("flux1-kontext", tmp_path / "model")), "cache": str(tmp_path / "cache"),
        },
    }  # fmt: skip
    other = build_start(PolicyConfig.model_validate(settings), 1)
    other.save_adapter(tmp_path / "lora")
    policy = build_start(PolicyConfig.model_validate(settings | {"init_from": str(tmp_path / "lora")}), 0)
    for (name, found), (_, expected) in zip(policy.trainable_parameters(), other.trainable_parameters(), strict=True):
        assert torch.equal(found, expected), name
    with pytest.raises(UserError, match=r"policy\.init_from: .* set policy\.lora_rank=4 and policy\.lora_alpha=4"):
        build_start(PolicyConfig.model_validate(settings | {"init_from": str(tmp_path / "lora"), "lora_rank": 8}), 0)


def test_an_adapter_that_training_cannot_start_from(
    four: Path, make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes, said in (
        ({"policy.lora_rank": 8}, r"set policy\.toybox\.adapter=lora, policy\.lora_rank=4, policy\.lora_alpha=32"),
        ({"policy.lora_alpha": 16}, r"its alpha is 32, expected 16\); set .*policy\.lora_alpha=32"),
        (
            {"policy.toybox.adapter": "full", "policy.lora_rank": 32},
            r"set policy\.toybox\.adapter=lora, policy\.lora_rank=4",
        ),
    ):
        with pytest.raises(UserError, match=rf"policy\.init_from: .*{said}"):
            run_training(make_config(changes | {"policy.init_from": four}))
    state = load_file(four / ADAPTER)
    next(iter(state.values())).view(-1)[0] = torch.nan
    save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match=r"policy\.init_from: .*damaged\.safetensors: 1 of its .* not finite"):
        run_training(make_config({"policy.init_from": tmp_path / "damaged.safetensors"}))
    monkeypatch.setattr(
        "customized_grpo.factory.policy.build_policy", lambda *arguments: pytest.fail("the generator was loaded")
    )
    with pytest.raises(UserError, match=r"policy\.init_from: .*nowhere.*: no adapter there"):
        run_training(make_config({"policy.init_from": tmp_path / "nowhere"}))
    assert not (tmp_path / "run").exists()


def test_a_diagnosis_measures_what_training_would_start_from(
    four: Path, make_config: MakeConfig, tmp_path: Path, display: Display
) -> None:
    counts = {"prompts": 2, "group_size": 2, "batches": 2}
    for name, changes in (("base", {}), ("started", {"policy.init_from": four})):
        diagnose(make_config(changes), tmp_path / name, display, **counts)
    first, second = (json.loads((tmp_path / name / "diagnosis.json").read_text()) for name in ("base", "started"))
    assert first["gradients"] != second["gradients"]


def test_the_shorthand_stands_for_the_field(
    four: Path, tmp_path: Path, make_settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found: list[Config] = []
    monkeypatch.setattr("customized_grpo.training.run.train", lambda config, display, **flags: found.append(config))
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(make_settings()))
    cli.main(["train", "--config", str(path), "--init_from", str(four)])
    assert found[0].policy.init_from == str(four)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--config", str(path), "--init-from", str(four), "--policy.init_from", "other"])
    assert caught.value.code == 2 and "--init_from stands for --policy.init_from" in capsys.readouterr().err
