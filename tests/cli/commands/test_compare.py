"""`compare`: bad settings and presets are named."""

from collections.abc import Callable

import pytest

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--presets", "{naive: 3}"], "unknown preset 'naive'; choose among base, naive-1:1, naive-1:1.5"),
        (["compare", "--presets", "{sars: 1}"], "an interval over seeds takes at least 2"),
        (["compare", "--presets", "{sars: 2}"], "name its folder in train.data.test"),
        (["compare", "--jbos", "2"], "unknown option or configuration field 'jbos'. Did you mean 'jobs'?"),
        (["compare", "--train.rollout.grup_size", "4"], "Did you mean 'train.rollout.group_size'?"),
        (["compare", "--jobs", "0"], "jobs"),
        (["compare", "--train.rollout.group_size", "1"], "group_size"),
    ],
)
def test_bad_input_of_comparisons(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)
