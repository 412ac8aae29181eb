"""The second device, tiny generators and rewards on it, and data for them. Run by `make test-device`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from photographs import save_subjects
from torch.nn.attention import SDPBackend, sdpa_kernel

from customized_grpo.factory.pipelines import PIPELINES
from customized_grpo.testing.tiny_pipelines import save_tiny
from customized_grpo.testing.tiny_rewards import KINDS, save_tiny_hpsv3, save_tiny_reward


@pytest.fixture(autouse=True)
def _one_attention() -> Iterator[None]:
    """Have one kind of attention on both devices: the one made for the CPU alone rounds otherwise."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(scope="session")
def generators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny generators by kind."""
    root = tmp_path_factory.mktemp("generators")
    return {kind: save_tiny(kind, root / kind) for kind in PIPELINES}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders and files of the tiny reward models by kind."""
    root = tmp_path_factory.mktemp("models")
    found = {kind: save_tiny_reward(kind, root / kind) for kind in KINDS}
    found["hpsv3"], found["backbone"] = save_tiny_hpsv3(root / "hpsv3")
    found["instruction"] = root / "instruction.txt"
    found["instruction"].write_text("Rate it: {text_prompt} <|Reward|>")
    return found


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of three subjects, in three shapes, with masks."""
    return save_subjects(tmp_path_factory.mktemp("photographs"))
