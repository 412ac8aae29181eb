"""Signals that end training: the last whole iteration is kept, and the process ends with status 128 + signal."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 128 + signal.SIGTERM
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""What schedulers send, Ctrl-C, and what a closed terminal sends."""


class Terminated(BaseException):
    """A signal asks the run to end. No error: nothing is to catch it but the run."""


class SignalHandler:
    """Raises `Terminated` where a signal finds the run; in a critical section, at its end."""

    def __init__(self) -> None:
        self._whole = 0
        self._number: int | None = None
        self._deferred = False

    @property
    def requested(self) -> bool:
        """Whether a signal came, to this process or to another of the run."""
        return self._number is not None

    @property
    def busy(self) -> bool:
        """Whether a critical section runs, such as a save."""
        return self._whole > 0

    @property
    def pending(self) -> bool:
        """Whether a signal came, and no critical section runs."""
        return self.requested and not self.busy

    @property
    def name(self) -> str:
        """The name of the signal that came; SIGTERM if another process of the run heard it."""
        return signal.Signals(self._number or signal.SIGTERM).name

    @property
    def status(self) -> int:
        """The status with which the process ends: 128 + signal."""
        return 128 + (self._number or signal.SIGTERM)

    def defer(self) -> None:
        """Raise `Terminated` only in `poll` from now on: while processes wait for each other, none leaves alone."""
        self._deferred = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGNALS within, but for those that are ignored, as under nohup. Only a main thread can hear."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Raise `Terminated` wherever a signal finds this block, deferred or not: the block waits for no other
        process."""
        before, self._deferred = self._deferred, False
        try:
            self.check()
            yield
        finally:
            self._deferred = before

    @contextmanager
    def critical_section(self) -> Iterator[None]:
        """Run a critical section: it is done or not done, never half. A signal that comes in it counts at its end."""
        self._whole += 1
        try:
            yield
        finally:
            self._whole -= 1
        self.check()

    def check(self) -> None:
        """Raise `Terminated` if a signal came and no critical section runs, unless that is deferred."""
        if not self._deferred:
            self.poll()

    def poll(self) -> None:
        """Raise `Terminated` if a signal came and no critical section runs."""
        if self.pending:
            raise Terminated

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return  # once is enough: a second one must not tear the checkpoint that the first one asked for
        self._number = number
        self.check()
