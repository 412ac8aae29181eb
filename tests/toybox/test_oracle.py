from pathlib import Path

import pytest
import torch
from torch import Tensor

from customized_grpo.toybox.oracle import HUE_TOLERANCE, PROMPT_ATTRIBUTES, Oracle, Reading, Verdict
from customized_grpo.toybox.world import ACCESSORIES, POSITIONS, SCENES, SHAPES

PROMPT = "a star on the beach wearing a red hat, on the left"
RIGHT = {
    "shape": SHAPES.index("star"), "pattern": 1, "scene": SCENES.index("beach"), "accessory": ACCESSORIES.index("hat"),
    "position": POSITIONS.index("left"), "hues": (0.98, 0.5),
}  # fmt: skip


def reading(**changes: object) -> Reading:
    values = RIGHT | changes
    hues = torch.tensor([values.pop("hues")]) % 1
    return Reading({name: torch.tensor([value]) for name, value in values.items()}, hues)


def verdict(monkeypatch: pytest.MonkeyPatch, weights: Path, seen: Reading, prompt: str = PROMPT) -> Verdict:
    """The judge's verdict when it sees `seen` in the picture and `RIGHT`, elsewhere and bare, in the reference."""
    judge = Oracle(weights)
    wanted = reading(scene=SCENES.index("sea"), accessory=0, position=1)
    picture, reference = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    monkeypatch.setattr(judge, "read", lambda images: wanted if images is reference else seen)
    return judge.judge(picture, [prompt], reference)


def test_a_right_picture_succeeds(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> None:
    assert verdict(monkeypatch, tiny_weights, reading()).joint_success.tolist() == [True]


@pytest.mark.parametrize("name", PROMPT_ATTRIBUTES)
def test_one_wrong_attribute_fails_the_prompt(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path, name: str) -> None:
    found = verdict(monkeypatch, tiny_weights, reading(**{name: (RIGHT[name] + 1) % 3}))
    assert not found.prompt_satisfied and not found.joint_success
    assert bool(found.identity_kept) == (name != "shape"), "scene, accessory and position are not identity"


@pytest.mark.parametrize("name", ["scene", "position"])
def test_what_the_prompt_leaves_free_is_free(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path, name: str) -> None:
    prompt = {"scene": "a star wearing a red hat, on the left", "position": "a star on the beach wearing a red hat"}
    found = verdict(monkeypatch, tiny_weights, reading(**{name: (RIGHT[name] + 1) % 3}), prompt[name])
    assert found.prompt_satisfied


def test_an_accessory_left_unsaid_must_be_absent(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> None:
    assert not verdict(monkeypatch, tiny_weights, reading(), "a star on the beach, on the left").prompt_satisfied


def test_another_pattern_is_another_subject(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> None:
    found = verdict(monkeypatch, tiny_weights, reading(pattern=2))
    assert found.prompt_satisfied and not found.identity_kept and not found.joint_success


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("share", "kept"), [(0.9, True), (-0.9, True), (1.1, False), (-1.1, False)])
def test_each_hue_is_kept_within_the_tolerance_round_the_circle(
    monkeypatch: pytest.MonkeyPatch, tiny_weights: Path, which: int, share: float, kept: bool
) -> None:
    hues = list(RIGHT["hues"])
    hues[which] += share * HUE_TOLERANCE
    assert bool(verdict(monkeypatch, tiny_weights, reading(hues=hues)).identity_kept) == kept


def test_a_picture_is_read_alone(tiny_weights: Path) -> None:
    judge, images = Oracle(tiny_weights), torch.rand(5, 3, 32, 32)

    def flat(seen: Reading) -> Tensor:
        return torch.stack([*seen.attributes.values()], 1)

    together, alone = judge.read(images), [judge.read(image[None]) for image in images]
    assert torch.equal(flat(together), torch.cat([flat(one) for one in alone]))
    assert torch.allclose(together.hues, torch.cat([one.hues for one in alone]), atol=1e-4)
    assert together.hues.min() >= 0 and together.hues.max() < 1
