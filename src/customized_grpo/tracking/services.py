"""Trackers of other services, through their own libraries: Weights & Biases, and trackio, which has the same calls.

Keys and servers are theirs to find: WANDB_API_KEY, WANDB_MODE=offline, TRACKIO_SPACE_ID, ... Nothing here reads them.
"""

import importlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from customized_grpo.errors import UserError, first_line
from customized_grpo.io.files import write_whole, writing
from customized_grpo.io.jsonl import Metrics
from customized_grpo.tracking.trackers import Tracker

Service = Literal["wandb", "trackio"]
RUN_IDS = "trackers.json"
"""File in the folder of a run: by service the id there, under which a resumed run goes on."""


class ServiceTracker:
    """Send rows and pictures to a run at a service. Iterations that a resumed run does again are there twice."""

    def __init__(self, service: Service, library: Any, project: str, config: Mapping[str, Any], folder: Path) -> None:
        """Open the run of the output `folder` in `project`, or go on with it; `library` is the service's own."""
        self._service, self._library = service, library
        own = _run_id(folder, service)
        if service == "wandb":
            # Its reader of the terminal and the progress bar disturb each other.
            quiet = library.Settings(console="off")
            self._run = library.init(
                project=project, name=folder.name, id=own, resume="allow", dir=str(folder), config=dict(config),
                settings=quiet,
            )  # fmt: skip
            self._run.define_metric("iteration")
            self._run.define_metric("*", step_metric="iteration")
        else:
            self._run = library.init(
                project=project, name=f"{folder.name}-{own}", resume="allow", config=dict(config), embed=False
            )

    def log(self, name: str, row: Metrics, step: int) -> None:
        """Send each number of the row, apart from the iteration."""
        numbers = {f"{name}/{key}": value for key, value in row.items() if isinstance(value, int | float)}
        numbers.pop(f"{name}/iteration", None)
        self._send(numbers, step)

    def log_images(self, name: str, images: Tensor, step: int, caption: str = "") -> None:
        """Send the grid with its caption."""
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        self._send({name: self._library.Image(pixels, caption=caption)}, step)

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Send figures of the whole run: to its summary, or as a last row where the service has none."""
        if self._service == "wandb":
            self._run.summary.update(dict(figures))
        else:
            self._run.log({f"summary/{name}": value for name, value in figures.items()})

    def close(self, *, failed: bool = False) -> None:
        """End the run there; wait until all is sent."""
        if self._service == "wandb":
            self._run.finish(exit_code=int(failed))
        else:
            self._run.finish()

    def _send(self, values: dict[str, Any], step: int) -> None:
        if self._service == "wandb":  # its own steps may not go back, as those of a resumed run do
            self._run.log(values | {"iteration": step})
        else:
            self._run.log(values, step=step)


class Forgiving:
    """Pass calls on to the tracker of a service until one fails; then warn, once, and do nothing any more."""

    def __init__(self, service: Service, open_tracker: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        """Open the tracker; a failure there is a warning too."""
        self._service, self._warn = service, warn
        self._tracker: Tracker | None = None
        self._try(lambda: setattr(self, "_tracker", open_tracker()))

    def log(self, name: str, row: Metrics, step: int) -> None:
        """See `Tracker.log`."""
        self._pass_on("log", name, row, step)

    def log_images(self, name: str, images: Tensor, step: int, caption: str = "") -> None:
        """See `Tracker.log_images`."""
        self._pass_on("log_images", name, images, step, caption)

    def summarize(self, figures: Mapping[str, float]) -> None:
        """See `Tracker.summarize`."""
        self._pass_on("summarize", figures)

    def close(self, *, failed: bool = False) -> None:
        """See `Tracker.close`."""
        self._pass_on("close", failed=failed)

    def _pass_on(self, name: str, *arguments: Any, **settings: Any) -> None:
        if self._tracker is not None:
            self._try(lambda: getattr(self._tracker, name)(*arguments, **settings))

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        # Of a library, its process and its server: hours of training are not lost for whatever they raise.
        except Exception as error:
            self._tracker = None
            self._warn(
                f"log.report_to: {self._service} failed ({first_line(error)}); the run goes on without it, and "
                "metrics.jsonl has all of it"
            )


def load_service(service: Service) -> Any:
    """Import the library of a service. Raises `UserError` where it is not installed."""
    try:
        return importlib.import_module(service)
    except ImportError as error:
        raise UserError(
            f"log.report_to: {service} is not installed: pip install 'customized-grpo[{service}]'"
        ) from error


def _run_id(folder: Path, service: Service) -> str:
    """Return the id of the run in `folder` at the service; a new one is kept there first."""
    path = folder / RUN_IDS
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if service not in known:
        known[service] = secrets.token_hex(4)
        with writing(folder):
            write_whole(path, json.dumps(known))
    return known[service]
