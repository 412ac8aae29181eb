"""When a run is saved: on schedule, and whatever ends it."""

import threading
from pathlib import Path
from typing import Any

from customized_grpo.config.training import CheckpointConfig
from customized_grpo.distributed.launch import saving
from customized_grpo.io.files import StorageError, writing
from customized_grpo.tracking.console import Display
from customized_grpo.training.checkpoint import list_checkpoints, prune_checkpoints, save_checkpoint
from customized_grpo.training.snapshot import Snapshot


class CheckpointSaver:
    """Save the last whole iteration of a run, which is the one in the snapshot. Only the first process saves."""

    def __init__(self, folder: Path, config: CheckpointConfig, snapshot: Snapshot, display: Display) -> None:
        self.folder, self.config, self.snapshot, self.display = folder, config, snapshot, display
        self.fingerprint: dict[str, Any] = {}
        """What `pin` returned: a run goes on from a checkpoint only where it is equal."""
        self.saved = 0
        """The iteration of the newest whole checkpoint, 0 before the first one."""
        self._failed: int | None = None
        """The iteration whose save failed: it is not tried again."""
        self._lock = threading.Lock()

    def save(self) -> None:
        """Save the last whole iteration, unless that was done already: a whole checkpoint is not touched."""
        with self._lock:
            iteration = self.snapshot.iteration
            if iteration is None or self.saved == iteration:
                return
            self._failed = iteration
            with saving():
                save_checkpoint(self.folder, iteration, self.fingerprint, self.snapshot.tensors())
            self.saved, self._failed = iteration, None

    def prune(self) -> None:
        """Remove old checkpoints. A run that ends early removes none: what ended it may be in the newest weights."""
        if self.saved:
            with writing(self.folder):
                prune_checkpoints(self.folder, self.saved, self.config.keep_last, self.config.keep_every)

    def save_at_end(self, how: str) -> None:
        """Save the last whole iteration of a run that ends early, and say where the run goes on.

        `how` it ended, e.g. "stopped by SIGTERM".
        """
        done = self.snapshot.iteration or 0
        if done and self._failed == done:
            self._say_what_is_left("it could not be saved")
            return
        if done:
            try:
                self.save()
            except (StorageError, RuntimeError) as failure:  # the disk, or the device of a copy that was under way
                self._say_what_is_left(str(failure))
                return
        self.display.note(f"{how} after iteration {done}; `train --resume` goes on from there")

    def save_from_thread(self) -> None:
        """Save the last whole iteration where the main thread may wait forever for a process that is lost."""
        with self.snapshot.lock:
            if self.snapshot.iteration:
                self.save()

    def _say_what_is_left(self, reason: str) -> None:
        self.display.warn(f"what came after the last checkpoint is lost: {reason}")
        if any(list_checkpoints(self.folder)):
            self.display.note("what was saved before is as it was; `train --resume` goes on from it")
