import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from customized_grpo.randomness import batched_normal, generator, stream_seed

SHAPE = (2, 3, 4, 4)


def test_a_stream_is_pinned() -> None:
    assert stream_seed(0, 1, 2, 3, "noise") == 900123136752819541
    assert stream_seed(7) == 17581516472971349354
    assert torch.randperm(8, generator=generator(0, 5, "sample order")).tolist() == [6, 0, 7, 4, 2, 3, 5, 1]
    noise = batched_normal(0, 1, [2], [3], "noise", (16,))
    torch.testing.assert_close(noise[0, :4], torch.tensor([0.440517, 0.063423, -1.959716, 0.107209]), rtol=0, atol=1e-5)


def test_rows_do_not_depend_on_batching_or_order() -> None:
    prompts, samples = [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]
    whole = batched_normal(3, 4, prompts, samples, "noise", SHAPE)
    halves = [batched_normal(3, 4, prompts[s], samples[s], "noise", SHAPE) for s in (slice(0, 3), slice(3, 6))]
    assert torch.equal(whole, torch.cat(halves))
    backwards = batched_normal(3, 4, prompts[::-1], samples[::-1], "noise", SHAPE)
    assert torch.equal(whole, backwards.flip(0))
    for row, prompt, sample in zip(whole, prompts, samples, strict=True):
        alone = torch.randn(SHAPE, generator=generator(3, 4, prompt, sample, "noise"))
        assert torch.equal(row, alone)


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batched_normal(0, 0, [0, 1], [0, 1], "noise", SHAPE)
    assert torch.equal(before, torch.get_rng_state())


def test_the_global_generator_does_not_matter() -> None:
    torch.manual_seed(1)
    first = batched_normal(0, 0, [0], [0], "noise", SHAPE)
    torch.manual_seed(2)
    assert torch.equal(first, batched_normal(0, 0, [0], [0], "noise", SHAPE))


@pytest.mark.parametrize(
    "other",
    [
        (9, 1, 2, 3, "noise"),
        (0, 9, 2, 3, "noise"),
        (0, 1, 9, 3, "noise"),
        (0, 1, 2, 9, "noise"),
        (0, 1, 2, 3, "x"),
    ],
)
def test_every_part_of_the_name_matters(other: tuple[int, int, int, int, str]) -> None:
    def draw(seed: int, iteration: int, prompt: int, sample: int, purpose: str) -> Tensor:
        return batched_normal(seed, iteration, [prompt], [sample], purpose, SHAPE)

    assert not torch.isclose(draw(0, 1, 2, 3, "noise"), draw(*other), atol=1e-6).any()


def test_swapped_indices_are_another_stream() -> None:
    noise = batched_normal(0, 1, [2, 3], [3, 2], "noise", SHAPE)
    assert not torch.equal(noise[0], noise[1])
    assert stream_seed(1, 2) != stream_seed(2, 1)


def test_ten_thousand_names_have_distinct_seeds() -> None:
    seeds = {stream_seed(0, i, p, s, "noise") for i in range(100) for p in range(10) for s in range(10)}
    assert len(seeds) == 10_000


keys = st.lists(st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=6)), max_size=4)


@given(keys, keys)
def test_names_that_differ_have_seeds_that_differ(first: list[int | str], second: list[int | str]) -> None:
    assert (stream_seed(0, *first) == stream_seed(0, *second)) == (first == second)


def test_names_that_read_alike_are_told_apart() -> None:
    lookalikes = [
        (1, 23),
        (12, 3),
        (123,),
        ("1", 23),
        ("i1;",),
        ("a", "b"),
        ("ab",),
        ("ab", ""),
        ("", "ab"),
        (-1,),
        (1,),
    ]
    assert len({stream_seed(0, *key) for key in lookalikes}) == len(lookalikes)


def test_any_integer_type_is_the_same_key() -> None:
    assert stream_seed(0, np.int64(5)) == stream_seed(0, torch.tensor(5)) == stream_seed(0, 5)


@pytest.mark.parametrize("key", [1.0, True, None, (1,)])
def test_other_keys_are_refused(key: object) -> None:
    with pytest.raises(TypeError):
        stream_seed(0, key)  # type: ignore[arg-type]


def test_noise_is_standard_normal_across_rows() -> None:
    count = 20_000
    noise = batched_normal(0, 0, range(count), [0] * count, "noise", (4,))
    assert noise.dtype == torch.float32
    assert noise.device.type == "cpu"
    standard_error = 1 / math.sqrt(noise.numel())
    assert abs(float(noise.mean())) < 5 * standard_error
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2) * standard_error
    neighbours = torch.corrcoef(noise.T)
    assert (neighbours - torch.eye(4)).abs().max() < 5 / math.sqrt(count)


def test_equal_indices_share_their_noise() -> None:
    noise = batched_normal(0, 0, [1, 1], [0, 0], "initial", SHAPE)
    assert torch.equal(noise[0], noise[1])


def test_no_rows() -> None:
    assert batched_normal(0, 0, [], [], "noise", SHAPE).shape == (0, *SHAPE)


def test_indices_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompt indices but 1 sample"):
        batched_normal(0, 0, [0, 1], [0], "noise", SHAPE)
