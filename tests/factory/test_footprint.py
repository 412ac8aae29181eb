"""What rewards hold in memory is known from the headers of their files, without a network."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from named_rewards import load_named, named

from customized_grpo.config.rewards import RewardConfig
from customized_grpo.errors import UserError
from customized_grpo.factory.footprint import score_bytes
from customized_grpo.factory.rewards import RewardLoader
from customized_grpo.runtime.device import CPU
from customized_grpo.testing.tiny_rewards import save_tiny_hpsv3, save_tiny_reward


def counted_bytes(settings: dict[str, Any], device: torch.device = CPU) -> tuple[dict[str, float], list[str]]:
    rewards = {f"rewards.{name}": RewardConfig.model_validate(reward) for name, reward in named(settings).items()}
    loader = RewardLoader(device)
    with patch("customized_grpo.factory.rewards.check_precision"):  # bf16 on a CPU too
        return score_bytes(rewards, device, loader, None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_those_that_are_loaded(precision: str, tmp_path: Path) -> None:
    models = {
        "prompt": save_tiny_reward("clip", tmp_path / "clip"),
        "identity": save_tiny_reward("dino", tmp_path / "d"),
    }
    settings = {"prompt": "clip_t", "identity": "dino", "local": {"precision": precision}}
    parts = {kind: {"model": str(models[side])} for side, kind in (("prompt", "clip_t"), ("identity", "dino"))}
    counted, unknown = counted_bytes(settings | parts)
    assert unknown == [] and list(counted) == ["rewards.prompt (clip_t)", "rewards.identity (dino)"]
    for reward, told in zip(load_named(settings | parts).values(), counted.values(), strict=True):
        model = reward._encoder._encode.__self__._model  # type: ignore[attr-defined]
        assert told == pytest.approx(sum(parameter.nbytes for parameter in model.parameters()), rel=0.01)


def test_weights_in_several_files(tmp_path: Path) -> None:
    folder = save_tiny_reward("clip", tmp_path / "clip")
    judge = {"url": "http://127.0.0.1:1/v1", "model": "m"}
    clip = {"model": str(folder)}
    judged = {"prompt": "clip_t", "clip_t": clip, "identity": "vlm_identity", "vlm_judge": judge}
    one = counted_bytes(judged)
    assert list(one[0]) == ["rewards.prompt (clip_t)"] and one[1] == []  # a judge is elsewhere
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shared = {"prompt": "clip_t", "identity": "clip_i", "clip_t": clip, "clip_i": clip}
    assert counted_bytes(shared) == one, "both read one model, which is loaded once"
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert counted_bytes(shared) == ({}, ["rewards.prompt (clip_t)", "rewards.identity (clip_i)"])


def test_hpsv3_is_in_bf16_on_cuda(tmp_path: Path) -> None:
    weights, _ = save_tiny_hpsv3(tmp_path)
    settings = {"prompt": "hpsv3", "identity": "dino", "hpsv3": {"model": str(weights)}, "dino": {"model": "nobody/no"}}
    on_cpu, unknown = counted_bytes(settings)
    assert unknown == ["rewards.identity (dino)"]
    assert counted_bytes(settings, torch.device("cuda"))[0]["rewards.prompt (hpsv3)"] * 2 == sum(on_cpu.values())
    weights.write_bytes(b"no header")
    with pytest.raises(UserError, match=r"damaged, or no safetensors file"):
        counted_bytes(settings)


def test_what_is_not_here_is_named() -> None:
    found = counted_bytes({"prompt": "hpsv3", "identity": "python:my.reward"})
    assert found == ({}, ["rewards.prompt (hpsv3)", "rewards.identity (python)"])


def test_what_runs_on_another_device_is_not_counted(tmp_path: Path) -> None:
    folder = save_tiny_reward("clip", tmp_path / "clip")
    settings = {"prompt": "clip_t", "clip_t": {"model": str(folder)}, "local": {"device": "cpu"}}
    assert list(counted_bytes(settings, torch.device("cuda"))[0]) == ["rewards.identity (toybox_identity)"]
