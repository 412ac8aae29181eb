"""Prompts that are not read to their end are counted and told before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from named_rewards import load_named
from torch import Tensor

from customized_grpo.config.run import Config
from customized_grpo.data import Sample, SubjectDataset, save_image
from customized_grpo.data.dataset import write_metadata
from customized_grpo.factory.data import warn_truncated_prompts
from customized_grpo.factory.rewards import build_rewards
from customized_grpo.testing.tiny_rewards import save_tiny_reward
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.tracking.console import Display
from customized_grpo.training.run import evaluate_run, train
from customized_grpo.types import PromptBatch, PromptLengths

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rewards")
    return {kind: save_tiny_reward(kind, root / kind) for kind in ("clip", "siglip")}


def said(display: Display) -> list[str]:
    text: str = display.console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines() if "longer than" in line]


def load(kind: str, folder: Path) -> Any:
    return load_named({"prompt": kind, kind: {"model": str(folder)}})["prompt"]


@pytest.mark.parametrize(("kind", "model", "limit"), [("clip_t", "clip", 77), ("siglip", "siglip", 64)])
def test_what_comes_after_the_limit_is_not_read(kind: str, model: str, limit: int, tiny: dict[str, Path]) -> None:
    reward = load(kind, tiny[model])
    images = torch.rand(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def score(prompt: str) -> Tensor:
        return reward.score(images, PromptBatch([prompt], [[images[0, 0]]], None)).values

    around = reward.prompt_lengths(["ab"]).num_tokens[0] - 2
    fits, longer = "a" * (limit - around), "a" * (limit - around + 1)
    assert reward.prompt_lengths([fits, longer]) == PromptLengths([limit, limit + 1], limit)
    assert not torch.equal(score(fits), score(fits[:-1] + "b"))
    assert torch.equal(score(longer), score(longer[:-1] + "b"))


def test_a_tokenizer_without_a_limit_has_the_models(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for path in tiny["clip"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 10**30}))
    reward = load("clip_t", folder)
    assert reward.prompt_lengths(["a" * 100]).max_tokens == 77
    images = torch.rand(1, 2, 3, 32, 32)
    assert reward.score(images, PromptBatch(["a" * 100], [[images[0, 0]]], None)).valid.all()


class Reads:
    """Reads so many letters of a prompt."""

    def __init__(self, letters: int | None) -> None:
        self.letters = letters

    def prompt_lengths(self, prompts: list[str]) -> PromptLengths | None:
        return None if self.letters is None else PromptLengths([len(prompt) for prompt in prompts], self.letters)


@pytest.fixture
def dataset(tmp_path: Path) -> SubjectDataset:
    folder = tmp_path / "data"
    save_image(torch.zeros(3, 16, 16), folder / "a.png")
    samples = [Sample(f"cat-{n}", "a" * n, (folder / "a.png",)) for n in range(1, 6)]
    write_metadata(folder, samples)
    return SubjectDataset.open(folder)


@pytest.mark.parametrize(
    ("policy", "reward", "count", "expected"),
    [
        (Reads(5), Reads(5), None, []),
        (Reads(None), Reads(None), None, []),
        (
            Reads(None),
            Reads(3),
            None,
            ["rewards.prompt: 2 of 5 prompts used of D are longer than the 3 tokens that toybox_prompt"],
        ),
        (
            Reads(None),
            Reads(3),
            4,
            ["rewards.prompt: 1 of 4 prompts used of D is longer than the 3 tokens that toybox_prompt"],
        ),
        (
            Reads(2),
            Reads(3),
            3,
            ["policy.kind: 1 of 3 prompts used of D is longer than the 2 tokens that toybox reads"],
        ),
    ],
)
def test_prompts_in_use_are_counted(
    policy: Any, reward: Any, count: int | None, expected: list[str], dataset: SubjectDataset, display: Display
) -> None:
    warn_truncated_prompts(Config(), policy, {"prompt": reward}, {dataset: dataset.samples[:count]}, display)  # type: ignore[arg-type]
    found = [line.replace(str(dataset.folder), "D") for line in said(display)]
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(f"WARNING: {start}")
    if reward.__class__ is Reads and reward.letters == 3 and count != 3:
        assert found[0].endswith("reads; the rest is not read (first: 'cat-4')")


def test_a_run_and_an_evaluation_tell(
    tiny: dict[str, Path],
    tmp_path: Path,
    toybox_data: Path,
    make_config: Callable[..., Config],
    display: Display,
) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for path in tiny["clip"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 12}))
    rewards = {
        "rewards.prompt.kind": "clip_t",
        "rewards.prompt.clip_t.model": folder,
        "data.test": toybox_data / "test",
    }
    config = make_config(rewards | {"iterations": 1, "evaluation.every": 1})
    train(config, display)
    train_line, test_line = said(display)
    assert f"rewards.prompt: 4 of 4 prompts used of {toybox_data / 'train'} are longer than the 12 tokens" in train_line
    assert f"rewards.prompt: 3 of 3 prompts used of {toybox_data / 'test'} are longer" in test_line
    evaluate_run(config.output, None, 2, display)
    assert len(said(display)) == 3 and "2 of 2 prompts" in said(display)[-1]


def test_toyboxs_parts_read_every_prompt_that_they_take(
    make_config: Callable[..., Config], make_policy: Callable[..., ToyBoxPolicy]
) -> None:
    parts = make_policy(), *build_rewards(make_config()).values()
    assert [part.prompt_lengths(["a red ball on the beach"]) for part in parts] == [None] * 3
