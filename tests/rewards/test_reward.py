"""The reward protocol: what a class gets that defines `score` alone, and how reasons are shown."""

import pytest
import torch
from torch import Tensor

from customized_grpo.rewards.reward import Reward, Scores, in_brackets
from customized_grpo.types import PromptBatch


class Brightness(Reward):
    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        values = images.mean((2, 3, 4))
        return Scores(values, values.isfinite())


def test_a_reward_is_a_class_with_score() -> None:
    scores = Brightness().score(torch.ones(1, 2, 3, 4, 4), PromptBatch(["a"], [[torch.ones(3, 4, 4)]], None))
    assert scores.values.tolist() == [[1.0, 1.0]] and scores.reason is None
    assert Brightness().prompt_lengths(["a" * 1000]) is None


def test_a_reward_without_score_cannot_be_made() -> None:
    class Nothing(Reward):
        pass

    with pytest.raises(TypeError, match="score"):
        Nothing()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [([], ""), ([None, None], ""), (["a", None, "a"], " (a)"), (["a", "b"], " (a; b)")],
)
def test_each_reason_is_shown_once(reasons: list[str | None], expected: str) -> None:
    assert in_brackets(reasons) == expected
