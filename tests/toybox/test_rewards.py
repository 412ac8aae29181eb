from pathlib import Path

import pytest
import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.toybox.pairs import draw_pairs
from customized_grpo.toybox.rewards import IdentityReward, PromptReward
from customized_grpo.types import PromptBatch


def drawn(groups: int = 2, size: int = 3) -> tuple[Tensor, PromptBatch]:
    pairs = draw_pairs(groups * size, "train", torch.Generator().manual_seed(0))
    batch = PromptBatch(pairs.captions[:groups], pairs.references[:groups, None], pairs.masks[:groups, None])
    return pairs.targets.unflatten(0, (groups, size)), batch


@pytest.mark.parametrize("kind", [PromptReward, IdentityReward])
def test_scores_are_cosines_of_every_image_with_its_own_group(kind: type, tiny_weights: Path) -> None:
    reward = kind(weights=tiny_weights)
    images, batch = drawn()
    scores = reward.score(images, batch)
    assert scores.values.shape == (2, 3) and scores.valid.all()
    assert scores.values.abs().max() <= 1 + 1e-5
    for group in range(2):
        alone = PromptBatch(batch.prompts[group : group + 1], batch.references[group : group + 1], None)
        expected = reward.score(images[group : group + 1], alone).values[0]
        assert torch.allclose(scores.values[group], expected, atol=1e-5)


@pytest.mark.parametrize("kind", [PromptReward, IdentityReward])
def test_equal_images_score_equally(kind: type, tiny_weights: Path) -> None:
    reward = kind(weights=tiny_weights)
    assert torch.equal(reward.score(*drawn()).values, reward.score(*drawn()).values)


def test_a_copy_of_the_reference_is_its_identity(tiny_weights: Path) -> None:
    _, batch = drawn()
    values = IdentityReward(weights=tiny_weights).score(batch.references, batch).values
    assert values.flatten().tolist() == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("kind", [PromptReward, IdentityReward])
def test_an_image_that_cannot_be_scored_is_invalid_and_alone_in_it(kind: type, tiny_weights: Path) -> None:
    images, batch = drawn()
    images[1, 2] = torch.nan
    valid = kind(weights=tiny_weights).score(images, batch).valid
    assert valid.tolist() == [[True] * 3, [True, True, False]]


def test_a_segmented_reference_does_not_depend_on_its_background(tiny_weights: Path) -> None:
    images, batch = drawn()
    assert batch.masks is not None
    elsewhere = PromptBatch(batch.prompts, torch.where(batch.masks > 0, batch.references, 0.1), batch.masks)
    segmented = IdentityReward("segmented", tiny_weights)
    whole = IdentityReward("whole", tiny_weights)
    assert torch.allclose(segmented.score(images, batch).values, segmented.score(images, elsewhere).values)
    assert not torch.allclose(whole.score(images, batch).values, whole.score(images, elsewhere).values)


def test_segmenting_needs_masks(tiny_weights: Path) -> None:
    images, batch = drawn()
    with pytest.raises(UserError, match=r"no masks.*toybox_identity.reference=whole"):
        IdentityReward("segmented", tiny_weights).score(images, PromptBatch(batch.prompts, batch.references, None))
