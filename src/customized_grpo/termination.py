"""SIGTERM in training: what is whole is kept, and the process ends with status 143."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 128 + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM came, and the weights are those after the last whole iteration. No error: nothing is to catch it but the
    run."""


class Termination:
    """Raises `Terminated` where SIGTERM finds the run, but for what must not be torn: then when that is done."""

    def __init__(self) -> None:
        self._whole = 0
        self._asked = self._deferred = False

    @property
    def asked(self) -> bool:
        """Whether SIGTERM came, to this process or to another of the run."""
        return self._asked

    @property
    def due(self) -> bool:
        """Whether it came, and nothing has to be whole now."""
        return self._asked and not self._whole

    def defer(self) -> None:
        """From now on `Terminated` is only raised by `poll`: where processes wait for each other, none leaves alone."""
        self._deferred = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGTERM within. Only a main thread can; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, this process waits for no other: `Terminated` is raised where SIGTERM finds it, deferred or not."""
        before, self._deferred = self._deferred, False
        try:
            self.check()
            yield
        finally:
            self._deferred = before

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is within is done or not done, never half; a SIGTERM that comes in it counts at its end."""
        self._whole += 1
        try:
            yield
        finally:
            self._whole -= 1
        self.check()

    def check(self) -> None:
        """Raise `Terminated` if SIGTERM came and nothing has to be whole now, unless that is deferred."""
        if not self._deferred:
            self.poll()

    def poll(self) -> None:
        """Raise `Terminated` if SIGTERM came and nothing has to be whole now."""
        if self.due:
            raise Terminated

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            return  # once is enough: a second one must not tear the checkpoint that the first one asked for
        self._asked = True
        self.check()
