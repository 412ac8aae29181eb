import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from customized_grpo.config.policy import PolicyConfig, ToyBoxPolicyConfig
from customized_grpo.config.run import Config
from customized_grpo.distributed.env import local_rank, local_world
from customized_grpo.errors import UserError
from customized_grpo.factory.data import encode_ahead, read_dataset
from customized_grpo.factory.policy import build_policy, resolve_policy_config
from customized_grpo.runtime.device import configure, device_memory, peak_memory, resolve_device, resolve_precision

LAUNCHED = (
    "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    "SLURM_LOCALID", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
TORCHRUN = {"WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"WORLD_SIZE": "8", "SLURM_LOCALID": "2"}
MPIRUN = {
    "WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "SLURM_LOCALID": "0",
}  # fmt: skip
EVERY_LAUNCHER = pytest.mark.parametrize("launched", [TORCHRUN, SRUN, MPIRUN], ids=["torchrun", "srun", "mpirun"])


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, launched: dict[str, str]) -> None:
    """A process that was launched in this environment, on a machine with so many GPUs."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def test_a_named_precision_is_kept() -> None:
    assert resolve_precision("fp32") == "fp32"
    assert resolve_precision("bf16") == "bf16"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_only_where_the_processor_multiplies_it(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: native)
    assert resolve_precision("auto") == expected


@EVERY_LAUNCHER
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_has_a_gpu_of_its_own(
    launched: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 4, launched)
    assert resolve_device(name) == torch.device("cuda:2")
    machine(monkeypatch, 1, launched | {"CUDA_VISIBLE_DEVICES": "2"})
    assert resolve_device(name) == torch.device("cuda:0")
    machine(monkeypatch, 0, launched)
    assert resolve_device("auto") == torch.device("cpu")


@EVERY_LAUNCHER
@pytest.mark.parametrize("gpus", [1, 2])
def test_more_processes_than_gpus(launched: dict[str, str], gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus, launched)
    with pytest.raises(
        UserError, match=rf"policy\.device: [34] processes of this machine want a GPU each, and see {gpus}"
    ):
        resolve_device("auto")
    assert resolve_device("cpu") == torch.device("cpu")


def test_nothing_tells_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 4, {"WORLD_SIZE": "2"})
    with pytest.raises(
        UserError, match=r"rewards\.local\.device: this is one of 2 processes, and .* of 4 GPUs .* LOCAL_RANK"
    ):
        resolve_device("auto", "rewards.local.")
    machine(monkeypatch, 4, {"WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert resolve_device("auto") == torch.device("cuda:0")


@EVERY_LAUNCHER
def test_one_gpu_for_all_processes(launched: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 4, launched)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    named = PolicyConfig(kind="uno", device="cuda:1")
    with pytest.raises(UserError, match=r"policy\.device: 'cuda:1' is one GPU, and each process .* use cuda"):
        resolve_policy_config(named)
    assert resolve_device("cuda:1", "rewards.") == torch.device("cuda:1")
    machine(monkeypatch, 4, {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    assert resolve_policy_config(named).precision == "bf16"


def test_where_nothing_tells_how_many_processes_there_are_each_encodes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 4, SRUN)
    seen: list[str] = []
    policy = Mock(precompute=lambda rows, references, share, on_progress: seen.extend(rows[n].prompt for n in share))
    samples = [Mock(prompt=str(number)) for number in range(3)]
    dataset: Any = Mock(samples=samples)
    encode_ahead(policy, {dataset: samples}, Mock())
    assert seen == ["0", "1", "2"]


def test_a_process_alone_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 4, TORCHRUN | MPIRUN | {"WORLD_SIZE": "1"})
    assert (local_rank(), local_world()) == (0, 1)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


def test_freed_memory_is_kept_for_toybox_alone(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another generator frees goes back to the system."""
    asked: list[int] = []
    library = Mock(mallopt=lambda option, value: asked.append(value))
    monkeypatch.setattr("customized_grpo.runtime.device.ctypes.CDLL", lambda name: library)
    monkeypatch.setattr("customized_grpo.runtime.device.sys.platform", "linux")
    configure(1)
    monkeypatch.setattr("customized_grpo.factory.pipelines.load_policy", lambda *arguments, **settings: None)
    build_policy(PolicyConfig(kind="uno"), 0)
    assert asked == []
    build_policy(PolicyConfig(toybox=ToyBoxPolicyConfig(weights=tiny_weights)), 0)
    assert asked == [1 << 30, 1 << 30]


@pytest.mark.parametrize(("rank", "refused"), [("0", True), ("1", False)])
def test_one_process_of_a_machine_decodes_the_pictures_for_all(
    rank: str, refused: bool, toybox_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(toybox_data / "test", tmp_path / "data")
    next(folder.rglob("*.png")).write_bytes(b"no picture")
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="no picture|cannot|not") if refused else nullcontext():
        read_dataset(folder, Config())


def test_memory_is_told_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (1, 24 * 2**30))
    assert device_memory(torch.device("cuda:0")) == 24 * 2**30
    assert device_memory(torch.device("cpu")) is None and device_memory(torch.device("mps")) is None


def test_the_peak_of_a_gpu_is_that_since_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    reset = Mock()
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", reset)
    assert peak_memory(torch.device("cpu")) is None
    reset.assert_not_called()
    assert peak_memory(torch.device("cuda:0")) == 5
    reset.assert_called_once_with(torch.device("cuda:0"))
