"""Where and in what rewards compute, settings that nothing reads, and what several rewards share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from named_rewards import load_named, load_one, named
from pydantic import ValidationError
from torch import Tensor

from customized_grpo.cli.commands.serve_reward import load_reward
from customized_grpo.cli.main import main
from customized_grpo.config.rewards import ENCODERS, PRETRAINED, RewardConfig
from customized_grpo.config.rewards import KINDS as ALL
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.factory.config import resolve_config
from customized_grpo.factory.rewards import RewardLoader, build_rewards
from customized_grpo.rewards import hpsv3 as hpsv3_module
from customized_grpo.rewards.pretrained import PretrainedEncoder
from customized_grpo.runtime import device as runtime
from customized_grpo.testing.tiny_rewards import save_tiny_hpsv3, save_tiny_reward
from customized_grpo.training.resume import resume_fingerprint
from customized_grpo.types import PromptBatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
URL = "http://127.0.0.1:9"
OTHER: dict[str, Any] = {"micro_batch": 3, "device": "cpu", "precision": "fp32"}
"""Values that are not what is left out."""
KINDS: list[dict[str, Any]] = [
    {"kind": "toybox_prompt"},
    {"kind": "toybox_identity"},
    {"kind": "texture"},
    {"kind": "python", "python": {"function": "mine.red"}},
    {"kind": "remote", "remote": {"url": URL}},
    {"kind": "vlm_prompt", "vlm_judge": {"url": URL, "model": "m"}},
    {"kind": "vlm_identity", "vlm_judge": {"url": URL, "model": "m"}},
    {"kind": "hpsv3"},
    {"kind": "hpsv2", "hpsv2": {"model": "hps.safetensors"}},
    *({"kind": kind} for kind in ENCODERS if kind != "hpsv2"),
]
JUDGE = {"url": URL, "model": "m"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rewards")
    return {kind: save_tiny_reward(kind, root / kind) for kind in ("clip", "dino")}


def make_batch() -> tuple[Tensor, PromptBatch]:
    images = torch.rand(1, 4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    return images, PromptBatch(["a cat"], [[images[0, 0]]], None)


@pytest.mark.parametrize("reward", KINDS, ids=lambda reward: reward["kind"])
@pytest.mark.parametrize("name", OTHER)
def test_where_it_runs_is_of_pretrained_models_alone(name: str, reward: dict[str, Any]) -> None:
    changed = reward | {"local": {name: OTHER[name]}}
    if reward["kind"] in PRETRAINED:
        assert getattr(RewardConfig.model_validate(changed).local, name) == OTHER[name]
        return
    found = rf"local\.{name}: only for .* \(found kind={reward['kind']}\); leave it out"
    with pytest.raises(ValidationError, match=found):
        RewardConfig.model_validate(changed)


def test_all_kinds_are_tried() -> None:
    assert {reward["kind"] for reward in KINDS} == set(ALL)


def config(policy: str = "flux1-kontext", metrics: dict[str, Any] | None = None, **rewards: Any) -> Config:
    usual = {"prompt": "clip_t", "identity": "dino"} if policy != "toybox" else {}
    tree = {"policy": {"kind": policy}, "rewards": named(usual | rewards), "evaluation": {"metrics": metrics or {}}}
    return Config.model_validate(tree)


def test_a_run_may_go_on_elsewhere_but_not_in_another_precision() -> None:
    fields = resume_fingerprint(config(metrics={"held": {"kind": "clip_i"}}), {})
    for place in ("rewards.prompt", "rewards.identity", "evaluation.metrics.held"):
        assert f"{place}.local.device" not in fields and f"{place}.local.precision" in fields
        assert f"{place}.kind" in fields


def test_what_decides_which_adapter_is_kept_is_pinned() -> None:
    fields = resume_fingerprint(config(metrics={"held": {"kind": "clip_i"}}), {})
    for name in ("select", "held_out", "num_samples", "diversity_prompts"):
        assert f"evaluation.{name}" in fields
    for name in ("every", "patience", "gallery", "num_test_samples"):
        assert f"evaluation.{name}" not in fields


def test_a_server_may_come_back_elsewhere_but_its_model_may_not_be_another() -> None:
    def fields(**rewards: Any) -> dict[str, Any]:
        return resume_fingerprint(config(**rewards), {})

    served = fields(prompt="remote", remote={"url": "http://a:1", "timeout": 60})
    assert served == fields(prompt="remote", remote={"url": "http://b:2", "timeout": 300})
    assert served["rewards.prompt.kind"] == "remote"
    judge = {"prompt": "vlm_prompt", "identity": "vlm_identity"}
    first, second = ({"url": URL + path, "model": "m", "concurrency": n} for path, n in (("", 1), ("/other", 9)))
    assert fields(**judge, vlm_judge=first) == fields(**judge, vlm_judge=second)
    assert fields(**judge, vlm_judge=first) != fields(**judge, vlm_judge=first | {"model": "n"})


@pytest.mark.parametrize(
    ("rewards", "cuda", "expected"),
    [
        ({}, False, ("fp32", "fp32")),
        ({}, True, ("fp32", "fp32")),
        ({"local": {"precision": "bf16"}}, False, ("bf16", "bf16")),
        ({"prompt": "hpsv3"}, False, ("fp32", "fp32")),
        ({"prompt": "hpsv3"}, True, ("bf16", "fp32")),
        ({"prompt": "hpsv3", "local": {"precision": "fp32"}}, True, ("fp32", "fp32")),
        ({"prompt": "vlm_prompt", "vlm_judge": JUDGE, "identity": "vlm_identity"}, True, ("auto", "auto")),
    ],
)
def test_the_precision_is_written_down(
    rewards: dict[str, Any], cuda: bool, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HPSv3 taken from CUDA to a CPU is another reward: the two configurations differ, and --resume refuses."""
    for module in ("policy", "rewards"):
        monkeypatch.setattr(
            f"customized_grpo.factory.{module}.resolve_device", lambda name, prefix="policy.": CUDA if cuda else CPU
        )
    monkeypatch.setattr("customized_grpo.factory.policy.resolve_precision", lambda precision, device: "fp32")
    monkeypatch.setattr("customized_grpo.factory.rewards.check_precision", lambda *arguments: None)
    found = resolve_config(config(metrics={"held": {"kind": "clip_i"}}, **rewards))
    assert tuple(found.rewards[name].local.precision for name in ("prompt", "identity")) == expected
    assert found.evaluation.metrics["held"].local.precision == "fp32"
    assert Config.model_validate(found.model_dump(mode="json")) == found


