"""The two premises of the method, measured for a policy, its rewards and its data.

`gradients`: do the rewards' own objectives pull the weights in opposite directions? `sensitivity`: at which denoising
steps is each reward decided, and which time weights follow from that? `command` writes both down, `figure` draws them.
"""

from customized_grpo.diagnosis.gradients import GradientConflict, measure_conflict
from customized_grpo.diagnosis.sensitivity import Sensitivity, calibrated_weights, measure

__all__ = ["GradientConflict", "Sensitivity", "calibrated_weights", "measure", "measure_conflict"]
