"""Tiny generators, built once for all tests of a session; no test reaches a hub."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from customized_grpo.config.policy import PipelineConfig, PolicyConfig
from customized_grpo.factory.pipelines import load_policy
from customized_grpo.policies.diffusers_policy import DiffusersPolicy
from customized_grpo.testing.tiny_pipelines import MAKERS, save_tiny

KINDS = tuple(MAKERS)
Load = Callable[..., DiffusersPolicy]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny generators by kind."""
    root = tmp_path_factory.mktemp("tiny")
    return {kind: save_tiny(kind, root / kind) for kind in KINDS}


@pytest.fixture
def load(tiny_models: dict[str, Path], tmp_path: Path) -> Load:
    """Loads the tiny policy of a kind, in fp32 on the CPU, with more settings of `policy` or `policy.pipeline`."""

    def load(kind: str, seed: int = 0, **settings: object) -> DiffusersPolicy:
        pipeline = {
            "model": str(tiny_models[kind]), "height": 64, "width": 96, "reference_side": 64,
            "cache": tmp_path / "conditions",
        }  # fmt: skip
        common = {"kind": kind, "lora_rank": 4, "lora_alpha": 4, "device": "cpu", "precision": "fp32"}
        for name, value in settings.items():
            (pipeline if name in PipelineConfig.model_fields else common)[name] = value
        config = PolicyConfig.model_validate(common | {"pipeline": pipeline})
        return load_policy(config, seed, torch.device("cpu"), bf16=config.precision == "bf16")

    return load


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def picture() -> Callable[..., Tensor]:
    """Makes random pictures [3, height, width] in [0, 1], on 8-bit levels as a file's are."""

    def picture(height: int, width: int, seed: int = 0) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (3, height, width), generator=draw).float() / 255

    return picture


@pytest.fixture
def perturb() -> Callable[..., None]:
    """Gives LoRA factors, which start where they change nothing, values at which they do."""

    def perturb(policy: DiffusersPolicy, scale: float = 0.1) -> None:
        draw = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for _, parameter in policy.trainable_parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))

    return perturb
