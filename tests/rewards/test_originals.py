"""What rewards are told of references: the pictures as the files have them, not as the generator sees them."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from customized_grpo.config.run import Config
from customized_grpo.data import Sample, SubjectDataset, load_image, load_mask, write_metadata
from customized_grpo.data.images import resize
from customized_grpo.evaluation.evaluator import Evaluator, Sampling
from customized_grpo.evaluation.metrics import ScoreMetric
from customized_grpo.rewards.preprocessing import DINO_PUBLISHED
from customized_grpo.rewards.remote import REFERENCE_SIDE, encoded
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.rewards.similarity import IdentitySimilarity, PictureEncoder
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.toybox.rewards import IdentityReward
from customized_grpo.training.trainer import Trainer
from customized_grpo.types import PromptBatch, References

CPU = torch.device("cpu")
PROMPTS = ("a star", "a cloud", "a heart", "a ball")


class Told(Reward):
    """A reward that keeps the pictures it was told of, and scores the red in an image."""

    def __init__(self) -> None:
        self.references: list[list[Tensor]] = []
        self.masks: list[list[Tensor]] = []

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        self.references = [list(row) for row in batch.references]
        self.masks = [list(row) for row in batch.masks or ()]
        values = images[:, :, 0].mean((-2, -1))
        return Scores(values, values.isfinite())


class Watched:
    """A policy, and the references that it was given to encode."""

    def __init__(self, policy: ToyBoxPolicy) -> None:
        self.encoded: References = ()
        self.policy = policy
        self._encode = policy.encode
        policy.encode = self.encode  # type: ignore[method-assign]

    def encode(self, prompts: Any, references: References) -> Any:
        self.encoded = references
        return self._encode(prompts, references)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Four samples of two references of 60 x 48 pixels, larger than ToyBox sees, each with a mask."""
    folder, draw = tmp_path / "photographs", np.random.default_rng(0)
    folder.mkdir()
    for name in "ab":
        Image.fromarray(draw.integers(0, 256, (60, 48, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        Image.fromarray(np.where(draw.random((60, 48)) < 0.5, 255, 0).astype(np.uint8)).save(folder / f"{name}_m.png")
    samples = [
        Sample(str(row), prompt, (Path(f"{name}.png"),), (Path(f"{name}_m.png"),))
        for row, (prompt, name) in enumerate(zip(PROMPTS, "abab", strict=True))
    ]
    write_metadata(folder, samples)
    return folder


def test_training_scores_against_the_originals_and_draws_from_the_prepared(
    photographs: Path, make_config: Callable[..., Config], make_policy: Callable[..., ToyBoxPolicy]
) -> None:
    config = make_config({"data.path": photographs, "rewards.identity.toybox_identity.reference": "segmented"})
    watched, told = Watched(make_policy()), Told()
    dataset = SubjectDataset.open(photographs)
    trainer = Trainer(config, watched.policy, {"prompt": told, "identity": told}, dataset)
    trainer.train_step()
    samples = trainer.samples(0)
    for row, sample in enumerate(samples):
        assert torch.equal(told.references[row][0], load_image(sample.references[0]))
        assert torch.equal(told.masks[row][0], load_mask(sample.masks[0]))
        assert watched.encoded[row][0].shape == (3, 32, 32)


def test_evaluation_scores_against_the_originals_and_draws_from_the_prepared(
    photographs: Path, make_policy: Callable[..., ToyBoxPolicy]
) -> None:
    watched, told = Watched(make_policy()), Told()
    dataset = SubjectDataset.open(photographs)
    sampling = Sampling(num_steps=2, shift=2.0, seed=0, micro_batch=4)
    metrics = [ScoreMetric.of_rewards({"prompt": told, "identity": told})]
    evaluation = Evaluator(watched.policy, dataset, metrics, sampling, masks=True).evaluate(3)
    for row, sample in enumerate(evaluation.samples):
        original = load_image(sample.references[0])
        assert torch.equal(told.references[row][0], original)
        assert torch.equal(evaluation.references[row][0], original)
        assert told.masks[row][0].shape == (1, 60, 48)
        assert watched.encoded[row][0].shape == (3, 32, 32)


def dino_like() -> IdentitySimilarity:
    """An identity reward whose features are the mean pixels of 8 x 8 patches, of pictures prepared as for DINO."""
    pool = torch.nn.AvgPool2d(28)
    return IdentitySimilarity(
        PictureEncoder(lambda pixels: pool(pixels).flatten(1), DINO_PUBLISHED, CPU, 8),
        segmented=False, background=1.0, several="mean",
    )  # fmt: skip


def test_identity_is_to_the_file_whatever_the_generator_sees(photographs: Path) -> None:
    dataset = SubjectDataset.open(photographs)
    images = torch.rand(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = dino_like().score(images, PromptBatch.of(dataset, list(dataset), masks=False)).values
    files = [[load_image(path) for path in sample.references] for sample in dataset]
    assert torch.equal(found, dino_like().score(images, PromptBatch(PROMPTS, files, None)).values)
    small = [[resize(each, (32, 32)) for each in row] for row in files]
    assert not torch.allclose(found, dino_like().score(images, PromptBatch(PROMPTS, small, None)).values, atol=1e-4)


def test_the_file_of_a_reference_is_read_once(photographs: Path) -> None:
    dataset = SubjectDataset.open(photographs)
    reward, batch = dino_like(), PromptBatch.of(dataset, list(dataset), masks=False)
    images = torch.rand(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first = reward.score(images, batch).values
    for name in "ab":
        (photographs / f"{name}.png").unlink()
    assert torch.equal(reward.score(images, batch).values, first)


def test_toybox_sees_a_photograph_in_its_own_size(photographs: Path, tiny_weights: Path) -> None:
    dataset = SubjectDataset.open(photographs)
    batch = PromptBatch.of(dataset, list(dataset), masks=True)
    images = torch.rand(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prepare = ToyBoxPolicy.load(tiny_weights, precision="fp32", lora_rank=4).prepare_reference
    masks = dataset.masks(list(dataset))
    assert masks is not None
    squares = PromptBatch(PROMPTS, dataset.references(list(dataset), prepare), [[prepare(row[0], 1)] for row in masks])
    for reference in ("whole", "segmented"):
        reward = IdentityReward(reference, tiny_weights)  # type: ignore[arg-type]
        assert torch.equal(reward.score(images, batch).values, reward.score(images, squares).values)


@pytest.mark.parametrize(
    ("height", "width", "sent"),
    [(600, 1024, (600, 1024)), (1500, 2048, (750, 1024)), (3000, 10, (1024, 3))],
)
def test_a_reference_is_sent_whole_up_to_a_size(height: int, width: int, sent: tuple[int, int]) -> None:
    text = encoded(torch.full((3, height, width), 0.5), REFERENCE_SIDE)
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        assert (picture.height, picture.width) == sent
