"""What rewards hold in memory is known from the headers of their files, without a network."""

import json
from pathlib import Path

import pytest
import torch

from customized_grpo.config.rewards import RewardsConfig
from customized_grpo.errors import UserError
from customized_grpo.factory.footprint import reward_bytes
from customized_grpo.factory.rewards import load_rewards
from customized_grpo.runtime.device import CPU
from customized_grpo.testing.tiny_rewards import save_tiny_hpsv3, save_tiny_reward


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_those_that_are_loaded(precision: str, tmp_path: Path) -> None:
    models = {
        "prompt": save_tiny_reward("clip", tmp_path / "clip"),
        "identity": save_tiny_reward("dino", tmp_path / "d"),
    }
    settings = {"prompt": "clip_t", "identity": "dino", "local": {"precision": precision}}
    parts = {kind: {"model": str(models[side])} for side, kind in (("prompt", "clip_t"), ("identity", "dino"))}
    config = RewardsConfig.model_validate(settings | parts)
    counted, unknown = reward_bytes(config, CPU, None)
    assert unknown == [] and list(counted) == ["rewards.prompt (clip_t)", "rewards.identity (dino)"]
    for reward, told in zip(load_rewards(config, CPU).values(), counted.values(), strict=True):
        model = reward._encoder._encode.__self__._model  # type: ignore[attr-defined]
        assert told == pytest.approx(sum(parameter.nbytes for parameter in model.parameters()), rel=0.01)


def test_weights_in_several_files(tmp_path: Path) -> None:
    folder = save_tiny_reward("clip", tmp_path / "clip")
    judge = {"url": "http://127.0.0.1:1/v1", "model": "m"}
    clip = {"model": str(folder)}
    judged = {"prompt": "clip_t", "clip_t": clip, "identity": "vlm_judge", "vlm_judge": judge}
    one = reward_bytes(RewardsConfig.model_validate(judged), CPU, None)
    assert list(one[0]) == ["rewards.prompt (clip_t)"] and one[1] == []  # a judge is elsewhere
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = RewardsConfig.model_validate({"prompt": "clip_t", "identity": "clip_i", "clip_t": clip, "clip_i": clip})
    several, unknown = reward_bytes(config, CPU, None)
    assert unknown == [] and [*several.values()] == [*one[0].values()] * 2
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert reward_bytes(config, CPU, None) == ({}, ["rewards.prompt (clip_t)", "rewards.identity (clip_i)"])


def test_hpsv3_is_in_bf16_on_cuda(tmp_path: Path) -> None:
    weights, _ = save_tiny_hpsv3(tmp_path)
    config = RewardsConfig.model_validate(
        {"prompt": "hpsv3", "identity": "dino", "hpsv3": {"model": str(weights)}, "dino": {"model": "nobody/nothing"}}
    )
    on_cpu, unknown = reward_bytes(config, CPU, None)
    assert unknown == ["rewards.identity (dino)"]
    assert reward_bytes(config, torch.device("cuda"), None)[0]["rewards.prompt (hpsv3)"] * 2 == sum(on_cpu.values())
    weights.write_bytes(b"no header")
    with pytest.raises(UserError, match=r"damaged, or no safetensors file"):
        reward_bytes(config, CPU, None)


def test_what_is_not_here_is_named() -> None:
    config = RewardsConfig(prompt="hpsv3", identity="python:my.reward")
    assert reward_bytes(config, CPU, None) == ({}, ["rewards.prompt (hpsv3)", "rewards.identity (python:my.reward)"])
