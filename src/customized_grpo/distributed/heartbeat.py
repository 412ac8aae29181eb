"""Heartbeats of the processes of a run."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from customized_grpo.distributed.termination import SignalHandler
from customized_grpo.errors import first_line

HEARTBEAT_INTERVAL = 1.0
"""Seconds between two signs of life."""
GRACE = 5.0
"""Seconds that a process has to stop by itself once another is known to be gone."""
STORE = 0
"""The process that holds the store, unless what launched them does."""


class HeartbeatMonitor:
    """Monitors the heartbeats of all processes, and broadcasts a termination signal.

    A process that is silent for `silence` seconds is gone. A process that waits for it then stops, by itself or by
    force: some ways to wait never end. One thread talks to the store, which lives in one of the processes and may be
    gone with it; another only looks at the clock.
    """

    def __init__(self, store: Any, rank: int, world: int, termination: SignalHandler, silence: float) -> None:
        self.termination = termination
        self._store, self._rank, self._world, self._silence = store, rank, world, silence
        self.last_act: Callable[[], None] = lambda: None
        """What is done before this process is ended by force, in a thread: the main one may wait for a lost process."""
        self._threads: list[threading.Thread] = []
        self._done, self._found = threading.Event(), threading.Event()
        self._names = [""] * world
        self._heard: dict[int, float] = {}
        self._talked = time.monotonic()
        self._gone: int | None = None

    def start(self) -> None:
        """Exchange names, for messages, waiting for all; from now on give and expect signs of life."""
        self._store.set(f"name/{self._rank}", f"host {socket.gethostname()}, process {os.getpid()}")
        self._store.set(f"beat/{self._rank}", "0")
        self._names = [self._store.get(f"name/{rank}").decode() for rank in range(self._world)]
        self._talked = time.monotonic()
        self._heard = {rank: self._talked for rank in range(self._world) if rank != self._rank}
        for work in (self._talk, self._look):
            self._threads.append(threading.Thread(target=work, daemon=True, name=work.__name__))
            self._threads[-1].start()

    def who_is_gone(self, error: RuntimeError) -> str:
        """Return the message for a failed exchange: which process is gone, once its silence has lasted."""
        found = self.finds_one_gone()
        # The caller has heard it, and may have a checkpoint to write before it ends.
        self.close()
        return self._told() if found else f"processes could not talk: {first_line(error)}"

    def finds_one_gone(self) -> bool:
        """Return whether a process falls silent from now on, or was silent already."""
        self._silence = min(self._silence, GRACE)
        return self._found.wait(self._silence + GRACE)

    def close(self) -> None:
        """Give no more signs, and wait for none. A thread that talks while the interpreter ends would abort it."""
        self._done.set()
        for thread in self._threads:
            thread.join(2 * HEARTBEAT_INTERVAL)

    def _talk(self) -> None:
        beats, last = 0, dict.fromkeys(self._heard, b"")
        while not self._done.wait(HEARTBEAT_INTERVAL):
            beats += 1
            try:
                self._store.set(f"beat/{self._rank}", str(beats))
                if self.termination.requested:
                    self._store.set("terminate", "1")
                elif self._store.check(["terminate"]):
                    os.kill(os.getpid(), signal.SIGTERM)  # heard in the main thread, whatever that waits for
                for other in last:
                    beat = self._store.get(f"beat/{other}")
                    if beat != last[other]:
                        last[other], self._heard[other] = beat, time.monotonic()
                self._talked = time.monotonic()
            except RuntimeError:
                return  # the store is gone, and its silence tells

    def _look(self) -> None:
        looked = time.monotonic()
        while not self._done.wait(HEARTBEAT_INTERVAL):
            now = time.monotonic()
            if (asleep := now - looked - HEARTBEAT_INTERVAL) > HEARTBEAT_INTERVAL:
                # This process was stopped for a while, as all of them may have been: nothing was to be heard.
                self._talked = min(now, self._talked + asleep)
                for rank, heard in self._heard.items():
                    self._heard[rank] = min(now, heard + asleep)
            looked, late = now, now - self._silence
            silent = [rank for rank, heard in self._heard.items() if heard < late]
            if self._talked < late and self._rank != STORE:
                silent = [STORE]  # with it all others fall silent
            if silent:
                self._gone = silent[0]
                self._found.set()
                while not self._done.wait(2 * GRACE):
                    if not self.termination.busy:  # a save is not torn, however long it takes
                        self._end()
                return

    def _end(self) -> None:
        """End this process by force, after its last act."""
        try:
            self.last_act()
        finally:
            print(f"customized-grpo: error: {self._told()}", file=sys.stderr, flush=True)
            os._exit(1)

    def _told(self) -> str:
        assert self._gone is not None
        return (
            f"process {self._rank} of {self._world} stops: process {self._gone} ({self._names[self._gone]}) is gone. "
            "What it said last is in its output; the run goes on from its last checkpoint with train --resume"
        )
