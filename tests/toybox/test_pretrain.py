import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from customized_grpo.errors import UserError
from customized_grpo.toybox import pretrain
from customized_grpo.toybox.network import Generator
from customized_grpo.toybox.oracle import Oracle, Reading
from customized_grpo.toybox.pairs import draw_pairs
from customized_grpo.toybox.quality import measure_quality
from customized_grpo.toybox.recipes import (
    EncoderRecipe,
    GeneratorRecipe,
    train_clean_generator,
    train_identity_encoder,
    train_judge,
    train_noisy_generator,
    train_prompt_encoder,
)
from customized_grpo.toybox.weights import LEAKS, NAMES, QUALITY
from customized_grpo.tracking.console import Display

FLOW = GeneratorRecipe(clean_steps=2, noisy_steps=2, batch_size=2)
ENCODER = EncoderRecipe(steps=2, batch_size=4, learning_rate=1e-3, cross_scene=0.5)
MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "clean generator": lambda seed: train_clean_generator(FLOW, seed, silent),
    "noisy generator": lambda seed: train_noisy_generator(seeded_generator(), FLOW, seed, silent),
    "identity encoder": lambda seed: train_identity_encoder(ENCODER, seed, silent),
    "prompt encoder": lambda seed: train_prompt_encoder(ENCODER, seed, silent),
    "judge": lambda seed: train_judge(ENCODER, seed, silent),
}


def silent(stage: str, step: int, steps: int, loss: float) -> None:
    """Shows no progress."""


def seeded_generator() -> Generator:
    torch.manual_seed(0)
    return Generator()


def weights(network: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in network.state_dict().values()])


@pytest.mark.parametrize("name", MAKERS)
def test_a_network_is_a_function_of_its_seed(name: str) -> None:
    first = weights(MAKERS[name](0))
    torch.rand(7)
    assert torch.equal(weights(MAKERS[name](0)), first)
    assert not torch.equal(weights(MAKERS[name](1)), first)


def test_the_judge_learns() -> None:
    losses: list[float] = []
    recipe = EncoderRecipe(steps=40, batch_size=24, learning_rate=3e-3)
    train_judge(recipe, 0, lambda stage, step, steps, loss: losses.append(loss))
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_pretraining_fills_a_folder_and_measures_it(
    tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PROMPT_RECIPE", "JUDGE_RECIPE"):
        monkeypatch.setattr(pretrain, name, ENCODER)
    monkeypatch.setattr(pretrain, "IDENTITY_RECIPES", dict.fromkeys(LEAKS, ENCODER))
    monkeypatch.setattr(pretrain, "GeneratorRecipe", lambda: FLOW)
    monkeypatch.setattr(pretrain, "measure_quality", partial(measure_quality, pairs=4))
    pretrain.pretrain(tmp_path, 0, None, 1, display)
    assert {f"{name}.safetensors" for name in NAMES} <= {path.name for path in tmp_path.iterdir()}
    quality = json.loads((tmp_path / QUALITY).read_text())
    assert all(0 <= value <= 1 for table in quality.values() for value in table.values())


def test_an_unknown_network_is_named(tmp_path: Path, display: Display) -> None:
    with pytest.raises(UserError, match=r"unknown jugde; choose among .*judge"):
        pretrain.pretrain(tmp_path, 0, ["jugde"], 1, display)
    assert list(tmp_path.iterdir()) == []


def test_quality_of_a_judge_that_sees_everything(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that reads the truth off clean renders: full marks and a ceiling of 1, and each of its shares 1."""
    drawn = draw_pairs(4, "test", torch.Generator().manual_seed(2026))
    truth = {"shape": drawn.subjects.shape, "pattern": drawn.subjects.pattern}
    truth |= {name: getattr(drawn.target_scenes, name) for name in ("scene", "accessory", "position")}

    def read(self: Oracle, images: Tensor) -> Reading:
        return Reading(truth, drawn.subjects.hues)

    monkeypatch.setattr(Oracle, "read", read)
    quality = measure_quality(tiny_weights, pairs=4)
    assert set(quality["judge"].values()) == {1.0} and len(quality["judge"]) == 6
    assert quality["ceiling"].pop("copied") == 0 and set(quality["ceiling"].values()) == {1.0}


def test_an_untrained_judge_scores_badly(tiny_weights: Path) -> None:
    quality = json.loads((tiny_weights / QUALITY).read_text())
    assert quality["judge"]["both hues within tolerance"] < 0.6
