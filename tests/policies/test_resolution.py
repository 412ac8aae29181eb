"""Sizes of references, held against exact arithmetic for every size that a photograph may have."""

from collections.abc import Callable

import pytest

from customized_grpo.policies.pipelines.flux1_kontext import Flux1Kontext
from customized_grpo.policies.pipelines.flux2 import reference_size
from customized_grpo.policies.pipelines.resolution import TOKEN, to_area, to_longer_side
from customized_grpo.policies.pipelines.uno import Uno


@pytest.mark.parametrize("side", [320, 512])
def test_the_shorter_side_loses_no_row_of_tokens(side: int) -> None:
    """Every size from 300 x 300 to 1000 x 1000. A float's product `side / longer * shorter` falls below a whole number
    of tokens for some of them, and UNO's own size then lacks a row: by this count 138 of 491,401 at 512 pixels."""
    fewer = 0
    for longer in range(300, 1001):
        for shorter in range(300, longer + 1):
            exact = side * shorter // longer // TOKEN * TOKEN
            assert to_longer_side(longer, shorter, side) == (side, exact)
            assert to_longer_side(shorter, longer, side) == ((exact, side) if shorter < longer else (side, exact))
            fewer += (1 + (shorter < longer)) * (int(side / longer * shorter) // TOKEN * TOKEN < exact)
    assert fewer == {320: 72, 512: 138}[side]


def _nearest(length: int, other: int, area: int, multiple: int) -> Callable[[int], bool]:
    """Whether a count of multiples is nearest to sqrt(area * length / other), in integers."""
    square, unit = 4 * area * length, other * multiple**2

    def nearest(count: int) -> bool:
        below, above = (2 * count - 1) ** 2 * unit, (2 * count + 1) ** 2 * unit
        inside = below < square < above or (count % 2 == 0 and square in (below, above))
        return inside or (count == 1 and square <= above)

    return nearest


@pytest.mark.parametrize(("side", "multiple"), [(1024, 16), (1024, 32), (512, 16)])
def test_an_area_is_rounded_to_the_nearest_tokens(side: int, multiple: int) -> None:
    for height in range(1, 1200, 11):
        for width in range(1, 1200, 7):
            found = to_area(height, width, side**2, multiple)
            assert all(length % multiple == 0 for length in found)
            assert _nearest(height, width, side**2, multiple)(found[0] // multiple), (height, width)
            assert _nearest(width, height, side**2, multiple)(found[1] // multiple), (height, width)


def test_a_side_exactly_between_two_counts_takes_the_even_one() -> None:
    found = {side: reference_size(side, side, None) for side in range(8, 200, 16)}
    assert found[24] == (32, 32) and found[40] == (32, 32) and found[56] == (64, 64)
    assert found == {side: (max(1, round(side / 16)) * 16,) * 2 for side in found}


@pytest.mark.parametrize("family", [Flux1Kontext(), Uno()])
def test_a_reference_of_any_shape_has_whole_tokens(family: Flux1Kontext | Uno) -> None:
    for height, width in ((1, 5000), (5000, 1), (333, 1000), (1023, 1025)):
        assert all(length >= 16 and length % 16 == 0 for length in family.reference_size(height, width, 1, None))
