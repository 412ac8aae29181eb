"""Masks of photographs that EXIF turns lie on the subject, whichever way round they were drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from customized_grpo.data import SubjectDataset, load_image, load_mask
from customized_grpo.data.masks import load_mask_of, turned
from customized_grpo.data.prepare import Options, prepare
from customized_grpo.errors import UserError

HEIGHT, WIDTH = 64, 96


def subject(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A white subject on black, which looks different every way round."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[: height // 4, : width // 2] = 255
    pixels[: height // 2, : width // 4] = 255
    return pixels


def exif(orientation: int | None) -> Image.Exif:
    found = Image.Exif()
    if orientation is not None:
        found[0x0112] = orientation
    return found


def pair(folder: Path, orientation: int | None, mask: np.ndarray, of_mask: int | None = None, **size: int) -> Path:
    """A subject folder with a photograph, stored with `orientation`, in which the subject is white; and its mask."""
    (folder / "toy").mkdir(parents=True)
    picture = Image.fromarray(subject(**size)).convert("RGB")
    picture.save(folder / "toy" / "a.jpg", quality=95, exif=exif(orientation))
    Image.fromarray(mask).save(folder / "toy" / "a_mask.png", **({} if of_mask is None else {"exif": exif(of_mask)}))
    (folder / "toy" / "prompts.txt").write_text("a toy")
    return folder


def upright(mask: np.ndarray, orientation: int) -> np.ndarray:
    picture = Image.fromarray(mask)
    picture.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(picture))


def assert_mask_lies_on_subject(source: Path) -> None:
    output = source.with_name(f"{source.name}-out")
    prepare(source, output, Options())
    (sample,) = SubjectDataset.open(output)
    mask, image = load_mask(sample.masks[0]), load_image(sample.references[0])
    assert ((mask > 0.5) == (image.mean(0, keepdim=True) > 0.5)).float().mean() > 0.97


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_is_what_pillow_does(orientation: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 5), dtype=np.uint8)
    assert (
        turned(torch.from_numpy(values)[None], orientation)[0].numpy().tolist() == upright(values, orientation).tolist()
    )


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_of_the_stored_pixels_is_turned_as_its_photograph(tmp_path: Path, orientation: int) -> None:
    assert_mask_lies_on_subject(pair(tmp_path / "stored", orientation, subject()))
    small = np.asarray(Image.fromarray(subject()).resize((WIDTH // 3, HEIGHT // 3), Image.Resampling.NEAREST))
    assert_mask_lies_on_subject(pair(tmp_path / "small", orientation, small))
    assert_mask_lies_on_subject(pair(tmp_path / "shown", orientation, upright(subject(), orientation)))


@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_a_mask_with_an_orientation_of_its_own_is_turned_by_that(tmp_path: Path, orientation: int | None) -> None:
    assert_mask_lies_on_subject(pair(tmp_path / "same", orientation, subject(), orientation or 1))
    shown = upright(subject(), orientation or 1)
    assert_mask_lies_on_subject(pair(tmp_path / "upright", orientation, shown, 1))


@pytest.mark.parametrize(
    ("orientation", "size"),
    [(2, {}), (3, {}), (4, {}), (6, {"height": 80, "width": 80}), (8, {"height": 80, "width": 81})],
)
def test_a_mask_that_fits_both_ways_round_is_refused(tmp_path: Path, orientation: int, size: dict[str, int]) -> None:
    mask = subject(**size)
    if size.get("width") == 81:  # a square at the tenth of a picture that is nearly one
        mask = subject(8, 8)
    source = pair(tmp_path / "src", orientation, mask, **size)
    with pytest.raises(
        UserError, match=rf"a_mask\.png: the mask fits its picture .*\(orientation {orientation}\), both"
    ):
        prepare(source, None, Options())


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    for number, (orientation, shape) in enumerate([(1, (96, 64)), (6, (64, 64)), (None, (60, 96)), (6, (64, 90))]):
        source = pair(tmp_path / str(number), orientation, subject(*shape))
        with pytest.raises(
            UserError, match=r"a_mask\.png: the mask is .* but its picture .*; expected a mask of its shape"
        ):
            prepare(source, None, Options())


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    source = pair(tmp_path / "src", 6, subject())
    (source / "toy" / "a_mask.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a_mask\.png: not an image of a known format"):
        load_mask_of(source / "toy" / "a.jpg", source / "toy" / "a_mask.png")


def opened(source: Path) -> SubjectDataset:
    record = {"id": "toy", "prompt": "a toy", "references": ["a.jpg"], "masks": ["a_mask.png"]}
    (source / "toy" / "metadata.jsonl").write_text(json.dumps(record))
    return SubjectDataset.open(source / "toy")


def test_a_data_folder_takes_masks_of_upright_pictures_alone(tmp_path: Path) -> None:
    assert len(opened(pair(tmp_path / "shown", 6, upright(subject(), 6)))) == 1
    assert len(opened(pair(tmp_path / "own", 3, subject(), 3))) == 1
    with pytest.raises(
        UserError, match=r"the mask is 96x64 but its reference a\.jpg is 64x96 as EXIF turns it; turn the mask"
    ):
        opened(pair(tmp_path / "stored", 6, subject()))
    with pytest.raises(UserError, match=r"a_mask\.png: the mask fits its picture .*\(orientation 3\), both"):
        opened(pair(tmp_path / "both", 3, subject()))
    with pytest.raises(UserError, match=r"the mask is 64x64 but its reference a\.jpg is 64x96; expected the same size"):
        opened(pair(tmp_path / "other", 6, subject(64, 64)))
