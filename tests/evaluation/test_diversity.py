"""The mean pairwise distance against a loop over pairs."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from customized_grpo.evaluation.diversity import diversity


def features(prompts: int, count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(prompts, count, width, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_mean_over_pairs_of_images() -> None:
    given_features = features(3, 4, 5, 0)
    for row, found in zip(given_features.double().numpy(), diversity(given_features), strict=True):
        distances = [
            1 - float(one @ other) / (np.linalg.norm(one) * np.linalg.norm(other))
            for one, other in combinations(row, 2)
        ]
        assert float(found) == pytest.approx(np.mean(distances), abs=1e-12)


def test_opposite_images_are_2_apart_and_orthogonal_ones_1() -> None:
    one, other = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.1])
    assert diversity(torch.stack([torch.stack([one, -one]), torch.stack([one, other])])).tolist() == [2.0, 1.0]


@given(count=st.integers(2, 6), width=st.integers(1, 8), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_equal_images_have_none_and_any_others_lie_between_0_and_2(
    count: int, width: int, seed: int, scale: float
) -> None:
    alike = features(2, 1, width, seed).expand(2, count, width) * torch.linspace(1, scale, count)[:, None]
    assert diversity(alike).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    found = diversity(features(4, count, width, seed))
    assert bool(((found >= 0) & (found <= 2)).all())
    shuffled = features(4, count, width, seed).flip(1) * scale
    assert torch.allclose(diversity(shuffled), found, atol=1e-6)


def test_one_image_of_a_prompt_has_no_diversity() -> None:
    with pytest.raises(ValueError, match=r"K >= 2.*\[3, 1, 4\]"):
        diversity(torch.ones(3, 1, 4))


def test_features_that_are_not_finite_give_no_number() -> None:
    broken = features(2, 3, 4, 0)
    broken[1, 0, 0] = torch.nan
    assert diversity(broken).isnan().tolist() == [False, True]
