from pathlib import Path

import pytest
import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.toybox.pairs import draw_pairs
from customized_grpo.toybox.rewards import IdentityReward, PromptReward
from customized_grpo.types import Task


def drawn(groups: int = 2, size: int = 3) -> tuple[Tensor, Task]:
    pairs = draw_pairs(groups * size, "train", torch.Generator().manual_seed(0))
    task = Task(pairs.captions[:groups], pairs.references[:groups, None], pairs.masks[:groups, None])
    return pairs.targets.unflatten(0, (groups, size)), task


@pytest.mark.parametrize("kind", [PromptReward, IdentityReward])
def test_scores_are_cosines_of_every_image_with_its_own_group(kind: type, tiny_weights: Path) -> None:
    reward = kind(weights=tiny_weights)
    images, task = drawn()
    scores = reward.score(images, task)
    assert scores.values.shape == (2, 3) and scores.valid.all()
    assert scores.values.abs().max() <= 1 + 1e-5
    for group in range(2):
        alone = Task(task.prompts[group : group + 1], task.references[group : group + 1], None)
        expected = reward.score(images[group : group + 1], alone).values[0]
        assert torch.allclose(scores.values[group], expected, atol=1e-5)


@pytest.mark.parametrize("kind", [PromptReward, IdentityReward])
def test_equal_images_score_equally(kind: type, tiny_weights: Path) -> None:
    reward = kind(weights=tiny_weights)
    assert torch.equal(reward.score(*drawn()).values, reward.score(*drawn()).values)


def test_a_copy_of_the_reference_is_its_identity(tiny_weights: Path) -> None:
    _, task = drawn()
    values = IdentityReward(weights=tiny_weights).score(task.references, task).values
    assert values.flatten().tolist() == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("kind", [PromptReward, IdentityReward])
def test_an_image_that_cannot_be_scored_is_invalid_and_alone_in_it(kind: type, tiny_weights: Path) -> None:
    images, task = drawn()
    images[1, 2] = torch.nan
    valid = kind(weights=tiny_weights).score(images, task).valid
    assert valid.tolist() == [[True] * 3, [True, True, False]]


def test_a_segmented_reference_does_not_depend_on_its_background(tiny_weights: Path) -> None:
    images, task = drawn()
    assert task.masks is not None
    elsewhere = Task(task.prompts, torch.where(task.masks > 0, task.references, 0.1), task.masks)
    segmented = IdentityReward("segmented", tiny_weights)
    whole = IdentityReward("whole", tiny_weights)
    assert torch.allclose(segmented.score(images, task).values, segmented.score(images, elsewhere).values)
    assert not torch.allclose(whole.score(images, task).values, whole.score(images, elsewhere).values)


def test_segmenting_needs_masks(tiny_weights: Path) -> None:
    images, task = drawn()
    with pytest.raises(UserError, match=r"no masks.*identity_reference=whole"):
        IdentityReward("segmented", tiny_weights).score(images, Task(task.prompts, task.references, None))
