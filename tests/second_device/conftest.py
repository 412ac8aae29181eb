"""The second device, tiny generators and rewards on it, and data for them. Run by `make test-device`."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
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
    folder = tmp_path_factory.mktemp("photographs")
    lines = []
    for number, (height, width) in enumerate([(64, 64), (48, 80), (90, 60)]):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[8:-8, 8:-8] = 255
        Image.fromarray(mask).save(folder / f"{number}_mask.png")
        lines.append(
            {
                "id": f"s{number}", "prompt": f"toy number {number} in the snow", "references": [f"{number}.png"],
                "masks": [f"{number}_mask.png"], "subject": f"toy{number}",
            }
        )  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