def test_toybox_has_no_precision_to_write_down() -> None:
    found = resolve_config(config("toybox"))
    assert {reward.local.precision for reward in found.rewards.values()} == {"auto"}


def test_rewards_run_where_they_are_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("policy", "rewards"):
        monkeypatch.setattr(
            f"customized_grpo.factory.{module}.resolve_device",
            lambda name, prefix="policy.": torch.device("cuda:0" if name == "auto" else name),
        )
    monkeypatch.setattr("customized_grpo.factory.rewards.check_precision", lambda *arguments: None)
    rewards = {"a": {"kind": "clip_t"}, "b": {"kind": "clip_t", "local": {"device": "cuda:1"}}}
    loader = RewardLoader(torch.device("cuda:0"))
    found = [str(loader.device(name, RewardConfig.model_validate(reward))) for name, reward in rewards.items()]
    assert found == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu0", r"rewards\.prompt\.local\.device: 'gpu0' is no device"),
        ("cuda:99", r"rewards\.prompt\.local\.device: there is no 'cuda:99' here"),
    ],
)
def test_a_device_that_is_not_here(device: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_rewards(config(local={"device": device}))


def test_bf16_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "resolve_precision", lambda precision, device: "fp32")
    said = (
        r"rewards\.prompt\.local\.precision: bf16 is asked for, but the CPU here emulates it, "
        r".* or rewards\.prompt\.local\.device=cuda"
    )
    with pytest.raises(UserError, match=said):
        build_rewards(config(local={"precision": "bf16", "device": "cpu"}))


