"""A small DreamBench: two objects and a dog, of two pictures each, with two prompts for objects and one for dogs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from customized_grpo.data import save_image

TEMPLATES = """Classes

subject_name,class
cup,cup
rc_car,toy
dog6,dog

Prompts

Object prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live subject prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


@pytest.fixture
def picture() -> Callable[..., Tensor]:
    """Makes random pictures [3, height, width] in [0, 1], on 8-bit levels as a file's are."""

    def picture(height: int = 40, width: int = 32, seed: int = 0) -> Tensor:
        coarse = torch.rand(3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
        return (coarse.repeat_interleave(8, 1).repeat_interleave(8, 2) * 255).round() / 255

    return picture


@pytest.fixture
def dreambench(tmp_path: Path, picture: Callable[..., Tensor]) -> Path:
    folder = tmp_path / "dreambench"
    for number, name in enumerate(("cup", "rc_car", "dog6")):
        save_image(picture(seed=2 * number), folder / name / "00.png")
        save_image(picture(48, 40, seed=2 * number + 1), folder / name / "01.png")
    (folder / "prompts_and_classes.txt").write_text(TEMPLATES)
    return folder
