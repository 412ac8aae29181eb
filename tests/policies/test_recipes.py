"""The shipped recipes, with the tiny models substituted: each loads, trains two iterations and leaves its run."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from families import FAST, QUANTIZATION
from photographs import save_subjects
from PIL import Image
from safetensors.torch import load_file

from customized_grpo.cli.main import main
from customized_grpo.config.policy import PipelineConfig
from customized_grpo.config.recipes import find_recipe
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.factory.pipelines import PIPELINES
from customized_grpo.testing.tiny_pipelines import flux2_klein
from customized_grpo.testing.tiny_rewards import save_tiny_hpsv3, save_tiny_reward
from customized_grpo.training.dry_run import dry_run
from customized_grpo.training.estimate import Estimate

RECIPES = {
    "flux1-kontext": "flux1-kontext", "uno": "uno", "flux2-klein": "flux2-klein",
    "qwen-image-edit-plus": "qwen-image-edit-plus",
}  # fmt: skip
SMALL_GPU = {
    "flux1-kontext-24gb": "flux1-kontext", "flux2-klein-24gb": "flux2-klein",
    "qwen-image-edit-24gb": "qwen-image-edit-plus",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_subjects(tmp_path_factory.mktemp("data"), prompts=2)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rewards")
    models = {kind: save_tiny_reward(kind, root / kind) for kind in ("dino", "clip")}
    models["hpsv3"], models["backbone"] = save_tiny_hpsv3(root / "hpsv3")
    (root / "instruction.txt").write_text("Rate it: {text_prompt} <|Reward|>")
    return models | {"instruction": root / "instruction.txt"}


def command(recipe: str, model: Path, rewards: dict[str, Path], data: Path, output: Path) -> list[str]:
    """A recipe's command line with what is large replaced."""
    changes = {
        "policy.pipeline.model": model, "policy.lora_rank": 4, "policy.lora_alpha": 4,
        "policy.pipeline.height": 32, "policy.pipeline.width": 48,
        "policy.pipeline.reference_side": 32, "policy.precision": "fp32", "policy.device": "cpu",
        "policy.pipeline.cache": output.parent / "conditions",
        "rewards.identity.dino.model": rewards["dino"],
        "evaluation.metrics.clip_i.clip_i.model": rewards["clip"],
        "evaluation.metrics.clip_t.clip_t.model": rewards["clip"],
        "data.path": data, "data.test": data, "output": output,
        "data.validation": data, "iterations": 2, "threads": 1, "rollout.num_steps": 3, "rollout.group_size": 3,
        "rollout.prompts_per_iteration": 2, "evaluation.num_samples": 2, "evaluation.num_test_samples": 3,
        "evaluation.every": 1,
    }  # fmt: skip
    if recipe not in ("flux1-kontext", "uno"):
        changes["rewards.prompt.pickscore.model"] = rewards["clip"]
    else:
        changes |= {
            "rewards.prompt.hpsv3.model": rewards["hpsv3"], "rewards.prompt.hpsv3.backbone": rewards["backbone"],
            "rewards.prompt.hpsv3.instruction": rewards["instruction"],
        }  # fmt: skip
    options = [f"--{name}={value}" for name, value in changes.items()]
    if recipe == "uno":
        options.append("--policy.pipeline.base_adapter=null")
    return ["train", "--config", recipe, *options]