def test_encoders_in_bf16_round_the_scores_of_fp32(tiny: dict[str, Path]) -> None:
    settings: dict[str, Any] = {"prompt": "clip_t", "clip_t": {"model": str(tiny["clip"])}, "identity": "dino"}
    settings |= {"dino": {"model": str(tiny["dino"])}}
    images, batch = make_batch()
    for side in ("prompt", "identity"):
        full, auto, half = (
            load_named(settings | {"local": {"precision": precision}})[side].score(images, batch).values
            for precision in ("fp32", "auto", "bf16")
        )
        assert torch.equal(full, auto) and half.dtype == torch.float32
        assert 0 < (full - half).abs().max() < 0.05


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_is_computed_in_fp32(
    stored: torch.dtype, tiny: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(tiny["clip"]).to(stored).save_pretrained(tmp_path / "half")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((tiny["clip"] / name).read_bytes())
    settings = {"prompt": "clip_t", "clip_t": {"model": str(tmp_path / "half")}}
    reward: Any = load_named(settings)["prompt"]
    model = reward._encoder._encode.__self__._model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_hpsv3s_head_stays_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpsv3_module, "PIXELS", 9 * 28 * 28)
    weights, backbone = save_tiny_hpsv3(tmp_path)
    (tmp_path / "text").write_text("Rate it: {text_prompt} <|Reward|>")
    parts = {"model": str(weights), "backbone": str(backbone), "instruction": str(tmp_path / "text")}
    images, batch = make_batch()

    def load(precision: str) -> Any:
        return load_one("prompt", kind="hpsv3", hpsv3=parts, local={"precision": precision})

    half, full, auto = load("bf16"), load("fp32"), load("auto")
    assert half._model.backbone.dtype == torch.bfloat16 and half._model.rm_head[0].weight.dtype == torch.float32
    assert full._model.backbone.dtype == auto._model.backbone.dtype == torch.float32
    scores = half.score(images, batch)
    assert scores.valid.all() and scores.values.dtype == torch.float32
    assert 0 < (scores.values - full.score(images, batch).values).abs().max() < 0.1


def test_a_served_reward_computes_as_told(tiny: dict[str, Path]) -> None:
    local = {"device": "cpu", "precision": "fp32", "micro_batch": 2}
    reward: Any = load_reward("dino", {"model": str(tiny["dino"])}, local)
    assert reward._encoder._device == CPU and reward._encoder._micro_batch == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["hpsv2"], "--model: HPSv2 has no usual model"),
        (["hpsv2", "--model", "x.pt"], "--model: x.pt is a pickle"),
        (["dino", "--device", "gpu0"], "--device: 'gpu0' is no device"),
        (["dino", "--micro_batch", "0"], "--micro_batch: Input should be greater than or equal to 1 (found 0)"),
        (["dino", "--instruction", "x"], "--instruction: only for hpsv3"),
        (["python:mine.red", "--precision", "fp32"], "--precision: only for kind=dino, clip_i"),
    ],
)
def test_what_cannot_be_served(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def red(images, task):\n    return images[:, :, 0].mean((-2, -1))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["serve-reward", *options])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_bf16_is_not_served_where_it_is_emulated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "resolve_precision", lambda precision, device: "fp32")
    with pytest.raises(SystemExit):
        main(["serve-reward", "dino", "--precision", "bf16", "--device", "cpu"])
    assert "--precision: bf16 is asked for" in capsys.readouterr().err


def test_a_model_is_loaded_once_for_all_that_read_it(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    original = PretrainedEncoder.__init__

    def counted(self: PretrainedEncoder, field: str, *arguments: Any, **more: Any) -> None:
        loaded.append(field)
        original(self, field, *arguments, **more)

    monkeypatch.setattr(PretrainedEncoder, "__init__", counted)
    clip = {"model": str(tiny["clip"])}
    loader = RewardLoader(CPU)
    settings: dict[str, dict[str, Any]] = {
        "prompt": {"kind": "clip_t", "clip_t": clip}, "identity": {"kind": "clip_i", "clip_i": clip},
        "strict": {"kind": "clip_i", "clip_i": clip | {"several_references": "max"}},
        "again": {"kind": "clip_t", "clip_t": clip},
        "apart": {"kind": "clip_t", "clip_t": clip, "local": {"micro_batch": 2}},
    }  # fmt: skip
    rewards = {name: loader.load(name, RewardConfig.model_validate(each)) for name, each in settings.items()}
    assert loaded == ["prompt.clip_t.model", "apart.clip_t.model"]
    images, batch = make_batch()
    encoded: list[int] = []
    encoder: Any = rewards["identity"]
    inner = encoder._encoder._encode
    monkeypatch.setattr(encoder._encoder, "_encode", lambda pixels: encoded.append(len(pixels)) or inner(pixels))
    found = {name: reward.score(images, batch).values for name, reward in rewards.items()}
    assert encoded == [4, 1], "four images and one reference, each once"
    assert torch.equal(found["prompt"], found["again"]) and torch.equal(found["identity"], found["strict"])
    images.mul_(0.5)
    assert not torch.equal(rewards["identity"].score(images, batch).values, found["identity"]), "changed images are new"


def test_toyboxs_encoders_are_loaded_once_for_each_leak() -> None:
    loader = RewardLoader(CPU)
    leaks = ("low", "low", "high")
    found = [
        loader.load(leak, RewardConfig.model_validate({"kind": "toybox_identity", "toybox_identity": {"leak": leak}}))
        for leak in leaks
    ]
    assert found[0] is found[1] is not found[2]
