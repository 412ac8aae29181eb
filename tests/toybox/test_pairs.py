import pytest
import torch

from customized_grpo.toybox.drawing import render
from customized_grpo.toybox.language import Request, parse
from customized_grpo.toybox.pairs import PairNoise, Pairs, draw_pairs
from customized_grpo.toybox.world import HUE_BINS, split_of


def pairs(count: int = 200, noise: PairNoise | None = None, split: str = "train", seed: int = 0) -> Pairs:
    return draw_pairs(count, split, torch.Generator().manual_seed(seed), noise)


def changed(first: Pairs, second: Pairs) -> float:
    return float((first.targets != second.targets).flatten(1).any(1).float().mean())


def test_a_clean_target_is_the_reference_subject_as_the_caption_says() -> None:
    drawn = pairs()
    assert torch.equal(drawn.targets, render(drawn.subjects, drawn.target_scenes)[0])
    references, masks = render(drawn.subjects, drawn.reference_scenes)
    assert torch.equal(drawn.references, references) and torch.equal(drawn.masks, masks)
    scenes = drawn.target_scenes
    said = torch.stack([drawn.subjects.shape, scenes.scene, scenes.accessory, scenes.position], 1).tolist()
    assert [parse(text) for text in drawn.captions] == [Request(*row) for row in said]


def test_the_target_is_in_another_scene_than_the_reference() -> None:
    drawn = pairs(1000)
    assert (drawn.target_scenes.scene != drawn.reference_scenes.scene).all()


def test_identities_are_those_of_the_split() -> None:
    subjects = pairs(split="test").subjects
    assert (split_of(subjects.shape, subjects.pattern, (subjects.hues * HUE_BINS).long()) == 2).all()


def test_equal_seeds_draw_equal_pairs() -> None:
    noise = PairNoise(0.2, 0.2, 0.2, 0.1, 0.2, 0.2)
    assert torch.equal(pairs(noise=noise).targets, pairs(noise=noise).targets)
    assert pairs().captions != pairs(seed=1).captions


def test_taking_rows_keeps_pairs_together() -> None:
    drawn, index = pairs(20), torch.tensor([7, 3, 7])
    taken = drawn.take(index)
    assert taken.captions == [drawn.captions[i] for i in (7, 3, 7)]
    assert torch.equal(taken.targets, render(taken.subjects, taken.target_scenes)[0])
    assert torch.equal(taken.references, drawn.references[index]) and torch.equal(taken.masks, drawn.masks[index])


def test_no_noise_is_clean() -> None:
    assert changed(pairs(noise=PairNoise()), pairs()) == 0


@pytest.mark.parametrize("field", ["caption", "shape", "pattern", "hue", "stay"])
def test_each_noise_changes_targets_and_nothing_else(field: str) -> None:
    noisy, clean = pairs(noise=PairNoise(**{field: 0.3})), pairs()
    assert changed(noisy, clean) > 0.15
    assert torch.equal(noisy.references, clean.references) and noisy.captions == clean.captions


def test_a_share_of_targets_copies_the_reference() -> None:
    drawn = pairs(1000, PairNoise(copy=0.3))
    share = (drawn.targets == drawn.references).flatten(1).all(1).float().mean()
    assert float(share) == pytest.approx(0.3, abs=0.06)


def test_a_share_of_targets_stays_in_the_references_background() -> None:
    drawn, clean = pairs(1000, PairNoise(stay=0.3)), pairs(1000)
    corners = [images[..., :3, :3].flatten(1) for images in (drawn.targets, drawn.references)]
    assert 0.24 < float((corners[0] == corners[1]).all(1).float().mean()) < 0.36
    assert 0.24 < changed(drawn, clean) < 0.36
    differing = (drawn.targets != drawn.references).flatten(1).any(1)
    assert differing.float().mean() > 0.9, "accessory and place are asked for"
