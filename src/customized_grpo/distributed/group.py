"""Several processes that train as one: who this process is, what each does of the work, and what all must agree on.

They are started by `torchrun`, `accelerate launch` or `--num_processes` and read who they are from the environment that
those set (RANK, WORLD_SIZE, ...). Everything they exchange are tensors; nothing is pickled.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from customized_grpo.distributed.launch import world_size
from customized_grpo.distributed.termination import Terminated, Termination
from customized_grpo.errors import TrainingError, UserError, first_line

BEAT = 1.0
"""Seconds between two signs of life."""
GRACE = 5.0
"""Seconds that a process has to stop by itself once another is known to be gone."""
STORE = 0
"""The process that holds the store, unless what launched them does."""
BUCKET = 1 << 26
"""Numbers that are summed at once: bounds the memory of the copy."""
TEXT = 2000
"""Bytes of an error that other processes are told."""
_FINE, _USER_ERROR, _TRAINING_ERROR, _TERMINATED = range(4)


class Ranks:
    """The processes of a run; as it stands, the only one."""

    def __init__(self, rank: int = 0, world: int = 1, watch: "Watch | None" = None) -> None:
        self.rank, self.world, self._watch = rank, world, watch
        self._buffer: Tensor | None = None
        self.ending = False
        """Whether all processes have agreed to end."""

    def before_force(self, act: Callable[[], None]) -> None:
        """Have `act` done in a thread before this process is ended by force, because another one is gone."""
        if self._watch is not None:
            self._watch.last_act = act

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows what happens."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """Which of `count` things in order are those of `rank` (of this one if None): a run of neighbours."""
        rank = self.rank if rank is None else rank
        return range(rank * count // self.world, (rank + 1) * count // self.world)

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Allocate what `sum_` of such `tensors` needs, before training: a process that then ran out of memory would
        leave the others waiting for its part of the sum."""
        if self.world > 1:
            self._buffer = tensors[0].new_empty(max(_size(bucket) for bucket in _buckets(tensors)))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of `tensors`, of one type and device, by its sum over the processes."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            if self._buffer is None or len(self._buffer) < _size(bucket):
                self.reserve(bucket)
            assert self._buffer is not None
            flat = torch.cat([tensor.flatten() for tensor in bucket], out=self._buffer[: _size(bucket)])
            with self._talking():
                dist.all_reduce(flat)
            for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows [n, ...] of all processes [N, ...] in the order of ranks, on the CPU; n may differ, the rest not."""
        if self.world == 1:
            return tensor
        kind = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
        own = tensor.detach().cpu().to(kind)
        counts = [int(count) for count in torch.cat(self._gathered(torch.tensor([len(own)])))]
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        parts = self._gathered(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(tensor.dtype)

    def of_first(self, text: str) -> str:
        """Return the `text` that the first process has."""
        own = torch.tensor([*text.encode()] if self.first else [], dtype=torch.uint8)
        return bytes(self.rows(own).tolist()).decode()

    def table(self, row: Tensor) -> Tensor:
        """The `row` [n] of each process, [N, n], on the CPU."""
        return torch.stack([row] if self.world == 1 else self._gathered(row.cpu()))

    def unlike(self, value: Tensor) -> list[int]:
        """The ranks whose `value` [n] is not that of rank 0."""
        values = self.table(value)
        return [rank for rank, each in enumerate(values) if not torch.equal(each, values[0])]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is within succeeds in every process, or fails in every one.

        An error in one is raised in the first, under the other's name; the rest end quietly. A SIGTERM that any of them
        heard is `Terminated` in all.
        """
        if self.world == 1:
            yield
            return
        failure: BaseException | None = None
        try:
            yield
        except (UserError, TrainingError, Terminated, OSError) as error:
            if self.ending:
                raise
            failure = error
            if isinstance(error, OSError):
                failure = UserError(f"{error.filename or 'input'}: {error.strerror or error}")
        codes = {UserError: _USER_ERROR, TrainingError: _TRAINING_ERROR, Terminated: _TERMINATED}
        code = next((code for kind, code in codes.items() if isinstance(failure, kind)), _FINE)
        if code == _FINE and self._watch is not None and self._watch.termination.due:
            code = _TERMINATED
        statuses = self._gathered(_encoded(code, str(failure or "")))
        failed = [(rank, *_decoded(status)) for rank, status in enumerate(statuses) if status[0] != _FINE]
        self.ending = bool(failed)
        errors = [each for each in failed if each[1] != _TERMINATED]
        if errors:
            self._raise(*errors[0], failure)
        if failed:
            raise Terminated

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within `together`: what is within talks to no other process, so that SIGTERM need not wait for its end."""
        if self._watch is None:
            yield
            return
        with self._watch.termination.at_once():
            yield

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """An error of torch within is put down to the process that is gone, if one is."""
        try:
            yield
        except RuntimeError as error:
            if self._watch is None or not self._watch.finds_one_gone():
                raise
            raise TrainingError(self._watch.who_is_gone(error)) from error

    def _raise(self, rank: int, code: int, text: str, own: BaseException | None) -> NoReturn:
        if not self.first:
            raise SystemExit(1)
        if rank == 0 and own is not None:
            raise own
        kind = UserError if code == _USER_ERROR else TrainingError
        raise kind(f"process {rank} of {self.world}: {text}")

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        with self._talking():
            dist.all_gather(parts, tensor.contiguous())
        return parts

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """What torch.distributed says of a process that is gone, with its name."""
        try:
            yield
        except RuntimeError as error:
            if self._watch is None:
                raise
            raise TrainingError(self._watch.who_is_gone(error)) from error


class Watch:
    """Signs of life of every process, and what one says to all: that it was told to end.

    A process that is silent for `silence` seconds is gone. Whoever waits for it then stops, by itself or by force: some
    ways to wait never end. One thread talks to the store, which is in one of the processes and may be gone with it;
    another only looks at the clock.
    """

    def __init__(self, store: Any, rank: int, world: int, termination: Termination, silence: float) -> None:
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
        """What to say once talking has failed with `error`: known when the silence of one has lasted."""
        found = self.finds_one_gone()
        # The caller has heard it, and may have a checkpoint to write before it ends.
        self.close()
        return self._told() if found else f"processes could not talk: {first_line(error)}"

    def finds_one_gone(self) -> bool:
        """Whether a process is silent from now on, or was already."""
        self._silence = min(self._silence, GRACE)
        return self._found.wait(self._silence + GRACE)

    def close(self) -> None:
        """Give no more signs, and wait for none. A thread that talks while the interpreter ends would abort it."""
        self._done.set()
        for thread in self._threads:
            thread.join(2 * BEAT)

    def _talk(self) -> None:
        beats, last = 0, dict.fromkeys(self._heard, b"")
        while not self._done.wait(BEAT):
            beats += 1
            try:
                self._store.set(f"beat/{self._rank}", str(beats))
                if self.termination.asked:
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
        while not self._done.wait(BEAT):
            now = time.monotonic()
            if (asleep := now - looked - BEAT) > BEAT:
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


@contextmanager
def started(termination: Termination, silence: float) -> Iterator[Ranks]:
    """The processes of this run, connected; the only one where none were launched together.

    Raises `UserError` where they cannot be connected. `silence`: seconds after which a process without a sign of life
    is gone.
    """
    world = world_size()
    if world == 1:
        yield Ranks()
        return
    if "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE is {world}, but RANK is not set; start processes by torchrun, or unset it")
    rank = int(os.environ["RANK"])
    termination.defer()  # first: a process that left alone, while it connects, would leave the others waiting
    watch: Watch | None = None
    ranks: Ranks | None = None
    try:
        try:
            store = next(rendezvous("env://", timeout=timedelta(seconds=300)))[0]
            watch = Watch(store.clone(), rank, world, termination, silence)
            watch.start()  # first: what connects them waits for all, however long that takes
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            # Scoring by a slow server is no failure: who is gone is known from the signs of life.
            dist.init_process_group(
                backend, store=PrefixStore("talk", store), rank=rank, world_size=world, timeout=timedelta(days=7)
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"process {rank} of {world} could not reach the others at {os.environ.get('MASTER_ADDR')}:"
                f"{os.environ.get('MASTER_PORT')} ({first_line(error)}); check the address, the port and firewalls"
            ) from error
        ranks = Ranks(rank, world, watch)
        yield ranks
        ranks.ending = True
    finally:
        if ranks is not None and ranks.ending:
            # The first may have a checkpoint to write. Whoever launched the processes ends all when one ends.
            with suppress(RuntimeError):
                dist.barrier()
                dist.destroy_process_group()
        if watch is not None:
            watch.close()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and _size(bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _encoded(code: int, text: str) -> Tensor:
    data = bytes([code]) + text.encode()[:TEXT]
    return torch.frombuffer(bytearray(data.ljust(1 + TEXT, b"\0")), dtype=torch.uint8)


def _decoded(status: Tensor) -> tuple[int, str]:
    data = bytes(status.tolist())
    return data[0], data[1:].rstrip(b"\0").decode(errors="replace")
