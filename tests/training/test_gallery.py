"""The gallery of a validation."""

import torch

from customized_grpo.evaluation.evaluator import Evaluation
from customized_grpo.training.gallery import PADDING, draw_gallery


def test_rows_are_references_base_and_tuned() -> None:
    base, tuned = torch.full((5, 3, 64, 64), 0.25), torch.full((5, 3, 64, 64), 0.75)
    references = [[torch.zeros(3, 64, 64)] for _ in range(5)]
    evaluation = Evaluation([], references, tuned, {}, ())
    grid = draw_gallery(evaluation, base, 2, (64, 64))
    side = 2 * 64 + PADDING
    assert grid.shape == (3, 3 * side + PADDING, 2 * side + PADDING)
    assert [grid[0, PADDING + row * side, PADDING].item() for row in range(3)] == [0.0, 0.25, 0.75]
    assert grid[0, 0, 0] == 1
