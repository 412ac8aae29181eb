from dataclasses import replace

import pytest
import torch

from customized_grpo.toybox.drawing import CENTRE_X, SIZE, hsv_to_rgb, render
from customized_grpo.toybox.world import (
    ACCESSORIES,
    PATTERNS,
    POSITIONS,
    SCENES,
    SHAPES,
    Scenes,
    Subjects,
    sample_scenes,
    sample_subjects,
)


def world(count: int, seed: int = 0) -> tuple[Subjects, Scenes]:
    draw = torch.Generator().manual_seed(seed)
    return sample_subjects(count, "train", draw), sample_scenes(count, draw)


def bare(scenes: Scenes) -> Scenes:
    return replace(scenes, accessory=torch.zeros_like(scenes.accessory))


def test_pictures_and_masks_have_their_shapes_types_and_range() -> None:
    images, masks = render(*world(40))
    assert images.shape == (40, 3, SIZE, SIZE) and masks.shape == (40, 1, SIZE, SIZE)
    for values in (images, masks):
        assert values.dtype == torch.float32 and values.min() >= 0 and values.max() <= 1
    assert images.amax() > 0.9 and images.amin() < 0.15


def test_a_batch_is_drawn_the_same_in_any_chunks() -> None:
    subjects, scenes = world(600)
    images, masks = render(subjects, scenes)
    for rows in torch.arange(600).split(250):
        part, part_masks = render(subjects.take(rows), scenes.take(rows))
        assert torch.equal(images[rows], part) and torch.equal(masks[rows], part_masks)


def test_nothing_outside_the_mask_depends_on_the_skin() -> None:
    subjects, scenes = world(64)
    images, masks = render(subjects, bare(scenes))
    other = replace(subjects, pattern=(subjects.pattern + 1) % len(PATTERNS), hues=(subjects.hues + 0.3) % 1)
    changed = (render(other, bare(scenes))[0] != images).any(1, keepdim=True)
    assert not changed[masks == 0].any()
    assert changed[masks == 1].float().mean() > 0.6, "most of the subject is skin: the rest is eyes"


def test_nothing_inside_the_mask_depends_on_the_scene() -> None:
    subjects, scenes = world(64)
    images, masks = render(subjects, bare(scenes))
    elsewhere = replace(bare(scenes), scene=(scenes.scene + 1) % len(SCENES))
    changed = (render(subjects, elsewhere)[0] != images).any(1, keepdim=True)
    assert not changed[masks == 1].any()
    assert changed[masks == 0].float().mean() > 0.6


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=SHAPES)
def test_every_shape_covers_a_good_part_of_the_picture(shape: int) -> None:
    subjects, scenes = world(16)
    share = render(replace(subjects, shape=torch.full_like(subjects.shape, shape)), scenes)[1].mean((1, 2, 3))
    assert share.min() > 0.08 and share.max() < 0.35


def test_the_position_moves_the_subject() -> None:
    subjects, scenes = world(64)
    columns = torch.arange(SIZE) + 0.5
    for index, name in enumerate(POSITIONS):
        mask = render(subjects, replace(scenes, position=torch.full_like(scenes.position, index)))[1]
        centroid = (mask * columns).sum((1, 2, 3)) / mask.sum((1, 2, 3))
        assert (centroid - CENTRE_X[name]).abs().max() < 2


CHOICES = {"shape": SHAPES, "pattern": PATTERNS, "scene": SCENES, "accessory": ACCESSORIES, "position": POSITIONS}


@pytest.mark.parametrize("name", CHOICES)
def test_every_value_of_an_attribute_looks_different(name: str) -> None:
    subjects, scenes = world(8)
    pictures = []
    for value in range(len(CHOICES[name])):
        chosen = torch.full((8,), value)
        if hasattr(subjects, name):
            pictures.append(render(replace(subjects, **{name: chosen}), scenes)[0])
        else:
            pictures.append(render(subjects, replace(scenes, **{name: chosen}))[0])
    for index, first in enumerate(pictures):
        for second in pictures[index + 1 :]:
            assert ((first - second).abs().amax(1) > 0.1).flatten(1).sum(1).min() >= 8, "at least eight pixels differ"


@pytest.mark.parametrize("which", [0, 1])
def test_each_hue_is_seen(which: int) -> None:
    subjects, scenes = world(64)
    hues = subjects.hues.clone()
    hues[:, which] = (hues[:, which] + 0.5) % 1
    difference = (render(replace(subjects, hues=hues), scenes)[0] - render(subjects, scenes)[0]).abs().amax((1, 2, 3))
    assert difference.min() > 0.2


def test_hues_are_those_of_the_colour_circle() -> None:
    red_green_blue = hsv_to_rgb(torch.tensor([0.0, 1 / 3, 2 / 3]), 1.0, 1.0)
    assert torch.allclose(red_green_blue, torch.eye(3), atol=1e-5)


def test_every_subject_needs_its_setting() -> None:
    subjects, scenes = world(3)
    with pytest.raises(ValueError, match="3 subjects but 2 settings"):
        render(subjects, scenes.take(torch.arange(2)))
