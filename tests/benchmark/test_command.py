import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from customized_grpo.benchmark import command as benchmark
from customized_grpo.benchmark import page
from customized_grpo.benchmark.command import run_benchmark, summary
from customized_grpo.benchmark.config import BenchmarkConfig
from customized_grpo.benchmark.items import read_items
from customized_grpo.config.run import Config
from customized_grpo.data import load_image
from customized_grpo.data.color_profiles import ADOBE_GAMMA, ADOBE_RGB, matrix_profile
from customized_grpo.errors import NotFinite, UserError
from customized_grpo.policies.diffusers_policy import DiffusersPolicy
from customized_grpo.rewards.similarity import PictureEncoder
from customized_grpo.testing.tiny_pipelines import save_tiny
from customized_grpo.testing.tiny_rewards import save_tiny_hpsv3, save_tiny_reward
from customized_grpo.tracking.console import Display

Settings = Callable[..., BenchmarkConfig]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny models of the true classes: a generator, and what measures it."""
    folder = tmp_path_factory.mktemp("models")
    weights, backbone = save_tiny_hpsv3(folder / "hpsv3")
    (folder / "instruction.txt").write_text("Rate it.\n{text_prompt}\n<|Reward|>")
    return {
        "policy": {
            "kind": "flux1-kontext",
            "pipeline": {"model": str(save_tiny("flux1-kontext", folder / "kontext"))},
        },
        "metrics": {
            "dino": str(save_tiny_reward("vits16", folder / "vits16")),
            "dinov2": str(save_tiny_reward("dino", folder / "dino")),
            "clip": str(save_tiny_reward("clip", folder / "clip")),
            "hpsv3": {
                "model": str(weights),
                "backbone": str(backbone),
                "instruction": str(folder / "instruction.txt"),
            },
            "device": "cpu",
        },
    }


@pytest.fixture
def settings(models: dict[str, Any], dreambench: Path, tmp_path: Path) -> Settings:
    """A small benchmark of the tiny generator, changed by fields."""

    def make(**changes: Any) -> BenchmarkConfig:
        pipeline = {"height": 64, "width": 64, "reference_side": 64, "cache": tmp_path / "cache"}
        policy = models["policy"] | {
            "lora_rank": 4, "device": "cpu", "precision": "fp32", "pipeline": models["policy"]["pipeline"] | pipeline,
        }  # fmt: skip
        usual: dict[str, Any] = {
            "benchmark": "dreambench", "data": dreambench, "output": tmp_path / "out", "policy": policy,
            "num_steps": 2, "metrics": models["metrics"],
        }  # fmt: skip
        return BenchmarkConfig.model_validate(usual | changes)

    return make


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "benchmark.json").read_text())
    return content


def test_a_benchmark_leaves_pictures_scores_and_a_page(settings: Settings, display: Display, tmp_path: Path) -> None:
    page = run_benchmark(settings(), display)
    found = results(tmp_path / "out")
    names = ["dino", "clip_i", "clip_t", "dinov2", "hpsv3", "copy"]
    assert len(found["records"]) == 5 and found["subjects"] == 3 and list(found["summary"]) == names
    assert found["settings"]["policy.pipeline.guidance_scale"] == 4.0 and found["settings"]["seed"] == 3407
    for record in found["records"]:
        with Image.open(tmp_path / "out" / "images" / f"{record['id']}.png") as image:
            assert image.size == (64, 64)
        assert all(-1 <= record["metrics"][name] <= 1 for name in names if name != "hpsv3")
    text = page.read_text()
    assert "Not the whole of DreamBench" in text and "OminiControl" in text and "real pictures of a subject" in text
    assert text.count("data:image/png") == 3 + 5 and not re.search(r"(src|href)=.https?:|<script", text)
    assert "5 pictures of 3 subjects" in display.console.file.getvalue()  # type: ignore[attr-defined]


def test_it_goes_on_picture_by_picture(
    settings: Settings, display: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(micro_batch=1)  # those of a larger one round as those beside them have it
    run_benchmark(config, display)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()}
    scores = (tmp_path / "out" / "benchmark.json").read_bytes()
    for name in ("cup-01.png", "dog6-00.png"):
        (tmp_path / "out" / "images" / name).unlink()
    drawn: list[str] = []
    save = benchmark.save_image
    monkeypatch.setattr(benchmark, "save_image", lambda image, path: (drawn.append(path.name), save(image, path)))
    run_benchmark(config, display)
    assert drawn == ["cup-01.png", "dog6-00.png"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()} == whole
    assert (tmp_path / "out" / "benchmark.json").read_bytes() == scores
    with pytest.raises(UserError, match=r"begun with other settings \(num_steps: 2 -> 3\)"):
        run_benchmark(settings(num_steps=3), display)
    prompts = config.data / "prompts_and_classes.txt"  # type: ignore[operator]
    asked = prompts.read_text()
    prompts.write_text(asked.replace("a red", "a blue"))
    with pytest.raises(UserError, match="items_sha256"):
        run_benchmark(config, display)
    prompts.write_text(asked)
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        run_benchmark(config, display)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty, and no benchmark"):
        run_benchmark(settings(output=tmp_path / "other"), display)


def test_pictures_made_elsewhere_score_as_drawn_here(
    settings: Settings, models: dict[str, Any], display: Display, dreambench: Path, tmp_path: Path
) -> None:
    run_benchmark(settings(), display)
    elsewhere = BenchmarkConfig.model_validate(
        {
            "data": dreambench, "images": tmp_path / "out" / "images", "output": tmp_path / "scores",
            "metrics": models["metrics"],
        }
    )  # fmt: skip
    run_benchmark(elsewhere, display)
    assert results(tmp_path / "scores")["records"] == results(tmp_path / "out")["records"]
    assert not (tmp_path / "scores" / "images").exists()
    with pytest.raises(UserError, match="out was begun with other settings"):
        run_benchmark(elsewhere.model_copy(update={"output": tmp_path / "out"}), display)


def test_identity_to_the_reference_or_to_all_pictures(
    settings: Settings, display: Display, dreambench: Path, tmp_path: Path
) -> None:
    from customized_grpo.rewards.preprocessing import DINO_PUBLISHED
    from customized_grpo.rewards.pretrained import PretrainedEncoder

    run_benchmark(settings(), display)
    to_reference = results(tmp_path / "out")["records"]
    run_benchmark(settings(identity_to="all"), display)
    to_all = results(tmp_path / "out")["records"]
    model = settings().metrics.dino
    encoder: PictureEncoder = PretrainedEncoder(
        "dino", "dino", model, None, torch.device("cpu"), micro_batch=4, bf16=False
    ).encoder(DINO_PUBLISHED)
    for number, item in enumerate(read_items("dreambench", dreambench)):
        image = encoder(load_image(tmp_path / "out" / "images" / f"{item.id}.png")[None])
        cosines = [float(image @ encoder(load_image(path)[None]).T) for path in item.pictures]
        assert to_reference[number]["metrics"]["dino"] == pytest.approx(cosines[0], abs=1e-5)
        assert to_all[number]["metrics"]["dino"] == pytest.approx(sum(cosines) / 2, abs=1e-5)
        assert to_all[number]["metrics"]["hpsv3"] == to_reference[number]["metrics"]["hpsv3"]


def test_published_figures_stand_beside_what_they_are_alike_to(
    settings: Settings, display: Display, toybox_data: Path, tmp_path: Path
) -> None:
    names = {"metrics": settings().metrics.model_copy(update={"names": ("dino", "hpsv3")}).model_dump()}
    whole = run_benchmark(settings(**names), display)
    assert whole is not None and "the two are not alike" in whole.read_text()
    first = run_benchmark(settings(**names, hpsv3_as_published=True), display)
    assert first is not None and "OmniGen" in first.read_text() and "not alike" not in first.read_text()
    to_all = run_benchmark(settings(**names, identity_to="all"), display)
    assert to_all is not None and "OmniGen" not in to_all.read_text()
    other = settings(**names, benchmark="folder", data=toybox_data / "test", output=tmp_path / "other")
    page = run_benchmark(other, display)
    assert page is not None and "OmniGen" not in page.read_text()


def test_the_published_hpsv3_reads_the_first_character(settings: Settings, display: Display, tmp_path: Path) -> None:
    only = {"metrics": settings().metrics.model_copy(update={"names": ("hpsv3",)}).model_dump()}
    run_benchmark(settings(**only), display)
    whole = results(tmp_path / "out")["records"]
    run_benchmark(settings(**only, hpsv3_as_published=True), display)
    first = results(tmp_path / "out")["records"]
    assert all(a["metrics"]["hpsv3"] != b["metrics"]["hpsv3"] for a, b in zip(whole, first, strict=True))


def test_what_cannot_be_had_is_told_before_anything_is_drawn(
    settings: Settings, display: Display, dreambench: Path, models: dict[str, Any], tmp_path: Path
) -> None:
    wrong = {"metrics": models["metrics"] | {"dino": models["metrics"]["clip"]}}
    with pytest.raises(UserError, match=r"metrics.dino: .* is of type clip"):
        run_benchmark(settings(**wrong), display)
    hpsv3 = models["metrics"]["hpsv3"] | {"model": "nowhere"}
    no_weights = {"metrics": models["metrics"] | {"hpsv3": hpsv3}}
    with pytest.raises(UserError, match="metrics.hpsv3.model: nowhere is neither a file"):
        run_benchmark(settings(**no_weights), display)
    other_size = {"metrics": models["metrics"] | {"dino": str(save_tiny_reward("vit", tmp_path / "vit"))}}
    with pytest.raises(UserError, match="takes 64x64 pixels"):
        run_benchmark(settings(**other_size), display)
    with pytest.raises(UserError, match="metrics.device: 'tpu' is no device"):
        run_benchmark(settings(metrics=models["metrics"] | {"device": "tpu"}), display)
    (dreambench / "cup" / "01.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="dreambench: 1 unusable pictures:\n .*cup/01.png: not an image"):
        run_benchmark(settings(), display)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": "x"}, "images: they are drawn already"),
        ({"adapter": "x"}, "policy: with an adapter it is the run's own"),
        ({"hpsv3_as_published": True, "metrics": {"names": ["dino"]}}, "hpsv3_as_published: metrics.names has no"),
        ({"metrics": {"names": []}}, "names: empty"),
        ({"images": "x", "policy": {}, "num_steps": 9}, "images: they are drawn already; leave num_steps out"),
        (
            {"metrics": {"names": ["dino"], "hpsv3": {"model": "x"}}},
            "hpsv3.model: only for names=hpsv3 .found names=dino",
        ),
        (
            {"policy": {"kind": "uno", "pipeline": {"guidance_scale": 3.0}}},
            "policy.pipeline.guidance_scale: a benchmark's is the field guidance_scale",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings: Settings, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings(**changes)


def test_toybox_is_measured_by_its_own_rewards_and_judge(
    make_config: Callable[..., Config], run_training: Callable[..., Path], display: Display, toybox_data: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    run_training(make_config({"optimizer.learning_rate": 0.05}))
    base = {"benchmark": "folder", "data": toybox_data / "test", "num_steps": 3}
    weights = {"policy": {"toybox": make_config().policy.toybox, "precision": "fp32", "lora_rank": 4}}
    run_benchmark(BenchmarkConfig.model_validate(base | weights | {"output": tmp_path / "base"}), display)
    tuned = base | {"adapter": tmp_path / "run", "output": tmp_path / "tuned"}
    page = run_benchmark(BenchmarkConfig.model_validate(tuned), display)
    first, second = results(tmp_path / "base"), results(tmp_path / "tuned")
    assert {"joint_success", "reward/prompt", "copy_score"} <= first["summary"].keys()
    assert first["records"] != second["records"]
    assert "Identity kept" in page.read_text() and "OmniGen" not in page.read_text()
    with pytest.raises(UserError, match="guidance_scale: ToyBox has none"):
        run_benchmark(BenchmarkConfig.model_validate(tuned | {"guidance_scale": 2.0}), display)
    with pytest.raises(UserError, match="identity_to: ToyBox is measured by its own rewards"):
        run_benchmark(BenchmarkConfig.model_validate(tuned | {"identity_to": "all"}), display)
    with pytest.raises(UserError, match="ema: only of a run"):
        run_benchmark(BenchmarkConfig.model_validate(base | {"ema": True}), display)
    # Trained on, it draws other pictures: they do not go into the same folder.
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="adapter_sha256"):
        run_benchmark(BenchmarkConfig.model_validate(tuned), display)


def test_prompts_that_the_generator_cannot_take_are_listed(dreambench: Path, display: Display, tmp_path: Path) -> None:
    config = BenchmarkConfig(data=dreambench, output=tmp_path / "out", num_steps=2)
    with pytest.raises(UserError, match="dreambench: 5 unusable samples:\n  sample 'cup-00': "):
        run_benchmark(config, display)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output: .*file is a file"):
        run_benchmark(config.model_copy(update={"output": tmp_path / "file" / "out"}), display)


def test_intervals_are_over_subjects_and_leave_out_what_has_no_score() -> None:
    def record(subject: str, value: float | None) -> dict[str, Any]:
        return {"subject": subject, "metrics": {"dino": value}}

    found = summary([record("a", 0.0), record("a", 0.0), record("b", 1.0), record("b", None)])["dino"]
    assert found["mean"] == pytest.approx(1 / 3) and (found["low"], found["high"]) == (0.0, 1.0)
    assert summary([record("a", 0.5)])["dino"] == {"mean": 0.5, "low": None, "high": None}


def test_pictures_of_a_benchmark_that_are_no_numbers_are_told(
    settings: Settings, display: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = torch.full((1, 3, 64, 64), float("nan"))
    monkeypatch.setattr(DiffusersPolicy, "decode", lambda policy, latents: nothing.repeat(len(latents), 1, 1, 1))
    with pytest.raises(NotFinite, match="pictures that the generator drew are not finite"):
        run_benchmark(settings(), display)
    assert list((tmp_path / "out").rglob("*.png")) == []


def test_the_page_shows_photographs_as_they_are_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (200, 100), (60, 160, 60))
    picture.save(tmp_path / "a.png", exif=exif, icc_profile=matrix_profile(ADOBE_RGB, ADOBE_GAMMA))
    uri = page._thumbnail(tmp_path / "a.png")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as shown:
        assert shown.size == (min(100, page.THUMBNAIL // 2), min(200, page.THUMBNAIL))
        assert shown.getpixel((5, 5)) == (0, 161, 47) and "icc_profile" not in shown.info
