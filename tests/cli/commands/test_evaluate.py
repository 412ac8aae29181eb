"""`evaluate`: a run, or a benchmark; not both."""

import re
from collections.abc import Callable

import pytest

Refused = Callable[..., str]


@pytest.mark.parametrize("pairs", ["0", "-1", "some"])
def test_the_number_of_pairs_is_at_least_one(refused: Refused, pairs: str) -> None:
    assert re.search(rf"num_samples.* '?{pairs}", refused("evaluate", "--run", "nowhere", "--num_samples", pairs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "evaluate: name a run with --run DIR, or a benchmark with --benchmark dreambench"),
        (["--benchmark", "dreambench"], "data: name the benchmark's folder"),
        (["--benchmark", "dreambench", "--data", "nowhere"], "data: nowhere is no folder"),
        (["--benchmark", "dreambench", "--num-samples", "3"], "--num_samples: only with --run"),
        (["--run", "somewhere", "--num-steps", "3"], "num_steps belongs to --benchmark"),
        (["--benchmark", "dream"], "benchmark: Input should be 'dreambench' or 'folder' (found 'dream')"),
        (["--benchmark", "dreambench", "--guidance-scale", "x"], "guidance_scale: Input should be a valid number"),
        (["--benchmark", "dreambench", "--numsteps", "3"], "Did you mean 'num_steps'?"),
        (
            ["--benchmark", "dreambench", "--hpsv3-as-published", "--metrics.names", "[dino]"],
            "metrics.names has no hpsv3",
        ),
    ],
)
def test_bad_input_of_benchmarks(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused("evaluate", *arguments)
