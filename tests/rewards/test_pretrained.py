"""Pretrained rewards, on tiny random models of the true classes: equal to transformers' own processors and models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from named_rewards import load_named
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from customized_grpo.data.images import to_pil
from customized_grpo.errors import UserError
from customized_grpo.rewards.preprocessing import DINO_PUBLISHED, Preprocessing, composited
from customized_grpo.testing.tiny_rewards import IMAGENET, KINDS, save_tiny_reward
from customized_grpo.types import PromptBatch

CPU = torch.device("cpu")
PROMPTS = ["a cat on the beach", "a small dog in the deep snow"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rewards")
    return {kind: save_tiny_reward(kind, root / kind) for kind in KINDS}


def smooth(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Pictures [count, 3, height, width] without hard edges, on 8-bit levels."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=draw)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (images * 255).round() / 255


def noise(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Pictures [count, 3, height, width] of hard edges, on 8-bit levels: noise beside black and white."""
    draw = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (count, 3, height, width), generator=draw)
    levels[..., : width // 2] = levels[..., : width // 2] // 128 * 255
    return levels / 255


def make_batch(references: list[list[Tensor]], masks: list[list[Tensor]] | None = None) -> PromptBatch:
    return PromptBatch(PROMPTS, references, masks)


FOLDERS = {"clip_t": "clip", "clip_i": "clip", "pickscore": "clip"}
"""Tiny models by reward, where their names differ."""


def rewards(
    models: dict[str, Path],
    prompt: str = "clip_t",
    identity: str = "dino",
    part: dict[str, Any] | None = None,
    **more: Any,
) -> Any:
    """The rewards of these kinds; `part` holds further settings of the identity reward's section."""
    kind = "dino" if identity in ("vit", "dinov3") else identity
    settings = {
        "prompt": prompt, prompt: {"model": str(models[FOLDERS.get(prompt, prompt)])}, "identity": kind,
        kind: {"model": str(models[FOLDERS.get(identity, identity)])} | (part or {}), **more,
    }  # fmt: skip
    return tuple(load_named(settings).values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dinov3"])
@pytest.mark.parametrize(("height", "width"), [(300, 300), (200, 320), (512, 384), (140, 180)])
def test_pictures_are_prepared_as_by_the_checkpoints_processor(
    kind: str, height: int, width: int, models: dict[str, Path]
) -> None:
    processor = AutoImageProcessor.from_pretrained(models[kind])
    images = noise(2, height, width)
    expected = processor([to_pil(image) for image in images], return_tensors="pt")["pixel_values"]
    found = Preprocessing.of(processor.to_dict(), kind)(images)
    assert found.shape == expected.shape
    # In units of 8-bit levels: the levels are the same, normalising rounds otherwise.
    levels = (found - expected).abs() * torch.tensor(processor.image_std).view(3, 1, 1) * 255
    assert levels.max() < 1e-3


def test_torchvision_rounds_the_half_of_an_odd_crop_to_even() -> None:
    """227 columns are cut to 224 from the second on where transformers begins at the first: round(1.5) is 2."""
    columns = torch.arange(227.0).expand(1, 3, 224, 227) / 255
    settings = {
        "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.0] * 3, "image_std": [1.0] * 3,
    }  # fmt: skip
    down = Preprocessing.of(settings, "here")
    first = {each.half: float(each(columns)[0, 0, 0, 0] * 255) for each in (down, replace(down, half="even"))}
    assert first == {"down": pytest.approx(1.0), "even": pytest.approx(2.0)}
    assert DINO_PUBLISHED.half == "even"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resample": 4}, r"cannot resize by resample=4; expected 0 \(nearest\), 1 \(lanczos\), 2 \(bilinear\), 3 \("),
        ({"size": {"longest_edge": 224}}, "cannot resize to {'longest_edge': 224}; expected shortest_edge"),
    ],
)
def test_a_processor_of_another_kind_is_an_error(changes: dict[str, Any], words: str, models: dict[str, Path]) -> None:
    settings = AutoImageProcessor.from_pretrained(models["clip"]).to_dict() | changes
    with pytest.raises(UserError, match=f"rewards.identity.dino.model: here: the image processor {words}"):
        Preprocessing.of(settings, "rewards.identity.dino.model: here")


@pytest.mark.parametrize("identity", ["dino", "vit", "clip_i"])
def test_identity_is_the_cosine_of_the_models_features(identity: str, models: dict[str, Path]) -> None:
    _, reward = rewards(models, identity=identity)
    images, references = smooth(4, 96, 96).unflatten(0, (2, 2)), list(smooth(2, 96, 96, seed=1))
    scores = reward.score(images, make_batch([[reference] for reference in references]))
    model = AutoModel.from_pretrained(models[FOLDERS.get(identity, identity)]).eval()
    processor = AutoImageProcessor.from_pretrained(models[FOLDERS.get(identity, identity)])

    def features(image: Tensor) -> Tensor:
        pixels = processor(to_pil(image), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            if identity == "clip_i":
                return model.visual_projection(model.vision_model(pixels).pooler_output)[0]
            return model(pixels).last_hidden_state[0, 0]

    for p, group in enumerate(images):
        for g, image in enumerate(group):
            expected = torch.cosine_similarity(features(image), features(references[p]), dim=0)
            assert float(scores.values[p, g]) == pytest.approx(float(expected), abs=2e-3)
    assert scores.valid.all() and scores.values.std() > 1e-4


@pytest.mark.parametrize("prompt", ["clip_t", "siglip", "pickscore"])
def test_prompt_is_the_cosine_of_the_models_features(prompt: str, models: dict[str, Path]) -> None:
    reward, _ = rewards(models, prompt=prompt)
    images = smooth(4, 64, 64).unflatten(0, (2, 2))
    scores = reward.score(images, make_batch([[image[0]] for image in images]))
    folder = models[FOLDERS.get(prompt, prompt)]
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)([to_pil(i) for i in images.flatten(0, 1)], return_tensors="pt")
    with torch.no_grad():
        for p, text in enumerate(PROMPTS):
            padding: Any = "max_length" if prompt == "siglip" else False
            tokens = tokenizer(text, return_tensors="pt", padding=padding)
            output = model(input_ids=tokens["input_ids"], pixel_values=pixels["pixel_values"])
            expected = torch.cosine_similarity(output.text_embeds, output.image_embeds, dim=1)[2 * p : 2 * p + 2]
            assert torch.allclose(scores.values[p], expected, atol=1e-2)


def test_dinov3_needs_no_torchvision(models: dict[str, Path]) -> None:
    """Its processor's steps are read from its file: a resize to 64 x 64, bilinear, and ImageNet's statistics."""
    _, reward = rewards(models, identity="dinov3")
    images, reference = smooth(2, 96, 96).unflatten(0, (1, 2)), smooth(1, 96, 96, seed=1)[0]
    scores = reward.score(images, PromptBatch(PROMPTS[:1], [[reference]], None))
    model = AutoModel.from_pretrained(models["dinov3"]).eval()

    def feature(image: Tensor) -> Tensor:
        small = torch.nn.functional.interpolate(image[None], (64, 64), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(IMAGENET[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        with torch.no_grad():
            return model((small - mean) / std).last_hidden_state[0, 0]

    expected = [torch.cosine_similarity(feature(image), feature(reference), dim=0) for image in images[0]]
    assert torch.allclose(scores.values[0], torch.stack(expected), atol=2e-3)


def test_micro_batches_change_nothing(models: dict[str, Path]) -> None:
    images, given = smooth(6, 64, 64).unflatten(0, (2, 3)), make_batch([[smooth(1, 64, 64, 5)[0]]] * 2)
    scores = [
        [r.score(images, given).values for r in rewards(models, local={"micro_batch": size})] for size in (1, 4, 64)
    ]
    for other in scores[1:]:
        assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(scores[0], other, strict=True))


@pytest.mark.parametrize(("several", "join"), [("mean", torch.mean), ("max", torch.amax)])
def test_several_references(several: str, join: Any, models: dict[str, Path]) -> None:
    _, reward = rewards(models, part={"several_references": several})
    images = smooth(4, 64, 64).unflatten(0, (2, 2))
    one, other = smooth(2, 64, 80, seed=3)
    apart = [reward.score(images, make_batch([[reference]] * 2)).values for reference in (one, other)]
    both = reward.score(images, make_batch([[one, other]] * 2)).values
    assert torch.allclose(both, join(torch.stack(apart), 0), atol=1e-6)


def test_a_segmented_reference_is_seen_without_its_background(models: dict[str, Path]) -> None:
    _, segmented = rewards(models, part={"reference": "segmented", "background": 0.25})
    _, whole = rewards(models)
    images = smooth(4, 64, 64).unflatten(0, (2, 2))
    reference, mask = smooth(1, 64, 64, 7)[0], torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    cut = composited(reference, mask, 0.25)
    assert (cut[:, 0, 0] == 0.25).all() and torch.equal(cut[:, 20, 20], reference[:, 20, 20])
    found = segmented.score(images, make_batch([[reference]] * 2, [[mask]] * 2)).values
    assert torch.allclose(found, whole.score(images, make_batch([[cut]] * 2)).values, atol=1e-6)
    elsewhere = torch.where(mask > 0, reference, 1 - reference)
    assert torch.allclose(found, segmented.score(images, make_batch([[elsewhere]] * 2, [[mask]] * 2)).values, atol=1e-6)


def test_a_reference_is_encoded_once(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, reward = rewards(models)
    seen: list[int] = []
    encode = reward._encoder._encode

    def counted(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(reward._encoder, "_encode", counted)
    images, given = smooth(4, 64, 64).unflatten(0, (2, 2)), make_batch([[smooth(1, 64, 64, 9)[0]]] * 2)
    for _ in range(3):
        reward.score(images.clone(), given)
    assert seen == [4, 1, 4, 4]
    same = images.clone()
    for _ in range(3):
        reward.score(same, given)
    assert seen == [4, 1, 4, 4, 4], "nor are the very same images"


def test_what_is_not_finite_is_not_valid(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, identity = rewards(models)
    images = smooth(4, 64, 64).unflatten(0, (2, 2))
    given = make_batch([[image[0]] for image in images])
    for reward in (prompt, identity):
        encode = reward._encoder._encode

        def broken(pixels: Tensor, encode: Any = encode) -> Tensor:
            features = encode(pixels)
            features[0] = torch.nan
            return features if len(features) > 1 else encode(pixels)

        monkeypatch.setattr(reward._encoder, "_encode", broken)
        scores = reward.score(images, given)
        assert scores.valid.tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"dino": {"model": "nobody/nothing"}},
            r"rewards\.identity\.dino\.model: nobody/nothing could not be loaded \(",
        ),
        ({"clip_t": {"model": "/nowhere"}}, r"rewards\.prompt\.clip_t\.model: /nowhere could not be loaded \("),
    ],
)
def test_a_model_that_cannot_be_had(settings: dict[str, Any], said: str, models: dict[str, Path]) -> None:
    usual: dict[str, Any] = {"prompt": "clip_t", "clip_t": {"model": str(models["clip"])}, "identity": "dino"}
    usual["dino"] = {"model": str(models["dino"])}
    with pytest.raises(UserError, match=said):
        load_named(usual | settings)


def test_a_model_of_another_type(models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"rewards\.identity\.dino\.model: .* is of type siglip, but dino reads dinov2"):
        rewards(models, part={"model": str(models["siglip"])})
