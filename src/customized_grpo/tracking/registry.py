"""The trackers that a configuration names."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from customized_grpo.config.run import Config
from customized_grpo.tracking.services import Forgiving, Service, ServiceTracker, load_service
from customized_grpo.tracking.trackers import JsonlTracker, TensorBoardTracker, Tracker, load_summary_writer

OpenTracker = Callable[[Path, int], Tracker]
"""Open a tracker in the folder of a run, given the first step that it will record."""


def load_trackers(config: Config, warn: Callable[[str], None]) -> list[OpenTracker]:
    """Import what the trackers need, and return the functions that open them. Nothing is written yet.

    `warn` hears of a service that fails. Raises `UserError` where a library is missing.
    """
    trackers: list[OpenTracker] = [lambda folder, first_step: JsonlTracker(folder)]
    for name in config.log.report_to:
        if name == "tensorboard":
            trackers.append(partial(TensorBoardTracker, load_summary_writer()))
        else:
            trackers.append(_at_service(name, load_service(name), config, warn))
    return trackers


def _at_service(service: Service, library: Any, config: Config, warn: Callable[[str], None]) -> OpenTracker:
    settings = config.model_dump(mode="json")
    return lambda folder, first_step: Forgiving(
        service, lambda: ServiceTracker(service, library, config.log.project, settings, folder), warn
    )
