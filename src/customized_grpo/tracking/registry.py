"""The trackers that a configuration names."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from customized_grpo.config.training import LogConfig
from customized_grpo.tracking.trackers import JsonlTracker, TensorBoardTracker, Tracker, load_summary_writer

OpenTracker = Callable[[Path, int], Tracker]
"""Open a tracker in the folder of a run, given the first step that it will record."""


def load_trackers(config: LogConfig) -> list[OpenTracker]:
    """Import what the trackers need, and return the functions that open them. Nothing is written yet.

    Raises `UserError` where a library is missing.
    """
    trackers: list[OpenTracker] = [lambda folder, first_step: JsonlTracker(folder)]
    if config.tensorboard:
        trackers.append(partial(TensorBoardTracker, load_summary_writer()))
    return trackers
