"""Objectives by the names that configurations have for them; see `objective.Objective` for what one must do."""

from collections.abc import Callable

from customized_grpo.config.run import Config
from customized_grpo.training.objectives.grpo import Grpo
from customized_grpo.training.objectives.objective import Objective

OBJECTIVES: dict[str, Callable[[Config], Objective]] = {"grpo": Grpo}
"""An objective is a file in this folder, and a line here."""


def build_objective(config: Config) -> Objective:
    """Return the objective that `config.objective.kind` names."""
    return OBJECTIVES[config.objective.kind](config)
