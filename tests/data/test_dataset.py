import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from customized_grpo.data import (
    Sample,
    SubjectDataset,
    batch_indices,
    dataset,
    load_image,
    load_mask,
    resize_square,
    write_metadata,
)
from customized_grpo.errors import UserError
from customized_grpo.io.files import StorageError


def picture(path: Path, height: int = 8, width: int = 8, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def square(image: torch.Tensor, count: int) -> torch.Tensor:
    return resize_square(image, 8)


def mask(path: Path, height: int = 8, width: int = 8) -> Path:
    values = np.zeros((height, width), dtype=np.uint8)
    values[height // 4 :, : width // 2] = 255
    Image.fromarray(values).save(path)
    return path


def record(**changes: Any) -> dict[str, Any]:
    return {"id": "cat-1", "prompt": "a cat on the beach", "references": ["a.png"], **changes}


def metadata(folder: Path, *lines: Any) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text)
    return folder


def message(folder: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        SubjectDataset.open(folder, **settings)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with two pictures and their masks, and no metadata yet."""
    root = (tmp_path / "data").resolve()
    for seed, name in enumerate("ab"):
        picture(root / f"{name}.png", seed=seed)
        mask(root / f"{name}_mask.png")
    return root


def test_a_good_folder_is_read_in_order(folder: Path) -> None:
    picture(folder / "more" / "c.png")
    metadata(
        folder,
        record(),
        "",
        record(id="zwei", prompt="ein Käfer 🐞", references=["b.png", "more/../more/c.png"], subject="beetle"),
        record(id="3", masks=["a_mask.png"], subject=None),
    )
    data = SubjectDataset.open(folder)
    assert list(data) == [
        Sample("cat-1", "a cat on the beach", (folder / "a.png",)),
        Sample("zwei", "ein Käfer 🐞", (folder / "b.png", folder / "more/c.png"), (), "beetle"),
        Sample("3", "a cat on the beach", (folder / "a.png",), (folder / "a_mask.png",)),
    ]
    assert len(data) == 3
    assert data[-1].id == "3"
    with pytest.raises(AttributeError):
        data[0].id = "other"  # type: ignore[misc]


def test_a_byte_order_mark_and_windows_line_ends_are_fine(folder: Path) -> None:
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(record()).encode() + b"\r\n\r\n")
    assert len(SubjectDataset.open(folder)) == 1


def test_a_folder_reached_through_a_link_is_fine(folder: Path, tmp_path: Path) -> None:
    metadata(folder, record())
    (tmp_path / "link").symlink_to(folder)
    assert SubjectDataset.open(tmp_path / "link")[0].references == (folder / "a.png",)


def test_missing_folder_and_metadata(tmp_path: Path) -> None:
    assert "nowhere does not exist; expected one with metadata.jsonl" in message(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in message(tmp_path / "file")
    assert "metadata.jsonl is missing; expected one JSON object a line" in message(tmp_path)
    for text in ("", "\n \n"):
        (tmp_path / "metadata.jsonl").write_text(text)
        assert "metadata.jsonl is empty; expected at least one sample" in message(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "x", "prompt"', "broken JSON: Expecting ':' delimiter at column 21"),
        ("[" * 100_000, "broken JSON: "),
        (
            '{"id": "x", "prompt": "a", "references": ["a.png"], "prompt": "b"}',
            '"prompt" stands in it twice; remove one',
        ),
        (
            '["x"]',
            'expected a JSON object with "id", "prompt", "references", "masks", "subject", got a list: ["x"]',
        ),
        ("3", "got a number: 3"),
        ({"id": "x", "references": ["a.png"]}, 'the field "prompt" is missing'),
        ({"id": "x", "prompt": "p"}, 'the field "references" is missing'),
        (record(refrences=["a.png"]), 'unknown field "refrences"; did you mean "references"?'),
        (record(zzz=1), 'unknown field "zzz"; known are "id", "prompt"'),
        (record(prompt=3), '"prompt" must be a string, got a number: 3'),
        (record(prompt=None), '"prompt" must be a string, got null: null'),
        (record(prompt=True), '"prompt" must be a string, got a boolean: true'),
        (record(prompt=" \t"), '"prompt" is empty'),
        (record(prompt="\ud800"), '"prompt" has half of a surrogate pair, which no file can hold: "\\ud800"'),
        (record(id=""), '"id" is empty'),
        (record(id=7), '"id" must be a string, got a number: 7'),
        (record(id="../x"), '"id" names files: at most 128 bytes, no /'),
        (record(id="x" * 129), '"id" names files'),
        (record(references="a.png"), '"references" must be a list of strings, got a string: "a.png"'),
        (record(references=[]), '"references" is empty; expected at least one image'),
        (record(references=["a.png", 3]), '"references[1]" must be a string, got a number: 3'),
        (record(references=[""]), '"references[0]" is empty'),
        (record(references=["a\0.png"]), '"references[0]" has control characters'),
        (record(id="a\nb"), '"id" has control characters'),
        (record(subject=["x"]), '"subject" must be a string, got a list'),
        (record(masks={"a": 1}), '"masks" must be a list of strings, got an object'),
        (record(masks=["a_mask.png", "b_mask.png"]), '"masks" has 2 entries and "references" 1'),
        (record(masks=[]), '"masks" has 0 entries and "references" 1'),
        (record(references=["../secret.png"]), "\"references[0]\", '../secret.png', leaves the data folder"),
        (record(references=["more/../../secret.png"]), "leaves the data folder"),
        (record(references=["/etc/passwd"]), "\"references[0]\" is '/etc/passwd'; expected a path relative"),
        (record(masks=["../secret.png"]), "\"masks[0]\", '../secret.png', leaves the data folder"),
    ],
)
def test_a_wrong_line_is_named(folder: Path, line: Any, said: str) -> None:
    picture(folder.parent / "secret.png")
    metadata(folder, record(id="good"), line)
    found = message(folder)
    assert found.startswith(f"{folder / 'metadata.jsonl'}:2: ")
    assert said in found
    assert "\n" not in found


def test_a_line_that_is_not_utf8_is_named(folder: Path) -> None:
    (folder / "metadata.jsonl").write_bytes(json.dumps(record()).encode() + b'\n{"id": "\xff"}\n')
    assert "metadata.jsonl:2: not UTF-8" in message(folder)


def test_a_link_that_leaves_the_folder_is_refused(folder: Path) -> None:
    (folder / "link.png").symlink_to(picture(folder.parent / "secret.png"))
    (folder / "out").symlink_to(folder.parent)
    metadata(folder, record(references=["link.png"]), record(id="2", references=["out/secret.png"]))
    found = message(folder)
    assert "2 of 2 lines are wrong" in found
    assert "'link.png', leaves the data folder" in found
    assert "'out/secret.png', leaves the data folder" in found


def test_a_link_inside_the_folder_is_followed(folder: Path) -> None:
    (folder / "link.png").symlink_to("a.png")
    metadata(folder, record(references=["link.png"]))
    assert SubjectDataset.open(folder)[0].references == (folder / "a.png",)


def test_a_link_to_itself_is_a_missing_image(folder: Path) -> None:
    (folder / "loop.png").symlink_to("loop.png")
    metadata(folder, record(references=["loop.png"]))
    assert "loop.png: no such image file" in message(folder)


def test_a_sibling_folder_with_the_same_beginning_is_outside(folder: Path) -> None:
    picture(folder.parent / "data-secret" / "x.png")
    metadata(folder, record(references=["../data-secret/x.png"]))
    assert "leaves the data folder" in message(folder)


def test_repeated_ids_are_named_with_the_first_line(folder: Path) -> None:
    metadata(folder, record(), record(id="other"), record())
    assert "metadata.jsonl:3: the id 'cat-1' is already the id of line 1" in message(folder)


def test_all_that_is_wrong_with_a_line_is_said(folder: Path) -> None:
    metadata(folder, {"id": 3, "promt": "x", "references": ["a.png"]})
    found = message(folder)
    assert '"id" must be a string' in found
    assert 'the field "prompt" is missing' in found
    assert 'unknown field "promt"; did you mean "prompt"?' in found


def test_all_wrong_lines_are_listed_up_to_twenty(folder: Path) -> None:
    metadata(folder, record(), *["{" for _ in range(25)])
    lines = message(folder).splitlines()
    assert "25 of 26 lines are wrong" in lines[0]
    assert len(lines) == 1 + 20 + 1
    assert "metadata.jsonl:21: broken JSON" in lines[20]
    assert lines[-1].strip() == "... and 5 more"


def test_all_bad_images_are_listed_and_counted(folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder / "cut.jpg")
    data = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("hello")
    picture(folder / "large.png", 30, 40)
    names = ["a.png", "cut.jpg", "gone.png", "text.png", "large.png", "gone.png"]
    metadata(folder, *[record(id=str(i), references=[name]) for i, name in enumerate(names)])
    lines = message(folder, max_pixels=1000).splitlines()
    assert lines[0].endswith("metadata.jsonl: 4 problems in 5 image files:")
    for line, said in zip(
        lines[1:],
        [
            ":2: {}/cut.jpg: broken or truncated image",
            ":3: {}/gone.png: no such image file",
            ":4: {}/text.png: not an image of a known format",
            ":5: {}/large.png: 40x30 is 1,200 pixels, more than the limit of 1,000",
        ],
        strict=True,
    ):
        assert said.format(folder) in line


def test_more_than_twenty_bad_images_are_counted(folder: Path) -> None:
    metadata(folder, *[record(id=str(i), references=[f"gone{i}.png"]) for i in range(30)])
    lines = message(folder).splitlines()
    assert "30 problems in 30 image files" in lines[0]
    assert len(lines) == 22
    assert lines[-1].strip() == "... and 10 more"


def test_a_mask_of_another_size_is_named(folder: Path) -> None:
    mask(folder / "a_mask.png", 8, 9)
    metadata(folder, record(masks=["a_mask.png"]))
    found = message(folder)
    assert "a_mask.png: the mask is 9x8 but its reference a.png is 8x8; expected the same size" in found


def test_mask_sizes_are_compared_after_orientation(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8), "red").save(folder / "turned.jpg", exif=exif)
    mask(folder / "turned_mask.png", height=16, width=8)
    metadata(folder, record(references=["turned.jpg"], masks=["turned_mask.png"]))
    assert len(SubjectDataset.open(folder)) == 1


def test_a_bad_mask_is_named(folder: Path) -> None:
    Image.new("L", (8, 8), 1).save(folder / "a_mask.png")
    metadata(folder, record(masks=["a_mask.png"]), record(id="2", references=["b.png"], masks=["gone.png"]))
    found = message(folder)
    assert "a_mask.png: the mask is empty" in found
    assert "gone.png: no such image file" in found


def test_each_distinct_image_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[Path] = []

    def inspect(path: Path, max_pixels: int) -> tuple[int, int]:
        looked_at.append(path)
        return 8, 8

    monkeypatch.setattr(dataset, "inspect_image", inspect)
    names = ["a.png", "b.png", "./a.png"]
    metadata(folder, *[record(id=str(i), references=names) for i in range(5)])
    SubjectDataset.open(folder)
    assert sorted(looked_at) == [folder / "a.png", folder / "b.png"]


def test_references_and_masks_are_batches_in_order(folder: Path) -> None:
    picture(folder / "a.png", 12, 20, seed=3)
    mask(folder / "a_mask.png", 12, 20)
    both = {"references": ["a.png", "b.png"], "masks": ["a_mask.png", "b_mask.png"]}
    metadata(folder, record(**both), record(id="2", **{key: names[::-1] for key, names in both.items()}))
    data = SubjectDataset.open(folder)
    references, masks = data.references(list(data), square), data.masks(list(data))
    assert masks is not None
    assert torch.equal(references[0][0], resize_square(load_image(folder / "a.png"), 8))
    assert torch.equal(references[0][1], load_image(folder / "b.png"))
    assert torch.equal(torch.stack(references[1]), torch.stack(references[0]).flip(0))
    assert torch.equal(masks[0][0], load_mask(folder / "a_mask.png"))
    assert torch.equal(masks[0][1], load_mask(folder / "b_mask.png"))
    assert all(torch.equal(one, other) for one, other in zip(masks[1], masks[0][::-1], strict=True))


def test_originals_have_the_size_of_their_files_and_are_not_kept(folder: Path) -> None:
    picture(folder / "a.png", 12, 20, seed=3)
    metadata(folder, record(), record(id="2", references=["b.png", "a.png"]))
    data = SubjectDataset.open(folder)
    originals = data.originals(list(data))
    assert len(originals) == 2
    assert [[tuple(each.shape) for each in row] for row in originals] == [[(3, 12, 20)], [(3, 8, 8), (3, 12, 20)]]
    assert torch.equal(originals[0][0], load_image(folder / "a.png"))
    assert torch.equal(originals[1:][0][0], load_image(folder / "b.png"))
    picture(folder / "a.png", 12, 20, seed=4)
    assert torch.equal(originals[0][0], load_image(folder / "a.png"))


def test_samples_of_a_batch_may_differ_in_their_references(folder: Path) -> None:
    picture(folder / "wide.png", 6, 18)
    metadata(folder, record(references=["wide.png"]), record(id="2", references=["a.png", "b.png", "wide.png"]))
    data = SubjectDataset.open(folder)
    counts: list[int] = []

    def prepare(image: torch.Tensor, count: int) -> torch.Tensor:
        counts.append(count)
        return image

    first, second = data.references(list(data), prepare)
    assert [tuple(image.shape[1:]) for image in (*first, *second)] == [(6, 18), (8, 8), (8, 8), (6, 18)]
    assert counts == [1, 3, 3, 3]


def test_a_batch_without_masks_has_none(folder: Path) -> None:
    metadata(folder, record())
    data = SubjectDataset.open(folder)
    assert data.masks([data[0]]) is None


def test_batches_with_some_masks_are_refused_by_name(folder: Path) -> None:
    metadata(folder, record(id="one"), record(id="masked", masks=["a_mask.png"]))
    data = SubjectDataset.open(folder)
    with pytest.raises(UserError, match=r"1 of 2 samples of one batch have no masks: 'one'; give masks"):
        data.masks(list(data))


@pytest.mark.parametrize(("cache_bytes", "loads"), [(10**6, 2), (0, 4), (3 * 8 * 8 * 4, 4)])
def test_the_cache_is_bounded_and_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int, loads: int
) -> None:
    loaded: list[Path] = []

    def counted(path: Path, max_pixels: int) -> torch.Tensor:
        loaded.append(path)
        return load_image(path, max_pixels)

    monkeypatch.setattr(dataset, "load_image", counted)
    metadata(folder, record(), record(id="2", references=["b.png"]))
    data = SubjectDataset.open(folder, cache_bytes=cache_bytes)
    first, second = (torch.stack([row[0] for row in data.references(list(data), square)]) for _ in range(2))
    assert torch.equal(first, second)
    assert len(loaded) == loads


def test_an_image_lost_after_opening_is_named(folder: Path) -> None:
    metadata(folder, record())
    data = SubjectDataset.open(folder)
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png: no such image file"):
        data.references([data[0]], square)


def test_written_metadata_is_read_back(folder: Path) -> None:
    samples = [
        Sample(
            "1",
            "ein Käfer 🐞\nin two lines",
            (folder / "a.png",),
            (folder / "a_mask.png",),
            "cat",
        ),
        Sample("2", "a dog", (Path("b.png"), Path("a.png"))),
    ]
    path = write_metadata(folder, samples)
    assert path == folder / "metadata.jsonl"
    back = list(SubjectDataset.open(folder))
    assert back[0] == samples[0]
    assert back[1].references == (folder / "b.png", folder / "a.png")
    assert json.loads(path.read_text().splitlines()[1]) == {
        "id": "2",
        "prompt": "a dog",
        "references": ["b.png", "a.png"],
    }
    first = path.read_bytes()
    assert write_metadata(folder, back).read_bytes() == first


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([Sample("1", "p", (Path("../x.png"),))], "leaves the data folder"),
        ([Sample("1", "p", (Path("/etc/passwd"),))], "leaves the data folder"),
        ([Sample("1", " ", (Path("a.png"),))], '"prompt" is empty'),
        ([Sample("1", "p", ())], '"references" is empty'),
        ([Sample("1", "p", (Path("a.png"),))] * 2, "is already the id of line 1"),
    ],
)
def test_what_could_not_be_read_is_not_written(folder: Path, samples: list[Sample], said: str) -> None:
    metadata(folder, record())
    before = sorted(os.listdir(folder)), (folder / "metadata.jsonl").read_bytes()
    with pytest.raises(UserError, match=said):
        write_metadata(folder, samples)
    assert (sorted(os.listdir(folder)), (folder / "metadata.jsonl").read_bytes()) == before


def test_an_interrupted_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata(folder, record())
    before = sorted(os.listdir(folder)), (folder / "metadata.jsonl").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=f"{folder}: no space to write"):
        write_metadata(folder, [Sample("new", "p", (Path("a.png"),))])
    assert (sorted(os.listdir(folder)), (folder / "metadata.jsonl").read_bytes()) == before


@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 2**40), st.integers(0, 40))
def test_batches_walk_through_whole_epochs(count: int, per_iteration: int, seed: int, iterations: int) -> None:
    walk = [i for k in range(iterations + 1) for i in batch_indices(count, per_iteration, seed, k)]
    assert len(walk) == (iterations + 1) * per_iteration
    for start in range(0, len(walk) - count + 1, count):
        assert sorted(walk[start : start + count]) == list(range(count))
    spread = Counter(walk).values()
    assert max(spread) - (min(spread) if len(spread) == count else 0) <= 1


def test_an_iteration_does_not_depend_on_those_before() -> None:
    late = batch_indices(10, 4, 0, 7)
    torch.manual_seed(5)
    assert [batch_indices(10, 4, 0, k) for k in range(8)][7] == late


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = {tuple(batch_indices(50, 50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_is_pinned() -> None:
    assert batch_indices(6, 6, 0, 0) == [2, 5, 1, 3, 0, 4]
    assert batch_indices(6, 4, 0, 1) == [0, 4, 4, 2]


@pytest.mark.parametrize("numbers", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, -1)])
def test_impossible_batches_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected num_samples >= 1"):
        batch_indices(*numbers)
