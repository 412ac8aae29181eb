"""What is evaluated, and when."""

from typing import Literal

from pydantic import Field

from customized_grpo.config.section import Section


class EvaluationConfig(Section):
    """Validation during training and the evaluation at its end; both sample the deterministic ODE."""

    every: int = Field(10, ge=1)
    """Iterations between validations."""
    num_samples: int = Field(96, ge=1)
    """Samples to validate on, from the first of the folder."""
    num_test_samples: int = Field(384, ge=2)
    """Samples of the before-and-after evaluation, from the first of the folder."""
    gallery: int = Field(8, ge=1)
    """Samples shown in a gallery."""
    judge: Literal["toybox", "none"] = "toybox"
    """Measure whether prompt and identity hold with the ToyBox judge (for policy.kind=toybox only), or not at all."""
