import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageChops

from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.factory.policy import build_policy
from customized_grpo.generation import Options, write_pictures
from customized_grpo.testing.tiny_pipelines import save_tiny
from customized_grpo.training.ema import EMA

PROMPT = "a star on the beach"


@pytest.fixture
def run(tmp_path: Path, make_config: Callable[..., Config]) -> Path:
    """A run folder with an adapter that draws otherwise than the base."""
    folder = tmp_path / "run"
    config = make_config({"output": folder})
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    policy = build_policy(config.policy, config.seed)
    for _, parameter in policy.trainable_parameters():
        parameter.data.add_(0.05)
    policy.save_adapter(folder)
    return folder


@pytest.fixture
def draw(run: Path, toybox_data: Path, tmp_path: Path) -> Callable[..., Image.Image]:
    """The picture that `generate` writes."""

    def write(**changes: Any) -> Image.Image:
        references = [toybox_data / "train" / "references" / "train-00000.png"]
        settings = {"run": run, "reference": references, "prompt": PROMPT, "out": tmp_path / "pictures" / "out.png"}
        return Image.open(write_pictures(Options(**settings | changes))).convert("RGB")

    return write


def differs(first: Image.Image, second: Image.Image) -> bool:
    return ImageChops.difference(first, second).getbbox() is not None


def test_equal_requests_draw_equal_pictures(draw: Callable[..., Image.Image]) -> None:
    assert not differs(draw(), draw())


def test_tuned_base_seed_prompt_and_reference_all_matter(draw: Callable[..., Image.Image], toybox_data: Path) -> None:
    other = toybox_data / "train" / "references" / "train-00001.png"
    for changes in ({"base": True}, {"seed": 1}, {"prompt": "a ghost in space"}, {"reference": [other]}):
        assert differs(draw(), draw(**changes)), changes


def test_steps_are_the_runs_unless_asked_for(draw: Callable[..., Image.Image]) -> None:
    assert differs(draw(), draw(num_steps=3)) and not differs(draw(), draw(num_steps=4))


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
    policy = build_policy(config.policy, config.seed)
    policy.load_adapter(run)
    average = EMA(policy.trainable_parameters(), 0.9)
    for tensor in average.tensors.values():
        tensor += 0.05
    with average.swapped():
        policy.save_adapter(run / "ema")
    assert differs(draw(ema=True), draw())


def test_a_run_without_averaged_weights(draw: Callable[..., Image.Image]) -> None:
    with pytest.raises(UserError, match=r"--ema: .* holds no averaged weights .*ema\.decay"):
        draw(ema=True)
    for changes in ({"ema": True}, {"checkpoint": Path("somewhere")}):
        with pytest.raises(UserError, match="--base is the generator before training, .*; leave --base out"):
            draw(base=True, **changes)


def test_a_checkpoint_draws_as_the_run_did_then(
    draw: Callable[..., Image.Image], make_config: Callable[..., Config], run_training: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    run = tmp_path / "trained"
    changes = {"checkpoint.every": 1, "ema.decay": 0.9, "optimizer.learning_rate": 0.02, "output": run}
    run_training(make_config(changes))
    first, last = (run / "checkpoints" / f"00000{number}" for number in (1, 2))
    finished, averaged = draw(run=run), draw(run=run, ema=True)
    assert not differs(draw(run=run, checkpoint=last), finished)
    assert not differs(draw(run=run, checkpoint=last, ema=True), averaged) and differs(finished, averaged)
    assert differs(draw(run=run, checkpoint=first), finished)
    (run / "adapter_model.safetensors").unlink()
    for ema in (False, True):
        with pytest.raises(UserError, match=f"--run: {run} is not finished, .* with --checkpoint {last}"):
            draw(run=run, ema=ema)
    assert not differs(draw(run=run, checkpoint=last), finished)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["policy"]["lora_alpha"] = 8
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"000002: of another generator than the run's \(policy.lora_alpha: 32 -> 8\)"):
        draw(run=run, checkpoint=last)


def test_several_references_and_another_size(
    draw: Callable[..., Image.Image], make_settings: Callable[..., dict[str, Any]], toybox_data: Path, tmp_path: Path
) -> None:
    settings = make_settings({"rewards": {"prompt": {"kind": "clip_t"}, "identity": {"kind": "dino"}}})
    settings["policy"] = {
        "kind": "flux2-klein", "lora_rank": 4, "device": "cpu", "precision": "fp32",
        "pipeline": {
            "model": str(save_tiny("flux2-klein", tmp_path / "klein")), "height": 64, "width": 64,
            "reference_side": 64, "cache": str(tmp_path / "cache"),
        },
    }  # fmt: skip
    run = tmp_path / "klein-run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    two = [toybox_data / "train" / "references" / f"train-0000{number}.png" for number in (0, 1)]
    asked = {"run": run, "base": True, "device": "cpu"}
    single = draw(**asked, reference=two[:1])
    assert single.size == (256, 256)
    assert differs(draw(**asked, reference=two), single) and not differs(draw(**asked, reference=two[:1]), single)
    assert draw(**asked, height=32, width=48).size == (6 * 48, 6 * 32)
    for changes, message in (
        ({"device": "tpu"}, "device: 'tpu' is no device"),
        ({"height": 40}, "--height=40 is not a multiple of 16"),
        ({"precision": "fp8"}, "--precision: Input should be 'auto', 'fp32' or 'bf16'"),
    ):
        with pytest.raises(UserError, match=message):
            draw(**asked | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": Path("out.jpg")}, "ends in .png, not out.jpg"),
        ({"count": 0}, "--count: 0"),
        ({"prompt": "a zebra"}, "'zebra'"),
        ({"prompt": ""}, "empty"),
        ({"num_steps": 0}, "--num_steps: .* in 0 steps"),
        ({"reference": [Path("missing.png")]}, "missing.png: no such image"),
        ({"device": "cuda"}, "--device=cuda: ToyBox runs on the CPU"),
        ({"height": 64, "width": 64}, "--height, width: only for kind=flux1-kontext, .*found kind=toybox"),
        ({"checkpoint": Path("nowhere")}, "nowhere/manifest.json: damaged or missing"),
        ({"run": Path("nowhere")}, "nowhere is not the folder of a run"),
    ],
)
def test_bad_requests_are_refused(
    draw: Callable[..., Image.Image], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        draw(**changes)
    assert not (tmp_path / "pictures").exists()


def test_toybox_takes_one_reference(draw: Callable[..., Image.Image], toybox_data: Path) -> None:
    with pytest.raises(UserError, match="takes one reference image, not 2"):
        draw(reference=[toybox_data / "train" / "references" / f"train-0000{number}.png" for number in (0, 1)])


def test_a_place_that_cannot_be_written_to_is_found_first(
    draw: Callable[..., Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "customized_grpo.generation.build_policy", lambda *arguments: pytest.fail("the generator was loaded")
    )
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.png").touch()
    with pytest.raises(UserError, match=r"--out: .*folder.png is a folder, or cannot be written over"):
        draw(out=tmp_path / "folder.png")
    with pytest.raises(UserError, match=r"--out: .*file.png is a file; name a folder elsewhere"):
        draw(out=tmp_path / "file.png" / "new" / "out.png")
    monkeypatch.setattr(os, "access", lambda path, mode: path == tmp_path)
    with pytest.raises(UserError, match=r"--out: .*file.png is a folder, or cannot be written over"):
        draw(out=tmp_path / "file.png")
