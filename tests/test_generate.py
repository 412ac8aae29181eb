from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageChops

from customized_grpo import build
from customized_grpo.config import Config
from customized_grpo.ema import Average
from customized_grpo.errors import UserError
from customized_grpo.generate import generate

PROMPT = "a star on the beach"


@pytest.fixture
def run(tmp_path: Path, make_config: Callable[..., Config]) -> Path:
    """A run folder with an adapter that draws otherwise than the base."""
    folder = tmp_path / "run"
    config = make_config({"output": folder})
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    policy = build.build_policy(config.policy, config.seed)
    for _, parameter in policy.trainable_parameters():
        parameter.data.add_(0.05)
    policy.save_adapter(folder)
    return folder


@pytest.fixture
def draw(run: Path, toybox_data: Path, tmp_path: Path) -> Callable[..., Image.Image]:
    """The picture that `generate` writes."""

    def write(**changes: Any) -> Image.Image:
        settings = {
            "run": run, "reference": toybox_data / "train" / "references" / "train-00000.png", "prompt": PROMPT,
            "out": tmp_path / "pictures" / "out.png", "base": False, "seed": 0, "count": 1,
        } | changes  # fmt: skip
        return Image.open(generate(**settings)).convert("RGB")

    return write


def differs(first: Image.Image, second: Image.Image) -> bool:
    return ImageChops.difference(first, second).getbbox() is not None


def test_equal_requests_draw_equal_pictures(draw: Callable[..., Image.Image]) -> None:
    assert not differs(draw(), draw())


def test_tuned_base_seed_prompt_and_reference_all_matter(draw: Callable[..., Image.Image], toybox_data: Path) -> None:
    other = toybox_data / "train" / "references" / "train-00001.png"
    for changes in ({"base": True}, {"seed": 1}, {"prompt": "a ghost in space"}, {"reference": other}):
        assert differs(draw(), draw(**changes)), changes


def test_pictures_stand_side_by_side_with_noises_of_their_own(draw: Callable[..., Image.Image]) -> None:
    single, three = draw(), draw(count=3)
    assert single.size == (256, 256) and three.size == (768, 256)
    tiles = [three.crop((256 * i, 0, 256 * (i + 1), 256)) for i in range(3)]
    assert differs(tiles[0], tiles[1]) and differs(tiles[1], tiles[2])
    assert max(high for _, high in ImageChops.difference(tiles[0], single).getextrema()) <= 1


def test_the_base_needs_no_adapter(draw: Callable[..., Image.Image], run: Path) -> None:
    (run / "adapter_model.safetensors").unlink()
    draw(base=True)
    with pytest.raises(UserError, match=r"no adapter there"):
        draw()


def test_averaged_weights_draw_otherwise(
    draw: Callable[..., Image.Image], run: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config()
    policy = build.build_policy(config.policy, config.seed)
    policy.load_adapter(run)
    average = Average(policy.trainable_parameters(), 0.9)
    for tensor in average.tensors.values():
        tensor += 0.05
    with average.swapped():
        policy.save_adapter(run / "ema")
    assert differs(draw(ema=True), draw())


def test_a_run_without_averaged_weights(draw: Callable[..., Image.Image]) -> None:
    with pytest.raises(UserError, match=r"--ema: .* holds no averaged weights .*ema\.decay"):
        draw(ema=True)
    with pytest.raises(UserError, match="--base .* and --ema .*; pass one of them"):
        draw(ema=True, base=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": Path("out.jpg")}, "ends in .png, not out.jpg"),
        ({"count": 0}, "--count: 0"),
        ({"prompt": "a zebra"}, "'zebra'"),
        ({"prompt": ""}, "empty"),
        ({"reference": Path("missing.png")}, "missing.png: no such image"),
        ({"run": Path("nowhere")}, "nowhere is not the folder of a run"),
    ],
)
def test_bad_requests_are_refused(
    draw: Callable[..., Image.Image], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        draw(**changes)
    assert not (tmp_path / "pictures").exists()
