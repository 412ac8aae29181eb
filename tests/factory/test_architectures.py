"""Facts of the models that recipes name, held against what is known of them otherwise."""

from pathlib import Path

import pytest
import torch

from customized_grpo.config.run import Config
from customized_grpo.factory import architectures
from customized_grpo.factory.architectures import ARCHITECTURES, cached_folder, outline_known
from customized_grpo.factory.pipelines import MODELS, PIPELINES
from customized_grpo.testing.tiny_pipelines import save_tiny
from customized_grpo.training.dry_run import dry_run

BILLIONS = {"flux1-kontext": 11.9, "uno": 11.9, "flux2-klein": 3.9, "flux2": 32.2, "qwen-image-edit-plus": 20.4}
"""Parameters of the transformers, as their authors give them, to a tenth."""
ENCODERS = {
    "flux1-kontext": [0.12, 4.76],
    "uno": [0.12, 4.76],
    "flux2-klein": [4.02],
    "flux2": [24.01],
    "qwen-image-edit-plus": [8.29],
}
"""Parameters of the text encoders, in billions: CLIP-L and T5-XXL, Qwen3 4B, Mistral Small 3.1, Qwen2.5-VL 7B."""


def test_the_architecture_of_every_usual_model_is_known() -> None:
    assert set(MODELS.values()) == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", MODELS)
def test_an_architecture_has_the_size_of_its_model(kind: str) -> None:
    family = PIPELINES[kind]
    pipe = outline_known(ARCHITECTURES[MODELS[kind]], family, torch.bfloat16)
    assert sum(p.numel() for p in pipe.transformer.parameters()) / 1e9 == pytest.approx(BILLIONS[kind], abs=0.05)
    encoders = [getattr(pipe, name) for name in family.text_encoders]
    assert [sum(p.numel() for p in each.parameters()) / 1e9 for each in encoders] == pytest.approx(
        ENCODERS[kind], abs=0.005
    )
    parts = (pipe.transformer, pipe.vae, *encoders)
    assert {p.device.type for part in parts for p in part.parameters()} == {"meta"}
    assert family.sigmas(pipe, 4, (512, 512)).shape == (5,)


def test_files_of_an_earlier_download_are_read_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("flux1-kontext", tmp_path / "model")
    monkeypatch.setattr(architectures, "try_to_load_from_cache", lambda model, name: str(folder / name))
    assert cached_folder(MODELS["flux1-kontext"]) == folder
    tree = {
        "policy": {"kind": "flux1-kontext", "lora_rank": 4, "pipeline": {"height": 32, "width": 32}},
        "rewards": {"prompt": {"kind": "clip_t"}},
    }
    estimated = dry_run(Config.model_validate(tree))
    assert estimated.parameters < 1e7 and not any("architecture" in each for each in estimated.not_counted)
    monkeypatch.setattr(architectures, "try_to_load_from_cache", lambda model, name: None)
    assert cached_folder(MODELS["flux1-kontext"]) is None
