"""Frozen weights spread over processes: what is computed is what it was, whoever has how much to do."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from customized_grpo import build
from customized_grpo.config import PolicyConfig
from customized_grpo.errors import UserError

Run = Callable[..., list[subprocess.CompletedProcess[str]]]
WORKER = Path(__file__).with_name("sharded.py")
QUIET = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`sharded.py` in two processes; several parts of it one after the other."""

    def run(what: str, folder: Path = tmp_path) -> list[subprocess.CompletedProcess[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(WORKER), what, str(folder)]
        processes = [
            subprocess.Popen(
                command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=os.environ | QUIET | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [
            subprocess.CompletedProcess(command, process.returncode, *each)
            for process, each in zip(processes, said, strict=True)
        ]

    return run


def test_a_phase_ends_when_all_have_done_their_shares_or_one_has_failed_or_is_to_stop(run: Run) -> None:
    for process in run("shares,fails,stops"):
        assert process.returncode == 0, process.stderr


def test_a_killed_process_leaves_none_waiting(run: Run) -> None:
    first, second = run("dies")
    assert second.returncode == -9
    assert first.returncode == 1
    assert "process 1 (host" in first.stderr
    assert "is gone" in first.stderr


def test_families_sharded_compute_what_they_do_whole(run: Run, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    for kind, folder in tiny_models.items():
        (tmp_path / kind).symlink_to(folder)
    for process in run("families"):
        assert process.returncode == 0, process.stderr


@pytest.fixture
def data(tmp_path: Path, picture: Callable[..., torch.Tensor]) -> Path:
    """Three prompts, whose references go through the transformer apart."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for number, (height, width) in enumerate([(64, 64), (48, 96), (96, 48)]):
        pixels = (picture(height, width, number) * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append({"id": f"s{number}", "prompt": f"toy number {number}", "references": [f"{number}.png"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "own.py").write_text(
        "def bright(images, task):\n    return images.mean((2, 3, 4))\n\n\n"
        "def red(images, task):\n    return images[:, :, 0].mean((2, 3))\n"
    )
    return folder


@pytest.fixture
def train(tiny_models: dict[str, Path], data: Path, tmp_path: Path) -> Callable[..., Path]:
    """The train command on a tiny FLUX.1 Kontext, in two processes with 1 and 2 prompts; the first has no pair to
    validate on."""

    def train(output: Path, *flags: str, **changes: Any) -> Path:
        settings = {
            "output": output, "iterations": 2, "threads": 1, "data.path": data, "data.test": data,
            "policy.kind": "flux1-kontext", "policy.model": tiny_models["flux1-kontext"], "policy.lora_rank": 4,
            "policy.lora_alpha": 4, "policy.height": 32, "policy.width": 48, "policy.reference_side": 48,
            "policy.precision": "fp32", "policy.device": "cpu", "policy.cache": tmp_path / "conditions",
            "rewards.prompt": "python:own.bright", "rewards.identity": "python:own.red",
            "rewards.identity_reference": "whole", "rollout.num_steps": 3, "rollout.group_size": 3,
            "rollout.prompts_per_iteration": 3, "rollout.micro_batch": 4, "optimizer.micro_batch": 4,
            "optimizer.updates_per_iteration": 2, "objective.kl_weight": 0.1, "evaluation.judge": "none",
            "evaluation.every": 1, "evaluation.pairs": 1, "evaluation.test_pairs": 3, "evaluation.gallery": 1,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }  # fmt: skip
        command = [sys.executable, "-m", "customized_grpo", "train", "--num_processes", "2", *flags]
        command += [f"--{name}={value}" for name, value in settings.items()]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | QUIET, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return output

    return train


def test_a_sharded_run_is_the_run_that_was_not_and_each_goes_on_as_the_other(
    train: Callable[..., Path], tmp_path: Path, read_log: Callable[..., list[dict[str, Any]]]
) -> None:
    whole, sharded = train(tmp_path / "whole"), train(tmp_path / "sharded", policy__shard="true")
    _assert_same(whole, sharded, read_log)
    began = {True: shutil.copytree(whole, tmp_path / "a"), False: shutil.copytree(sharded, tmp_path / "b")}
    ended = [
        train(output, "--resume", iterations=3, policy__shard=str(shard).lower()) for shard, output in began.items()
    ]
    _assert_same(*ended, read_log)


def _assert_same(one: Path, other: Path, read_log: Callable[..., list[dict[str, Any]]]) -> None:
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        rows, others = read_log(one / log), read_log(other / log)
        assert len(rows) == len(others) > 1
        for row, expected in zip(rows, others, strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)
    adapters = [load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, other)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-6, rtol=0)
    assert any(tensor.abs().max() > 0 for name, tensor in adapters[0].items() if "lora_B" in name)


def test_what_cannot_be_sharded_is_refused() -> None:
    config = PolicyConfig(kind="flux1-kontext", shard=True, device="cpu")
    with pytest.raises(UserError, match=r"policy\.shard: a single process .*; start several"):
        build.check_shard(config, 1)
    build.check_shard(config, 2)
    with pytest.raises(ValueError, match="shard: not for kind='toybox'"):
        PolicyConfig(shard=True)
