from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.evaluation.copy_paste import layout
from customized_grpo.evaluation.metrics import CopyMetric, IdentityMetric, PromptMetric
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.types import PromptBatch

Picture = Callable[..., Tensor]


@pytest.fixture
def picture() -> Picture:
    """Draw a picture [3, height, width] of random pixels."""

    def picture(height: int = 40, width: int = 32, seed: int = 0) -> Tensor:
        return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))

    return picture


def batch(count: int, references: Sequence[Tensor], pictures: Sequence[Tensor] | None = None) -> PromptBatch:
    """`count` prompts about the same cup."""
    prompts = [f"prompt {number}" for number in range(count)]
    compared = None if pictures is None else [pictures] * count
    return PromptBatch(prompts, [references] * count, None, subjects=["cup"] * count, pictures=compared)


def correlation(one: Tensor, other: Tensor) -> float:
    """Of the local means of two pictures, each channel centred together: as `layout` has it, by numpy."""
    cells = [F.adaptive_avg_pool2d(each[None], 8).flatten().double().numpy() for each in (one, other)]
    return float(np.corrcoef(*cells)[0, 1])


def test_the_copy_meter_is_1_for_the_reference_and_0_for_what_is_as_near_as_others(picture: Picture) -> None:
    reference, own, others = picture(seed=0), picture(seed=1), [picture(48, 40, seed=2), picture(seed=3)]
    images = torch.stack([reference, picture(seed=9)])
    layouts = {"cup": layout(torch.stack([reference, own])), "dog": torch.cat([layout(o[None]) for o in others])}
    found = CopyMetric(layouts).measure(images, batch(2, [reference]))["copy"]
    expected = np.mean([correlation(reference, other) for other in others])
    near = (correlation(images[1], reference) - expected) / (1 - expected)
    assert found.tolist() == pytest.approx([1.0, near], abs=1e-5)
    alone = CopyMetric({"cup": layouts["cup"]}).measure(images, batch(2, [reference]))["copy"]
    assert alone.tolist() == pytest.approx([1.0, correlation(images[1], reference)], abs=1e-5)


def test_of_several_references_the_nearest_is_copied(picture: Picture) -> None:
    references = [picture(seed=0), picture(seed=1)]
    images = torch.stack(references)
    found = CopyMetric({"cup": layout(images)}).measure(images, batch(2, references))
    assert found["copy"].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_identity_is_the_mean_cosine_to_the_pictures_of_the_subject(picture: Picture) -> None:
    calls = []

    def encoder(images: Tensor) -> Tensor:
        calls.append(len(images))
        return F.normalize(images.mean((-2, -1)), dim=-1)

    images, pictures = torch.stack([picture(seed=5), picture(seed=6)]), [picture(seed=7), picture(48, 40, seed=8)]
    metric = IdentityMetric("dino", encoder)
    first, again = (metric.measure(images, batch(2, [images[0]], pictures))["dino"] for _ in range(2))
    cosines = F.cosine_similarity(
        images.mean((-2, -1))[:, None], torch.stack([each.mean((-2, -1)) for each in pictures]), dim=-1
    )
    assert torch.allclose(first, cosines.mean(1), rtol=0, atol=1e-6) and torch.equal(first, again)
    assert calls == [1, 1, 2, 2]  # the subject's pictures once


def test_each_image_is_compared_with_its_own_pictures(picture: Picture) -> None:
    images = torch.stack([picture(seed=seed) for seed in range(4)])
    one, other = [picture(seed=5)], [picture(seed=6), picture(seed=7)]
    rows = PromptBatch(["a"] * 4, [one, one, other, one], None, subjects=["cup", "cup", "dog", "cup"])
    layouts = {"cup": layout(torch.stack(one)), "dog": layout(torch.stack(other))}
    for metric in (IdentityMetric("dino", lambda of: F.normalize(of.mean((-2, -1)), dim=-1)), CopyMetric(layouts)):
        (found,) = metric.measure(images, rows).values()
        for row, (references, subject) in enumerate(zip(rows.references, rows.subjects or (), strict=True)):
            alone = PromptBatch(["a"], [references], None, subjects=[subject])
            (value,) = metric.measure(images[row : row + 1], alone).values()
            assert found[row] == pytest.approx(float(value), abs=1e-6)


class PromptLengths(Reward):
    """Scores a picture by the length of its prompt; the second has no score."""

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        values = torch.tensor([[float(len(prompt))] for prompt in batch.prompts])
        return Scores(values, torch.tensor([[True], [False]]))


def test_prompts_are_scored_whole_or_by_their_first_character(picture: Picture) -> None:
    images = torch.stack([picture(), picture()])
    rows = batch(2, [picture()])
    whole = PromptMetric("hpsv3", PromptLengths()).measure(images, rows)["hpsv3"]
    first = PromptMetric("hpsv3", PromptLengths(), first_character=True).measure(images, rows)["hpsv3"]
    assert whole[0] == 8 and first[0] == 1 and whole.isnan().tolist() == [False, True]
