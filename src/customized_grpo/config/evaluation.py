"""What is evaluated, and when."""

from typing import Literal

from pydantic import Field

from customized_grpo.config.section import Section


class EvaluationConfig(Section):
    """Validation during training and the evaluation at its end; both sample the deterministic ODE."""

    every: int = Field(10, ge=1)
    """Iterations between validations."""
    num_samples: int = Field(96, ge=1)
    """Validation pairs, the first of the folder."""
    num_test_samples: int = Field(384, ge=2)
    """Pairs of the before-and-after evaluation, the first of the folder."""
    gallery: int = Field(8, ge=1)
    """Pairs shown in a gallery."""
    judge: Literal["toybox", "none"] = "toybox"
    """Who says whether the prompt is satisfied and identity kept: the ToyBox judge, or nobody. Only for toybox."""
