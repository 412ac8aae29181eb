"""Groups are split into requests within a server's limits."""

from hypothesis import given, settings
from hypothesis import strategies as st

from customized_grpo.rewards.splitting import UNLIMITED, RequestSize, split

SMALL = st.integers(1, 9)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[RequestSize], list[list[RequestSize]]]:
    groups, group_size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    shared = [RequestSize(0, draw(SMALL), draw(SMALL)) for _ in range(groups)]
    return shared, [[RequestSize(1, 4, draw(SMALL)) for _ in range(group_size)] for _ in range(groups)]


@settings(deadline=None)
@given(batch=batches(), images=SMALL, pixels=st.integers(4, 80), size=st.integers(2, 80))
def test_parts_are_all_images_in_order_within_the_limit(
    batch: tuple[list[RequestSize], list[list[RequestSize]]], images: int, pixels: int, size: int
) -> None:
    shared, sizes = batch
    limit = RequestSize(images, pixels, size)
    parts = list(split(shared, sizes, limit))
    places = [(p, g) for rows, columns in parts for p in rows for g in columns]
    assert places == [(p, g) for p in range(len(sizes)) for g in range(len(sizes[0]))]
    for rows, columns in parts:
        held = sum((sum((sizes[p][g] for g in columns), shared[p]) for p in rows), RequestSize())
        assert held.fits(limit) or (len(rows), len(columns)) == (1, 1)
        whole = sum(sizes[rows[0]], shared[rows[0]])
        assert len(columns) == len(sizes[0]) or not whole.fits(limit), "a group that fits stays whole"


def test_a_part_is_as_large_as_it_can_be() -> None:
    shared, sizes = [RequestSize(0, 1, 1)] * 5, [[RequestSize(1, 1, 1)] * 3] * 5
    cut = {
        "images": RequestSize(7, UNLIMITED, UNLIMITED),
        "pixels": RequestSize(99, 8, UNLIMITED),
        "bytes": RequestSize(99, UNLIMITED, 11),
    }
    for limit in cut.values():
        assert [len(rows) for rows, _ in split(shared, sizes, limit)] == [2, 2, 1]
    assert [len(columns) for _, columns in split(shared, sizes, RequestSize(99, 3, 99))] == [2, 1] * 5
    assert len(list(split(shared, sizes, RequestSize(99, UNLIMITED, UNLIMITED)))) == 1
