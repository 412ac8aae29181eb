import pytest
import torch
from torch import Tensor

from customized_grpo.toybox.world import (
    HUE_BINS,
    PATTERNS,
    POSITIONS,
    SCENES,
    SHAPES,
    SPLITS,
    Subjects,
    hue_distance,
    sample_reference_scenes,
    sample_scenes,
    sample_subjects,
    split_of,
)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cells(subjects: Subjects) -> set[tuple[int, ...]]:
    bins = (subjects.hues * HUE_BINS).long()
    return set(map(tuple, torch.cat([subjects.shape[:, None], subjects.pattern[:, None], bins], 1).tolist()))


def every_cell() -> tuple[Tensor, Tensor, Tensor]:
    grid = torch.cartesian_prod(
        torch.arange(len(SHAPES)), torch.arange(len(PATTERNS)), torch.arange(HUE_BINS), torch.arange(HUE_BINS)
    )
    return grid[:, 0], grid[:, 1], grid[:, 2:]


def test_no_identity_is_drawn_in_two_splits() -> None:
    train, validation, test = (cells(sample_subjects(5000, split, draw())) for split in SPLITS)
    assert not train & validation and not train & test and not validation & test


def test_drawn_identities_belong_to_their_split() -> None:
    for index, split in enumerate(SPLITS):
        subjects = sample_subjects(2000, split, draw())
        bins = (subjects.hues * HUE_BINS).long()
        assert (split_of(subjects.shape, subjects.pattern, bins) == index).all()


def test_splits_take_eight_one_and_one_tenths() -> None:
    shares = split_of(*every_cell()).bincount() / len(every_cell()[0])
    assert shares.tolist() == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_holds_every_shape_pattern_and_hue(split: str) -> None:
    subjects = sample_subjects(3000, split, draw())
    assert set(subjects.shape.tolist()) == set(range(len(SHAPES)))
    assert set(subjects.pattern.tolist()) == set(range(len(PATTERNS)))
    for hues in subjects.hues.unbind(1):
        assert set((hues * HUE_BINS).long().tolist()) == set(range(HUE_BINS))


def test_both_hues_can_be_told_apart_and_keep_clear_of_their_bins_edges() -> None:
    hues = sample_subjects(3000, "train", draw()).hues
    assert hue_distance(hues[:, 0], hues[:, 1]).min() >= 1.2 / HUE_BINS - 1e-5
    within = hues * HUE_BINS % 1
    assert within.min() >= 0.1 - 1e-4 and within.max() <= 0.9 + 1e-4


def test_a_reference_stands_in_the_middle_and_wears_nothing() -> None:
    scenes = sample_reference_scenes(500, draw())
    assert (scenes.accessory == 0).all() and (scenes.position == POSITIONS.index("middle")).all()
    assert set(scenes.scene.tolist()) == set(range(len(SCENES)))


def test_a_scene_is_other_than_the_one_to_avoid_and_any_other() -> None:
    avoided = torch.zeros(1000, dtype=torch.long)
    assert set(sample_scenes(1000, draw(), other_than=avoided).scene.tolist()) == set(range(1, len(SCENES)))


def test_equal_seeds_draw_equal_worlds() -> None:
    for first, second in zip(
        (sample_subjects(50, "test", draw(3)), sample_scenes(50, draw(3))),
        (sample_subjects(50, "test", draw(3)), sample_scenes(50, draw(3))),
        strict=True,
    ):
        assert all(torch.equal(value, vars(second)[name]) for name, value in vars(first).items())
    assert not torch.equal(sample_subjects(50, "test", draw(3)).hues, sample_subjects(50, "test", draw(4)).hues)


def test_hue_distance_goes_round_the_circle() -> None:
    found = hue_distance(torch.tensor([0.95, 0.1, 0.0]), torch.tensor([0.05, 0.95, 0.5]))
    assert found.tolist() == pytest.approx([0.1, 0.15, 0.5], abs=1e-6)
