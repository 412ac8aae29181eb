"""The example of one page computes the numbers of the trainer."""

import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from customized_grpo.training.trainer import Trainer

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal.py"


@pytest.fixture(scope="module")
def minimal() -> Any:
    """The example as a module."""
    spec = spec_from_file_location("minimal", EXAMPLE)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_computes_the_trainers_numbers(
    minimal: Any, make_trainer: Callable[..., Trainer[Any]], tiny_weights: Path, toybox_data: Path
) -> None:
    settings = minimal.Settings(iterations=3, num_prompts=2, group_size=4, num_steps=5, lora_rank=4)
    rows = list(minimal.train(toybox_data / "train", settings, tiny_weights))
    trainer = make_trainer(
        {
            "rollout.num_steps": 5,
            "optimizer.num_minibatches": 2,
            "optimizer.learning_rate": 1.5e-3,
            "policy.lora_alpha": 4,
        }
    )
    for row in rows:
        metrics = trainer.train_step()
        assert row["reward/prompt"] == pytest.approx(metrics["reward/prompt/mean"], abs=1e-6)
        assert row["reward/identity"] == pytest.approx(metrics["reward/identity/mean"], abs=1e-6)
        assert row["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
    assert rows[0]["loss"] != rows[1]["loss"]


def test_the_example_fits_on_a_page() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 150
