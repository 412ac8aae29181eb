"""Frozen weights spread over processes: what is computed is what it was, whoever has how much to do."""

import json
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import Process
from named_rewards import named
from safetensors.torch import load_file

from customized_grpo.config.policy import PipelineConfig, PolicyConfig
from customized_grpo.config.run import flatten
from customized_grpo.data import save_image
from customized_grpo.errors import UserError
from customized_grpo.factory.policy import check_shard

Run = Callable[..., list[subprocess.CompletedProcess[str]]]
WORKER = Path(__file__).with_name("sharded.py")
MOST_GROUPS = 5
"""Process groups that a test needs, one after the other."""


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


@pytest.fixture
def run(tmp_path: Path, python: Callable[..., Process]) -> Run:
    """Parts of `sharded.py`, one after the other, in two processes."""

    def run(*parts: str) -> list[subprocess.CompletedProcess[str]]:
        shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        command = [WORKER, tmp_path, ",".join(parts), *free_ports(MOST_GROUPS)]
        processes = [python(*command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(2)]
        said = [process.communicate(timeout=240) for process in processes]
        return [
            subprocess.CompletedProcess(process.args, process.wait(), *each)
            for process, each in zip(processes, said, strict=True)
        ]

    return run


def test_a_phase_ends_when_all_have_done_their_shares_or_one_has_failed_or_is_to_stop(run: Run) -> None:
    for process in run("shares", "fails", "stops"):
        assert process.returncode == 0, process.stderr


def test_a_killed_process_leaves_none_waiting(run: Run) -> None:
    first, second = run("dies")
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 1
    assert "process 1 (host" in first.stderr
    assert "is gone" in first.stderr


@pytest.fixture
def settings(tiny_models: dict[str, Path], picture: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    """Of a small run, in which one process has one prompt, the other two, and the first no pair to validate on. Each
    reference has a shape of its own, and goes through the transformer apart."""
    for kind, folder in tiny_models.items():
        (tmp_path / kind).symlink_to(folder)
    data = tmp_path / "data"
    data.mkdir()
    lines = []
    for number, (height, width) in enumerate([(64, 64), (48, 96), (96, 48)]):
        save_image(picture(height, width, number), data / f"{number}.png")
        lines.append({"id": f"s{number}", "prompt": f"toy number {number}", "references": [f"{number}.png"]})
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "own.py").write_text(
        "def bright(images, task):\n    return images.mean((2, 3, 4))\n\n\n"
        "def red(images, task):\n    return images[:, :, 0].mean((2, 3))\n"
    )
    policy = {
        "kind": "flux1-kontext", "lora_rank": 4, "lora_alpha": 4, "precision": "fp32", "device": "cpu",
        "pipeline": {
            "model": str(tmp_path / "flux1-kontext"), "height": 32, "width": 48, "reference_side": 48,
            "cache": str(tmp_path / "conditions"),
        },
    }  # fmt: skip
    tree = {
        "threads": 1, "policy": policy, "data": {"path": str(data), "test": str(data)},
        "rewards": named({"prompt": "python:own.bright", "identity": "python:own.red"}),
        "rollout": {"num_steps": 3, "group_size": 3, "prompts_per_iteration": 3, "micro_batch": 4},
        "optimizer": {"num_minibatches": 2, "micro_batch": 4},
        "objective": {"kl_weight": 0.1, "old_log_probs": "recomputed"},
        "evaluation": {"every": 1, "num_samples": 1, "num_test_samples": 3, "gallery": 1},
    }  # fmt: skip
    (tmp_path / "settings.json").write_text(json.dumps(tree))


@pytest.mark.usefixtures("settings")
def test_sharded_weights_compute_what_whole_ones_do(run: Run) -> None:
    for process in run("family"):
        assert process.returncode == 0, process.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("settings")
def test_sharded_weights_change_nothing_and_a_run_goes_on_without_them(
    run: Run, tmp_path: Path, read_log: Callable[..., list[dict[str, Any]]]
) -> None:
    for process in run("families", "runs"):
        assert process.returncode == 0, process.stderr
    for iterations in (2, 3):
        one, other = (tmp_path / f"{name}-{iterations}" for name in ("whole", "sharded"))
        for log in ("metrics.jsonl", "evaluations.jsonl"):
            for row, expected in zip(read_log(one / log), read_log(other / log), strict=True):
                assert row.pop("steps", None) == expected.pop("steps", None)
                assert row.pop("intervals", None) == expected.pop("intervals", None)
                assert flatten(row) == pytest.approx(flatten(expected), rel=1e-6, abs=1e-6)
        adapters = [load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, other)]
        for name, tensor in adapters[0].items():
            torch.testing.assert_close(adapters[1][name], tensor, atol=1e-6, rtol=0)
        assert any(tensor.abs().max() > 1e-4 for name, tensor in adapters[0].items() if "lora_B" in name)


def test_what_cannot_be_sharded_is_refused() -> None:
    config = PolicyConfig(kind="flux1-kontext", pipeline=PipelineConfig(fsdp=True), device="cpu")
    with pytest.raises(UserError, match=r"policy\.pipeline\.fsdp: a single process .*; start several"):
        check_shard(config, 1)
    check_shard(config, 2)
    with pytest.raises(ValueError, match="pipeline.fsdp: only for kind=flux1-kontext, .*found kind=toybox"):
        PolicyConfig(pipeline=PipelineConfig(fsdp=True))
