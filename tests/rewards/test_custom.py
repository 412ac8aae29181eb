"""A reward of the user's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from named_rewards import load_named
from pydantic import ValidationError
from torch import Tensor

from customized_grpo.config.rewards import RewardConfig
from customized_grpo.errors import UserError
from customized_grpo.rewards.custom import CustomReward
from customized_grpo.rewards.reward import Scores
from customized_grpo.types import PromptBatch

CPU = torch.device("cpu")
IMAGES = torch.rand(2, 3, 3, 4, 4)
TASK = PromptBatch(["a", "b"], [[IMAGES[0, 0]], [IMAGES[1, 0]]], None)
MODULE = """
import torch
from customized_grpo.rewards.reward import Scores

def redness(images, task):
    return images[:, :, 0].mean((-2, -1))

def some(images, task):
    return Scores(torch.ones(images.shape[:2]), torch.tensor([[True, False, True], [True, True, True]]))

def broken(images, task):
    return torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), 3.0, 4.0]])

def explained(images, task):
    valid = torch.tensor([[True, False, True], [True, True, True]])
    return Scores(torch.ones(images.shape[:2]), valid, "no face found")

def explained_by_a_number(images, task):
    return Scores(torch.ones(images.shape[:2]), torch.ones(images.shape[:2], dtype=torch.bool), 7)

def flat(images, task):
    return torch.zeros(6)

def fails(images, task):
    raise ConnectionError("no such host\\nsecond line")

def fails_oddly(images, task):
    raise KeyError

number = 7
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "rewards_of_mine", raising=False)


def test_values_are_the_functions() -> None:
    settings = {"prompt": "python:rewards_of_mine.redness", "identity": "python:rewards_of_mine.some"}
    prompt, identity = load_named(settings).values()
    assert torch.allclose(prompt.score(IMAGES, TASK).values, IMAGES[:, :, 0].mean((-2, -1)))
    scores = identity.score(IMAGES, TASK)
    assert isinstance(scores, Scores) and scores.valid.sum() == 5 and scores.values[0, 1] == 0


def test_what_is_not_finite_is_invalid() -> None:
    scores = CustomReward.load("rewards.prompt", "rewards_of_mine.broken").score(IMAGES, TASK)
    assert scores.valid.tolist() == [[True, False, True], [False, True, True]] and scores.values.isfinite().all()


def test_the_reason_of_an_invalid_score_is_passed_on() -> None:
    scores = CustomReward.load("rewards.prompt", "rewards_of_mine.explained").score(IMAGES, TASK)
    assert scores.valid.sum() == 5 and scores.reason == "no face found"
    with pytest.raises(UserError, match=r"explained_by_a_number answered a reason of int, expected a str or None"):
        CustomReward.load("rewards.prompt", "rewards_of_mine.explained_by_a_number").score(IMAGES, TASK)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.f", r"rewards\.prompt: module 'nowhere' could not be imported"),
        ("rewards_of_mine.g", r"rewards_of_mine\.py\) has no function 'g'"),
        ("rewards_of_mine.number", "has no function 'number'"),
        ("f", "names no function; write module.function"),
    ],
)
def test_no_such_function(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        CustomReward.load("rewards.prompt", name)


def test_a_wrong_shape_is_told() -> None:
    with pytest.raises(UserError, match=r"flat answered \[6\], expected a tensor of \[2, 3\]"):
        CustomReward.load("rewards.prompt", "rewards_of_mine.flat").score(IMAGES, TASK)


@pytest.mark.parametrize(
    ("name", "said"), [("fails", "ConnectionError: no such host;"), ("fails_oddly", "KeyError: KeyError;")]
)
def test_what_it_raises_is_told_by_its_name(name: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"^rewards_of_mine\.{name} raised {said} mend the function") as told:
        CustomReward.load("rewards.prompt", f"rewards_of_mine.{name}").score(IMAGES, TASK)
    assert isinstance(told.value.__cause__, ConnectionError | KeyError)


def test_a_module_that_raises(tmp_path: Path) -> None:
    (tmp_path / "broken_of_mine.py").write_text("raise ValueError('no weights')\n")
    with pytest.raises(UserError, match=r"module 'broken_of_mine' could not be imported \(ValueError: no weights\)"):
        CustomReward.load("rewards.prompt", "broken_of_mine.f")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "python", "python": {"function": "no-module"}}, "(?s)python.function.*expected module.function"),
        ({"kind": "python"}, "python.function: name the function, as module.function"),
        ({"kind": "remote"}, "remote.url: a remote reward needs its URL"),
        ({"kind": "remote", "remote": {"url": "host:80"}}, "remote.url: a remote reward needs its URL"),
        (
            {"kind": "toybox_prompt", "clip_t": {"model": "folder"}},
            "clip_t.model: only for kind=clip_t .found kind=toybox_prompt.; leave it out, or set kind=clip_t",
        ),
        ({"kind": "python", "python": {"function": "a.b"}, "clip_t": {"model": "f"}}, "clip_t.model: only for kind="),
        ({"kind": "clip_t", "remote": {"url": "http://a:1"}}, "remote.url: only for kind=remote .found kind=clip_t"),
        ({"kind": "vlm_prompt", "vlm_judge": {"url": "http://x/v1"}}, "vlm_judge.url, vlm_judge.model: name"),
        ({"kind": "dino", "vlm_judge": {"model": "m"}}, "vlm_judge.model: only for kind=vlm_prompt or vlm_identity"),
        ({"kind": "dino", "toybox_identity": {"leak": "low"}}, "toybox_identity.leak: only for "),
        ({"kind": "clip_i", "dino": {"several_references": "max"}}, "dino.several_references: only for kind=dino"),
        ({"kind": "dino", "dino": {"background": 0.5}}, "dino.background: only behind segmented references"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RewardConfig.model_validate(settings)


def test_masks_are_handed_on_where_they_are_asked_for() -> None:
    seen: list[Any] = []

    def spied(images: Tensor, batch: PromptBatch) -> Tensor:
        seen.append(batch.masks)
        return images.mean((2, 3, 4))

    masks = [[torch.ones(1, 4, 4)]] * len(IMAGES)
    batch = PromptBatch(TASK.prompts, TASK.references, masks)
    for wanted in (False, True):
        CustomReward("spied", spied, masks=wanted).score(IMAGES, batch)
    assert seen == [None, masks]
