"""Photographs go down the path that ToyBox's own pictures take."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from customized_grpo.config.run import Config
from customized_grpo.data import Sample, write_metadata
from customized_grpo.toybox.language import ACCESSORY_WORDINGS, POSITION_WORDINGS, SCENE_WORDINGS
from customized_grpo.toybox.world import SHAPES

PHOTOGRAPHS = Path("../shared/data/dreambench/dataset")


@pytest.fixture
def photographs(repository: Path, tmp_path: Path) -> Path:
    """A data folder of all photographs, each with a ToyBox prompt."""
    source = repository / PHOTOGRAPHS
    if not source.is_dir():
        pytest.skip(f"the photographs are not here: no folder {PHOTOGRAPHS} beside the checkout")
    wordings = itertools.product(
        SHAPES,
        *(
            [w for ws in table.values() for w in ws]
            for table in (SCENE_WORDINGS, ACCESSORY_WORDINGS, POSITION_WORDINGS)
        ),
    )
    samples = []
    for path, words in zip(sorted(source.glob("*/*.jpg")), itertools.islice(wordings, 0, None, 7), strict=False):
        name = f"{path.parent.name}-{path.stem}"
        (tmp_path / "photographs").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "photographs" / f"{name}.jpg")
        samples.append(Sample(name, "a {} {} {}, {}".format(*words), (Path(f"{name}.jpg"),), subject=path.parent.name))
    write_metadata(tmp_path / "photographs", samples)
    return tmp_path / "photographs"


def test_photographs_are_trained_on_like_any_data(
    photographs: Path, make_config: Callable[..., Config], run_training: Callable[..., Path], tmp_path: Path
) -> None:
    assert len((photographs / "metadata.jsonl").read_text().splitlines()) == 158
    changes: dict[str, Any] = {"data.path": photographs, "data.test": photographs, "iterations": 1}
    run_training(make_config(changes | {"rollout.prompts_per_iteration": 6}))
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["invalid_share"] == 0 and metrics["grad_norm"] > 0
    records = json.loads((tmp_path / "run" / "evaluation" / "tuned.json").read_text())["records"]
    assert [record["subject"] for record in records] == ["backpack"] * 3