@pytest.mark.parametrize(
    "recipe",
    [
        *(name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES),
        pytest.param("qwen-image-edit-24gb", marks=[pytest.mark.slow, *QUANTIZATION]),  # it has the most forms
    ],
)
def test_a_recipe_trains(
    recipe: str, tiny_models: dict[str, Path], rewards: dict[str, Path], data: Path, tmp_path: Path,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:  # fmt: skip
    output = tmp_path / "run"
    arguments = command(recipe, tiny_models[(RECIPES | SMALL_GPU)[recipe]], rewards, data, output)
    done = run_python("-m", "customized_grpo", *arguments)
    assert done.returncode == 0, done.stderr
    assert "requires torchvision" not in done.stdout + done.stderr
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    for row in rows:
        assert row["first_ratio/min"] == pytest.approx(1, abs=1e-5)
        assert row["grad_norm"] > 0 and row["invalid_share"] == 0
        assert row["reward/prompt/std"] > 0 and row["reward/identity/std"] > 0
    assert (output / "report.html").stat().st_size > 10_000
    assert Image.open(next((output / "galleries").glob("*.png"))).size[0] > 48
    state = load_file(output / "pytorch_lora_weights.safetensors")
    assert any(name.endswith("lora_B.weight") and bool(tensor.any()) for name, tensor in state.items())
    if recipe == "flux1-kontext":
        pipe = DiffusionPipeline.from_pretrained(tiny_models[recipe])
        pipe.load_lora_weights(output)
        assert pipe.get_active_adapters()


def test_a_run_goes_on_draws_and_is_evaluated(
    tiny_models: dict[str, Path], rewards: dict[str, Path], data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe, output = "flux1-kontext", tmp_path / "run"
    arguments = command(recipe, tiny_models[recipe], rewards, data, output)
    main([*arguments, "--iterations=1"])
    one = load_file(output / "pytorch_lora_weights.safetensors")
    main([*arguments, "--resume"])
    assert "resuming after iteration 1" in capsys.readouterr().out
    resumed = load_file(output / "pytorch_lora_weights.safetensors")
    straight = command(recipe, tiny_models[recipe], rewards, data, tmp_path / "straight")
    main(straight)
    expected = load_file(tmp_path / "straight" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert any(not torch.equal(one[name], expected[name]) for name in expected)

    main(
        ["generate", "--run", str(output), "--reference", str(data / "1.png"), "--prompt", "a toy",
         "--out", str(tmp_path / "out.png"), "--count", "2"]
    )  # fmt: skip
    assert Image.open(tmp_path / "out.png").size[0] >= 2 * 256
    main(["evaluate", "--run", str(output), "--num_samples", "2"])
    assert json.loads((output / "evaluation" / "tuned.json").read_text())["pairs"] == 2


@pytest.mark.slow
@QUANTIZATION[0]
@QUANTIZATION[1]
def test_a_quantized_run_goes_on_to_the_bit(
    tiny_models: dict[str, Path], rewards: dict[str, Path], data: Path, tmp_path: Path,
) -> None:  # fmt: skip
    forms = ["--policy.pipeline.quantization=nf4", "--policy.pipeline.text_encoder_quantization=int8"]
    arguments, straight = (
        [*command("flux1-kontext", tiny_models["flux1-kontext"], rewards, data, tmp_path / name), *forms]
        for name in ("run", "straight")
    )
    main([*arguments, "--iterations=1"])
    main([*arguments, "--resume"])
    main(straight)
    resumed, expected = (
        load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("run", "straight")
    )
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert (row["first_ratio/min"], row["first_ratio/max"]) == pytest.approx((1, 1), abs=1e-6)
        assert row["grad_norm"] > 0
    main(["export", str(tmp_path / "run"), str(tmp_path / "adapter")])
    pipe = DiffusionPipeline.from_pretrained(tiny_models["flux1-kontext"])
    pipe.load_lora_weights(tmp_path / "adapter")
    assert pipe.get_active_adapters()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_says_what_it_takes(
    recipe: str,
    tiny_models: dict[str, Path],
    rewards: dict[str, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main([*command(recipe, tiny_models[RECIPES[recipe]], rewards, data, tmp_path / "run"), "--dry-run"])
    said = capsys.readouterr().out
    for words in (
        "parameters of the generator", "trained", "rollout", "update", "expected peak memory", "disk, a checkpoint",
        "weights of rewards.prompt", "weights of rewards.identity", "memory in the decoding", "disk, encoded prompts",
    ):  # fmt: skip
        assert words in said
    assert "not on this machine" not in said and "is not there" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--policy.pipeline.height=500", "height=500 is not a multiple of 16"),
        ("--policy.pipeline.model=nobody/nothing", "policy.pipeline.model: nobody/nothing is no folder here"),
        (
            "--evaluation.metrics.a.kind=toybox_prompt",
            "evaluation.metrics.a.kind=toybox_prompt: toybox does not read the pictures of policy.kind=flux1-kontext",
        ),
        (
            "--policy.pipeline.attention_backend=flash",
            "policy.pipeline.attention_backend: 'flash' runs on CUDA, and the device is cpu",
        ),
        ("--policy.device=cuda:9", "policy.device: there is no 'cuda:9' here"),
        (
            "--rewards.identity.dino.model=nobody/nothing",
            "rewards.identity.dino.model: nobody/nothing could not be loaded",
        ),
    ],
)
def test_bad_settings_end_in_one_line(
    option: str,
    said: str,
    tiny_models: dict[str, Path],
    rewards: dict[str, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = command("flux1-kontext", tiny_models["flux1-kontext"], rewards, data, tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        main([*arguments, option])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_distilled_model_is_counted_with_one_pass(tmp_path: Path) -> None:
    operations = []
    for distilled in (False, True):
        folder = tmp_path / str(distilled)
        flux2_klein(distilled=distilled).save_pretrained(folder)
        policy = {
            "kind": "flux2-klein",
            "pipeline": {"model": str(folder), "height": 32, "width": 32, "reference_side": 32},
        }
        tree = {"policy": policy, "rewards": {"prompt": {"kind": "clip_t"}, "identity": {"kind": "dino"}}}
        operations.append(dry_run(Config.model_validate(tree)).flops["rollout"])
    assert operations[0] == pytest.approx(2 * operations[1], rel=0.01)


def test_a_sharded_transformer_is_held_in_parts(tiny_models: dict[str, Path]) -> None:
    pipeline = {"model": str(tiny_models["flux1-kontext"]), "height": 32, "width": 32}

    def policy(*, fsdp: bool) -> dict[str, object]:
        return {"policy": {"kind": "flux1-kontext", "pipeline": pipeline | {"fsdp": fsdp}}}

    tree = {"rewards": {"prompt": {"kind": "clip_t"}, "identity": {"kind": "dino"}}}
    whole, shard = (
        dry_run(Config.model_validate(tree | policy(fsdp=sharded)), processes=2).memory for sharded in (False, True)
    )
    assert whole["frozen weights"] / 2 < shard["frozen weights"] < whole["frozen weights"]
    with pytest.raises(UserError, match=r"policy\.pipeline\.fsdp: a single process"):
        dry_run(Config.model_validate(tree | policy(fsdp=True)))


def test_encoders_are_counted_while_they_encode(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Beside rewards, and not beside the transformer; one without a configuration is named."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["flux1-kontext"], folder)
    tree = {
        "policy": {
            "kind": "flux1-kontext", "precision": "fp32",
            "pipeline": {"model": str(folder), "height": 64, "width": 64},
        },
        "rewards": {"prompt": {"kind": "clip_t"}, "identity": {"kind": "dino"}},
    }  # fmt: skip
    found = dry_run(Config.model_validate(tree))
    for name in ("text_encoder", "text_encoder_2", "vae"):
        stored = sum(each.nbytes for each in load_file(next((folder / name).glob("*.safetensors"))).values())
        assert found.before["encoding"][f"weights of {name}"] == stored
    assert found.peaks["encoding"] == sum(found.before["encoding"].values()) + sum(found.scores.values())
    assert min(found.scores.values()) > 1e8
    (folder / "text_encoder_2" / "config.json").unlink()
    assert "weights of text_encoder_2, while it encodes" in dry_run(Config.model_validate(tree)).not_counted


def test_blocks_that_wait_are_counted_on_the_host(tiny_models: dict[str, Path]) -> None:
    pipeline = {"model": str(tiny_models["flux1-kontext"]), "height": 32, "width": 32}

    def estimate(**more: object) -> Estimate:
        tree = {"rewards": {"prompt": {"kind": "clip_t"}, "identity": {"kind": "dino"}}}
        policy = {"kind": "flux1-kontext", "pipeline": pipeline | more}
        return dry_run(Config.model_validate(tree | {"policy": policy}))

    whole, waiting = estimate(), estimate(block_offload=True)
    saved = whole.memory["frozen weights"] - waiting.memory["frozen weights"]
    # Two double and two single blocks: all wait on the host, and copies of the double ones, which are larger, are on
    # the device.
    assert 0 < saved < waiting.host["blocks that wait"] / 2 < whole.memory["frozen weights"] / 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"fsdp": True}, "set fsdp=false or block_offload=false"),
        ({"compile": True}, "set compile=false"),
        ({"quantization": "nf4"}, "nf4 cannot be moved back and forth; set quantization=int8"),
        ({"gradient_checkpointing": False}, "would keep the weights of all blocks; set gradient_checkpointing=true"),
    ],
)
def test_blocks_wait_with_some_settings_only(more: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PipelineConfig.model_validate({"block_offload": True} | more)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["flux1-kontext-24gb", "flux2-klein-24gb"])
def test_a_recipe_fits_on_24_gb(recipe: str) -> None:
    """By the estimate, from the known architecture; rewards are counted in fp32, as where the dry run is. The third
    recipe, whose estimate takes a minute, is in docs/models.md."""
    tree = yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8"))
    tree["policy"]["device"] = "cpu"
    estimated = dry_run(Config.model_validate(tree))
    assert estimated.peak_bytes < 22 * 2**30
    assert sum(name.startswith("weights of ") for name in estimated.memory) == 3  # both CLIP metrics share one
    assert not any("weights of" in name for name in estimated.not_counted)


def test_every_family_but_the_largest_has_a_recipe() -> None:
    assert set(RECIPES.values()) == set(PIPELINES) - {"flux2"}
