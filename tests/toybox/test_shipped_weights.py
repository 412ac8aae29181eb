"""The quality bars of the weights that ship with the package, measured on the test split."""

import math

import pytest

from customized_grpo.toybox.quality import measure_quality
from customized_grpo.toybox.weights import IDENTITY_ENCODERS, NAMES, read_quality, shipped_folder

Quality = dict[str, dict[str, float]]
MEASURED = [100, pytest.param(400, marks=pytest.mark.slow)]
"""Numbers of pairs to measure on."""
MAX_BYTES = 10_000_000


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_there_and_small(name: str) -> None:
    assert 0 < (shipped_folder() / f"{name}.safetensors").stat().st_size <= MAX_BYTES


@pytest.mark.parametrize("pairs", MEASURED)
def test_the_weights_are_as_good_as_they_should_be(pairs: int, subtests: pytest.Subtests) -> None:
    """One test, since measuring takes long: several would be measured for by each process of a test run."""
    quality: Quality = measure_quality(shipped_folder(), pairs)
    sampling_error = 0.06 * math.sqrt(400 / pairs)  # about two and a half standard errors of a share near a half
    with subtests.test("the judge reads every attribute of clean renders"):
        judge = quality["judge"]
        assert judge.keys() == {"shape", "pattern", "scene", "accessory", "position", "both hues within tolerance"}
        assert {name: share for name, share in judge.items() if share < 0.97} == {}
    bounds = {"prompt_satisfied": (0.40, 0.75), "identity_kept": (0.30, 0.65), "joint_success": (0.15, 0.45)}
    for metric, (low, high) in bounds.items():
        with subtests.test("the base leaves work on both sides", metric=metric):
            assert low <= quality["base"][metric] <= high
        with subtests.test("the base stands between chance and the ceiling", metric=metric):
            assert quality["chance"][metric] < quality["base"][metric] < quality["ceiling"][metric]
    with subtests.test("the leak is a dial, and every encoder still knows the subject"):
        # Told from another subject in the reference's scene, which is what a leak makes hard; chance is a half.
        low, medium, high = (
            quality[name]["AUC same subject elsewhere against other subject here"] for name in IDENTITY_ENCODERS
        )
        assert low > medium + 0.02 > high + 0.1 and medium >= 0.9 and high >= 0.7
    for name in IDENTITY_ENCODERS:
        with subtests.test("every identity encoder is hackable", name=name):
            assert quality[name]["copy of the reference above a correct render"] > 0.5
    with subtests.test("the copy meter tells copies from correct renders"):
        assert min(share for name, share in quality["copy_meter"].items() if name.startswith("AUC")) >= 0.95
    with subtests.test("the figures beside the weights are theirs"):
        stated = read_quality()
        assert stated.keys() == quality.keys()
        for title, figures in quality.items():
            assert stated[title] == pytest.approx(figures, abs=sampling_error), title
