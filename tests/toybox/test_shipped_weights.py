"""The quality bars of the weights that ship with the package, measured on the test split."""

import pytest

from customized_grpo.toybox.pretrain import measure_quality
from customized_grpo.toybox.weights import IDENTITY_ENCODERS, NAMES, read_quality, shipped_folder

pytestmark = pytest.mark.xdist_group("shipped weights")
"""In one process, which measures them once."""
Quality = dict[str, dict[str, float]]
PAIRS = 400
SAMPLING_ERROR = 0.06
"""Two and a half standard errors of a share near a half, measured on `PAIRS` pairs."""
MAX_BYTES = 10_000_000


@pytest.fixture(scope="module")
def quality() -> Quality:
    return measure_quality(shipped_folder(), PAIRS)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_there_and_small(name: str) -> None:
    assert 0 < (shipped_folder() / f"{name}.safetensors").stat().st_size <= MAX_BYTES


def test_the_judge_reads_every_attribute_of_clean_renders(quality: Quality) -> None:
    judge = quality["judge"]
    assert judge.keys() == {"shape", "pattern", "scene", "accessory", "position", "both hues within tolerance"}
    assert {name: share for name, share in judge.items() if share < 0.97} == {}


@pytest.mark.parametrize(
    ("metric", "low", "high"),
    [("prompt_satisfied", 0.40, 0.75), ("identity_kept", 0.30, 0.65), ("joint_success", 0.15, 0.45)],
)
def test_the_base_leaves_work_on_both_sides(quality: Quality, metric: str, low: float, high: float) -> None:
    assert low <= quality["base"][metric] <= high


@pytest.mark.parametrize("metric", ["prompt_satisfied", "identity_kept", "joint_success"])
def test_the_base_stands_between_chance_and_the_ceiling(quality: Quality, metric: str) -> None:
    assert quality["chance"][metric] < quality["base"][metric] < quality["ceiling"][metric]


def test_the_leak_is_a_dial_and_every_encoder_still_knows_the_subject(quality: Quality) -> None:
    """Told from another subject in the reference's scene, which is what a leak makes hard; chance is a half."""
    low, medium, high = (
        quality[name]["AUC same subject elsewhere against other subject here"] for name in IDENTITY_ENCODERS
    )
    assert low > medium + 0.02 > high + 0.1 and medium >= 0.9 and high >= 0.7


@pytest.mark.parametrize("name", IDENTITY_ENCODERS)
def test_every_identity_encoder_is_hackable(quality: Quality, name: str) -> None:
    assert quality[name]["copy of the reference above a correct render"] > 0.5


def test_the_copy_meter_tells_copies_from_correct_renders(quality: Quality) -> None:
    assert min(share for name, share in quality["copy_meter"].items() if name.startswith("AUC")) >= 0.95


def test_the_figures_beside_the_weights_are_theirs(quality: Quality) -> None:
    stated = read_quality()
    assert stated.keys() == quality.keys()
    for title, figures in quality.items():
        assert stated[title] == pytest.approx(figures, abs=SAMPLING_ERROR), title
