from pathlib import Path

import torch

from customized_grpo.toybox.oracle import Oracle
from customized_grpo.toybox.oracle_metric import CHANCE_FIGURES, FIGURES, OracleMetric, first_references
from customized_grpo.types import PromptBatch


def test_the_oracle_gives_its_five_figures(tiny_weights: Path) -> None:
    metric, oracle = OracleMetric.load(tiny_weights), Oracle(tiny_weights)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    references = [[torch.rand(3, size, size), torch.rand(3, 8, 8)] for size in (32, 64, 40)]
    prompts = ["a ball on the beach", "a ghost in the snow", "a star in a forest"]
    found = metric.measure(images, PromptBatch(prompts, references, None))
    verdict = oracle.judge(images, prompts, first_references(references))
    assert list(found) == [info.name for info in metric.infos] == list(FIGURES)
    assert all(torch.equal(values, getattr(verdict, name).float()) for name, values in found.items())
    assert metric.ceiling == oracle.ceiling and set(metric.chance_names) == set(CHANCE_FIGURES) < set(FIGURES)
