"""Data of random pictures, as of a user's subjects."""

import json
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13
YCBCR = pytest.param(
    "YCbCr",
    marks=pytest.mark.skipif(OLD_PILLOW, reason="Pillow before 13 does not read such a TIFF of its own"),
)


def save_subjects(folder: Path, prompts: int = 1) -> Path:
    """Save three subjects in three shapes, with masks; the first two have one prompt each, the last has `prompts`."""
    lines = []
    for number, (height, width) in enumerate([(64, 64), (48, 80), (90, 60)]):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[8:-8, 8:-8] = 255
        Image.fromarray(mask).save(folder / f"{number}_mask.png")
        for prompt in range(prompts if number == 2 else 1):
            lines.append(
                {
                    "id": f"s{number}-{prompt}", "prompt": f"toy number {number} in scene {prompt}",
                    "references": [f"{number}.png"], "masks": [f"{number}_mask.png"], "subject": f"toy{number}",
                }
            )  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
