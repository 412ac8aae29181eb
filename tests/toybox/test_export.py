from pathlib import Path

import pytest
import torch

from customized_grpo.data import SubjectDataset
from customized_grpo.errors import UserError
from customized_grpo.randomness import generator
from customized_grpo.toybox.export import export
from customized_grpo.toybox.pairs import draw_pairs
from customized_grpo.toybox.world import SPLITS


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_is_a_dataset_of_the_drawn_pairs(tmp_path: Path) -> None:
    manifest = export(tmp_path / "made", "validation", 5, seed=3)
    dataset = SubjectDataset.open(tmp_path / "made")
    pairs = draw_pairs(5, "validation", generator(3, "export", "validation"))
    assert manifest == tmp_path / "made" / "metadata.jsonl"
    assert [sample.prompt for sample in dataset] == pairs.captions
    references = dataset.references(list(dataset), lambda image, count: image)
    masks = dataset.masks(list(dataset))
    assert masks is not None
    for found, expected in ((references, pairs.references), (masks, pairs.masks)):
        assert torch.allclose(torch.stack([row[0] for row in found]), expected, atol=0.51 / 255)


def test_a_folder_may_be_named_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export(Path("data/made"), "train", 2)
    assert len(SubjectDataset.open("data/made")) == 2


def test_equal_seeds_export_equal_folders(tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        export(tmp_path / name, "train", 4, seed)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert contents(tmp_path / "first") != contents(tmp_path / "other")


def test_splits_have_samples_and_names_of_their_own(tmp_path: Path) -> None:
    for split in SPLITS:
        export(tmp_path / split, split, 2)
    names = {sample.id for split in SPLITS for sample in SubjectDataset.open(tmp_path / split)}
    assert len(names) == 6


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        export(tmp_path, "train", 2)
    assert contents(tmp_path) == {"mine.txt": b"precious"}
