"""Where the measurements of a run go: JSON lines and PNG files, TensorBoard."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from customized_grpo.data import save_image
from customized_grpo.errors import UserError
from customized_grpo.io.files import writing
from customized_grpo.io.jsonl import Metrics


class Tracker(Protocol):
    """Record rows of numbers and pictures by name and step. Only the first process of a run has trackers.

    Each method raises `StorageError`, naming the folder of the run, where the disk does not take what it writes.
    """

    def log(self, name: str, row: Metrics, step: int) -> None:
        """Add a row to the log `name`."""
        ...

    def log_images(self, name: str, images: Tensor, step: int, caption: str = "") -> None:
        """Add a grid of images [3, H, W], in [0, 1], to the pictures `name`."""
        ...

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Add figures of the whole run, once it is done."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Write what is still in memory; nothing is recorded afterwards. `failed`: something else ended the run."""
        ...


class JsonlTracker:
    """Write rows to `<folder>/<name>.jsonl` and images to `<folder>/<name>/<step>.png`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def log(self, name: str, row: Metrics, step: int) -> None:
        """Append the row as one line; numbers that are not finite are null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with writing(self.folder), (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(clean) + "\n")

    def log_images(self, name: str, images: Tensor, step: int, caption: str = "") -> None:
        """Write the grid as a PNG file, which replaces an earlier one of this step."""
        with writing(self.folder):
            save_image(images, image_path(self.folder, name, step))

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Do nothing: the run's folder has the evaluation they are from."""

    def close(self, *, failed: bool = False) -> None:
        """Do nothing: each row and each image is on the disk already."""


class TensorBoardTracker:
    """Write rows as scalars `<name>/<key>`, and images, to TensorBoard events in `<folder>/tensorboard`."""

    def __init__(self, writer: Any, folder: Path, first_step: int) -> None:
        """Open the events of a run in `folder`; TensorBoard hides what an earlier process wrote from `first_step` on.

        `writer`: the class that `load_summary_writer` returns.
        """
        self.folder = folder
        with writing(folder):
            self._events = writer(folder / "tensorboard", purge_step=first_step)

    def log(self, name: str, row: Metrics, step: int) -> None:
        """Add each number of the row, apart from the iteration."""
        with writing(self.folder):
            for key, value in row.items():
                if isinstance(value, int | float) and key != "iteration":
                    self._events.add_scalar(f"{name}/{key}", value, step)

    def log_images(self, name: str, images: Tensor, step: int, caption: str = "") -> None:
        """Add the grid under the tag `name`."""
        with writing(self.folder):
            self._events.add_image(name, images, step)

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Add the figures as text, a table."""
        rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in figures.items())
        with writing(self.folder):
            self._events.add_text("summary", f"| | |\n|---|---|\n{rows}")

    def close(self, *, failed: bool = False) -> None:
        """Write the events that are still in memory."""
        with writing(self.folder):
            self._events.close()


def image_path(folder: Path, name: str, step: int) -> Path:
    """Return where `JsonlTracker` writes the images `name` of a step."""
    return folder / name / f"{step:06d}.png"


def load_summary_writer() -> Any:
    """Import TensorBoard's writer of events. Raises `UserError` where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "log.report_to: tensorboard is not installed: pip install 'customized-grpo[tensorboard]'"
        ) from error
    return SummaryWriter
