"""Seconds of each phase of an iteration."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

OnPhase = Callable[[str, float], None]
OnProgress = Callable[[float], None]
"""Called with the share that is done, in [0, 1]."""
"""Called as (phase, share of it done)."""


class Timer:
    """Measures phases that follow one another, and reports their progress."""

    def __init__(self, on_phase: OnPhase, device: torch.device) -> None:
        self._on_phase, self._device = on_phase, device
        self._starts: list[tuple[str, float]] = []
        self._end = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what is within. The time up to the next phase, waiting for other processes, counts to this one."""
        self._starts.append((name, self._now()))
        yield
        self._end = self._now()

    def progress(self, share: float) -> None:
        """Report the `share` of the present phase that is done, in [0, 1]."""
        self._on_phase(self._starts[-1][0], share)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, and their `total`."""
        ends = [start for _, start in self._starts[1:]] + [self._end]
        seconds = {phase: end - start for (phase, start), end in zip(self._starts, ends, strict=True)}
        return seconds | {"total": sum(seconds.values())}

    def _now(self) -> float:
        """Return the time when the device has done all its work, but for copies on other streams."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()
