"""Layouts of a dataset's references, and the copy meter that compares with them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from customized_grpo.data import Sample, SubjectDataset, load_image, save_image
from customized_grpo.data.dataset import write_metadata
from customized_grpo.evaluation.copy_paste import layout, reference_layouts
from customized_grpo.evaluation.metrics import CopyMetric
from customized_grpo.types import PromptBatch

Open = Callable[..., SubjectDataset]
NAMES = ("a", "b", "c", "d")


@pytest.fixture
def open_dataset(tmp_path: Path) -> Open:
    """Open a dataset of four random photographs, given of each sample its references and its subject."""
    draw = torch.Generator().manual_seed(0)
    for number, name in enumerate(NAMES):
        coarse = torch.rand(3, 8, 8, generator=draw)
        save_image(coarse.repeat_interleave(3 + number, 1).repeat_interleave(4, 2), tmp_path / f"{name}.png")

    def open_dataset(*rows: tuple[str, str | None]) -> SubjectDataset:
        samples = [
            Sample(str(number), f"prompt {number}", tuple(tmp_path / f"{name}.png" for name in names), (), subject)
            for number, (names, subject) in enumerate(rows)
        ]
        write_metadata(tmp_path, samples)
        return SubjectDataset.open(tmp_path)

    return open_dataset


def pictures(dataset: SubjectDataset, names: Sequence[str]) -> Tensor:
    return torch.cat([layout(load_image(dataset.folder / f"{name}.png")[None]) for name in names])


def copied(dataset: SubjectDataset, images: Tensor) -> Tensor:
    """Measure one image for each sample, with the layouts of the dataset's own references."""
    metric = CopyMetric(reference_layouts(dataset, dataset.samples))
    return metric.measure(images, PromptBatch.of(dataset, dataset.samples, masks=False))["copy"]


def test_a_subject_has_each_of_its_files_once(open_dataset: Open) -> None:
    dataset = open_dataset(("a", "cup"), ("ab", "cup"), ("c", "dog"), ("a", "cup"))
    found = reference_layouts(dataset, dataset.samples)
    assert list(found) == ["cup", "dog"]
    assert torch.equal(found["cup"], pictures(dataset, "ab")) and torch.equal(found["dog"], pictures(dataset, "c"))
    assert reference_layouts(dataset, dataset.samples[2:3]).keys() == {"dog"} and reference_layouts(dataset, []) == {}


def test_samples_without_a_subject_go_by_their_references(open_dataset: Open) -> None:
    dataset = open_dataset(("ab", None), ("c", None), ("ab", None), ("a", "cup"))
    assert [len(each) for each in reference_layouts(dataset, dataset.samples).values()] == [2, 1, 1]


@pytest.mark.parametrize("subjects", [("cup", "dog", "hat"), (None, None, None), ("cup", None, None)])
def test_a_copy_is_1_with_and_without_names_of_subjects(open_dataset: Open, subjects: tuple[str | None, ...]) -> None:
    dataset = open_dataset(*zip("abc", subjects, strict=True))
    small = [sample.references[0] for sample in dataset.samples]
    copies = torch.stack([torch.nn.functional.adaptive_avg_pool2d(load_image(path), 8) for path in small])
    assert copied(dataset, copies).tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    other = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(5))
    found = copied(dataset, other.expand(3, 3, 8, 8))
    for row, (own, *others) in enumerate(("abc", "bac", "cab")):
        targets = pictures(dataset, own)
        expected = float((targets @ pictures(dataset, others).T).mean())
        near = float((layout(other[None]) @ targets.T).squeeze())
        assert float(found[row]) == pytest.approx((near - expected) / (1 - expected), abs=1e-4)


def test_what_is_copied_does_not_depend_on_the_name_of_the_subject(open_dataset: Open) -> None:
    """Two subjects in one photograph: it is no picture of another subject that a reference could be near to."""
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    named, shared = open_dataset(("a", "cup"), ("b", "dog"), ("c", "hat")), ("a", "spoon")
    alone = copied(named, images)
    both = open_dataset(("a", "cup"), ("b", "dog"), ("c", "hat"), shared)
    assert copied(both, torch.cat([images, images[:1]]))[[0, 3]].tolist() == pytest.approx([float(alone[0])] * 2)


def test_without_other_subjects_nothing_is_expected(open_dataset: Open) -> None:
    dataset = open_dataset(("a", None), ("a", None))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    near = (layout(images) @ pictures(dataset, "a").T).squeeze(1)
    assert torch.allclose(copied(dataset, images), near, atol=1e-6)
    unknown = replace(PromptBatch.of(dataset, dataset.samples, masks=False), subjects=None)
    assert torch.allclose(CopyMetric({}).measure(images, unknown)["copy"], near, atol=1e-6)


def test_other_pictures_of_the_same_name_are_not_another_subjects(open_dataset: Open) -> None:
    """A reference that is not among the pictures known of its subject."""
    dataset = open_dataset(("a", "cup"), ("b", "cup"), ("c", "dog"))
    known = reference_layouts(dataset, dataset.samples[1:])
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    batch = PromptBatch.of(dataset, dataset.samples[:1], masks=False)
    found = CopyMetric(known).measure(images, batch)["copy"]
    assert torch.allclose(found, CopyMetric({"dog": known["dog"]}).measure(images, batch)["copy"])
    assert not torch.allclose(
        found, CopyMetric({"hat": known["cup"], "dog": known["dog"]}).measure(images, batch)["copy"]
    )
