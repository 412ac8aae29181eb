"""How good the shipped networks are, measured."""

from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.algorithm import shift_sigmas
from customized_grpo.evaluation.copy_paste import COPIED
from customized_grpo.policies.sampling import sample_ode
from customized_grpo.toybox.drawing import render
from customized_grpo.toybox.encoders import IdentityEncoder, PromptEncoder
from customized_grpo.toybox.language import caption, tokenize
from customized_grpo.toybox.oracle import HUE_TOLERANCE, Oracle
from customized_grpo.toybox.oracle_metric import FIGURES
from customized_grpo.toybox.pairs import Pairs, draw_pairs
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.toybox.recipes import crop_and_jitter
from customized_grpo.toybox.weights import IDENTITY_ENCODERS, load_network
from customized_grpo.toybox.world import hue_distance, sample_scenes

NUM_STEPS, SHIFT = 10, 2.0
MEASURED_PAIRS = 1000
VERDICTS = FIGURES[:4]


@torch.no_grad()
def measure_quality(folder: Path, pairs: int = MEASURED_PAIRS) -> dict[str, dict[str, float]]:
    """Measure the weights in `folder` on fresh pairs of the test split; shares in [0, 1].

    judge: how often it reads each attribute of a clean render right. ceiling: what it says of clean renders of the
    prompt. base: what it says of the untuned generator's pictures; chance: of those held against another pair's
    prompt and reference. identity_encoder, prompt_encoder: see `_measure_encoders`.
    """
    draw = torch.Generator().manual_seed(2026)
    test = draw_pairs(pairs, "test", draw)
    judge = Oracle(folder)
    seen = judge.read(test.targets)
    truth = {"shape": test.subjects.shape, "pattern": test.subjects.pattern}
    truth |= {name: getattr(test.target_scenes, name) for name in ("scene", "accessory", "position")}
    reading = {name: _share(seen.attributes[name] == value) for name, value in truth.items()}
    hue_error = hue_distance(seen.hues, test.subjects.hues)
    reading["both hues within tolerance"] = _share((hue_error <= HUE_TOLERANCE).all(-1))
    images = _draw(folder, test, draw)
    order = torch.arange(pairs).roll(1)
    return {
        "judge": reading,
        "ceiling": _verdict(judge, test.targets, test),
        "base": _verdict(judge, images, test),
        "chance": _verdict(judge, images[order], test),
        **_measure_encoders(folder, test, draw),
        "copy_meter": _measure_copy_meter(judge, test, draw),
    }


def _draw(folder: Path, pairs: Pairs, draw: torch.Generator) -> Tensor:
    """Draw the pairs with the base, by the deterministic ODE."""
    policy = ToyBoxPolicy.load(folder)
    noise = torch.randn(len(pairs.captions), *policy.latent_shape, generator=draw)
    condition = policy.encode(pairs.captions, [[reference] for reference in pairs.references])
    with policy.base_weights():
        return sample_ode(policy, condition, noise, shift_sigmas(NUM_STEPS, SHIFT), micro_batch=50)


def _verdict(judge: Oracle, images: Tensor, pairs: Pairs) -> dict[str, float]:
    verdict = judge.judge(images, pairs.captions, pairs.references)
    return {name: _share(getattr(verdict, name)) for name in VERDICTS}


def _measure_encoders(folder: Path, pairs: Pairs, draw: torch.Generator) -> dict[str, dict[str, float]]:
    """Measure how informative and how hackable the rewards are."""
    prompt = load_network(PromptEncoder(), "prompt_encoder", folder)
    order = torch.arange(len(pairs.captions)).roll(1)
    other_subject = render(pairs.subjects.take(order), pairs.reference_scenes)[0]
    stayed_home = sample_scenes(len(order), draw)
    stayed_home = type(stayed_home)(
        pairs.reference_scenes.scene, stayed_home.accessory, stayed_home.position, stayed_home.variation
    )
    home_picture = render(pairs.subjects, stayed_home)[0]
    image = prompt.image(pairs.targets)
    wrong = caption(pairs.subjects, sample_scenes(len(order), draw, other_than=pairs.target_scenes.scene), draw)
    right_score = (image * prompt.text(tokenize(pairs.captions))).sum(-1)
    wrong_score = (image * prompt.text(tokenize(wrong))).sum(-1)
    quality = {}
    for name in IDENTITY_ENCODERS:
        identity = load_network(IdentityEncoder(), name, folder)
        reference = identity(pairs.references)
        same, other, home, copy = (
            (reference * identity(images)).sum(-1)
            for images in (pairs.targets, other_subject, home_picture, pairs.references)
        )
        quality[name] = {
            "AUC same subject elsewhere against other subject here": _share(same[:, None] > other),
            "copy of the reference above a correct render": _share(copy > same),
            "subject left in the reference's scene above a correct render": _share(home > same),
        }
    return quality | {
        "prompt_encoder": {"right caption above a wrong one": _share(right_score > wrong_score)},
    }


def _measure_copy_meter(judge: Oracle, pairs: Pairs, draw: torch.Generator) -> dict[str, float]:
    """Measure how well the copy score separates copies of the reference from correct renders of the prompt (AUC).

    Also measure the share of pictures that it calls copies although they only stand on the reference's background.
    Jittered copies are crops of 60 to 100 % of the side, half of them mirrored, with other brightness and contrast.
    """

    def scores(images: Tensor) -> Tensor:
        return judge.judge(images, pairs.captions, pairs.references).copy_score

    correct = scores(pairs.targets)
    asked, there = pairs.target_scenes, pairs.reference_scenes
    background = type(asked)(there.scene, asked.accessory, asked.position, there.variation)
    others = pairs.subjects.take(torch.arange(len(asked)).roll(1))
    copies = {"exact": pairs.references, "jittered": crop_and_jitter(pairs.references, draw)}
    on_background = {"subject": pairs.subjects, "another subject": others}
    found = {}
    for name, images in copies.items():
        found[f"AUC {name} copies against correct renders"] = _share(scores(images)[:, None] > correct)
    for name, subjects in on_background.items():
        called = scores(render(subjects, background)[0]) > COPIED
        found[f"{name} on the reference's background, otherwise as asked, called a copy"] = _share(called)
    return found


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())
