import pytest
import torch
from torch import Tensor

from customized_grpo.toybox.copying import closeness
from customized_grpo.toybox.judge import Judge
from customized_grpo.toybox.pairs import Pairs, draw_pairs
from customized_grpo.toybox.pretraining import crop_and_jitter

COUNT = 300


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return draw_pairs(COUNT, "test", torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def scores(judge: Judge, pairs: Pairs, images: Tensor) -> Tensor:
    return judge.judge(images, pairs.captions, pairs.references).copy_score


def auc(high: Tensor, low: Tensor) -> float:
    return float((high[:, None] > low).float().mean())


def test_an_exact_copy_scores_one(judge: Judge, pairs: Pairs) -> None:
    assert torch.allclose(scores(judge, pairs, pairs.references), torch.ones(COUNT), atol=1e-5)


def test_correct_pictures_score_zero_on_average_and_are_not_called_copies(judge: Judge, pairs: Pairs) -> None:
    correct = scores(judge, pairs, pairs.targets)
    assert abs(float(correct.mean())) < 0.05
    assert not judge.judge(pairs.targets, pairs.captions, pairs.references).copied.any()


@pytest.mark.parametrize("kind", ["exact", "jittered"])
def test_the_meter_tells_copies_from_correct_pictures(judge: Judge, pairs: Pairs, kind: str) -> None:
    jittered = crop_and_jitter(pairs.references, torch.Generator().manual_seed(4))
    copies = {"exact": pairs.references, "jittered": jittered}[kind]
    assert auc(scores(judge, pairs, copies), scores(judge, pairs, pairs.targets)) >= 0.95


def test_a_score_does_not_depend_on_the_rest_of_the_batch(judge: Judge, pairs: Pairs) -> None:
    alone = judge.judge(pairs.targets[7:8], pairs.captions[7:8], pairs.references[7:8]).copy_score
    assert torch.allclose(alone, scores(judge, pairs, pairs.targets)[7:8], atol=1e-5)


def test_what_a_prompt_leaves_free_is_averaged_over(judge: Judge, pairs: Pairs) -> None:
    """A prompt without a scene: correct pictures are of several scenes, so none of them is expected to be close."""
    free = judge.judge(pairs.references[:4], ["a star"] * 4, pairs.references[:4])
    assert free.copied.all()


def test_closeness_is_the_correlation_of_8_by_8_means() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 5, 3, 32, 32, generator=draw).double()
    cells = [x.reshape(5, 3, 8, 4, 8, 4).mean((3, 5)).flatten(1) for x in (first, second)]
    expected = torch.stack([torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(*cells, strict=True)])
    assert torch.allclose(closeness(first, second), expected)
    assert torch.allclose(closeness(first, 0.5 * first + 0.1), torch.ones(5).double()), "brightness and contrast"
