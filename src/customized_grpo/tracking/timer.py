"""Seconds of each phase of an iteration."""

import time
from collections.abc import Callable

import torch

OnPhase = Callable[[str, float], None]
"""Called as (phase, share of it done)."""


class Clock:
    """Seconds by phase."""

    def __init__(self, on_phase: OnPhase, device: torch.device) -> None:
        self._on_phase, self._device = on_phase, device
        self._starts: list[tuple[str, float]] = []

    def start(self, phase: str) -> None:
        self._starts.append((phase, self._now()))
        self.share(0.0)

    def _now(self) -> float:
        """The time when all that was asked of the device is done, but for copies on other streams."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()

    def share(self, share: float) -> None:
        self._on_phase(self._starts[-1][0], share)

    def stop(self) -> dict[str, float]:
        ends = [start for _, start in self._starts[1:]] + [self._now()]
        seconds = {phase: end - start for (phase, start), end in zip(self._starts, ends, strict=True)}
        return seconds | {"total": sum(seconds.values())}
