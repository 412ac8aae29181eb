"""Several processes that train as one: who this process is, what each does of the work, and what all must agree on.

They are started by `torchrun`, `accelerate launch` or `--num_processes` and read who they are from the environment that
those set (RANK, WORLD_SIZE, ...). Everything they exchange are tensors; nothing is pickled.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from customized_grpo.distributed.env import world_size
from customized_grpo.distributed.heartbeat import HeartbeatMonitor
from customized_grpo.distributed.termination import SignalHandler, Terminated
from customized_grpo.errors import TrainingError, UserError, first_line

BUCKET = 1 << 26
"""Numbers that are summed at once: bounds the memory of the copy."""
TEXT = 2000
"""Bytes of an error that are sent to other processes."""
_FINE, _USER_ERROR, _TRAINING_ERROR, _TERMINATED = range(4)


class DistributedGroup:
    """The processes of a run; as it stands, the only one."""

    def __init__(self, rank: int = 0, world: int = 1, watch: "HeartbeatMonitor | None" = None) -> None:
        self.rank, self.world_size, self._watch = rank, world, watch
        self._buffer: Tensor | None = None
        self.aborting = False
        """Whether all processes have agreed to end."""

    def before_force(self, act: Callable[[], None]) -> None:
        """Run `act` in a thread before this process is ended by force, because another process is gone."""
        if self._watch is not None:
            self._watch.last_act = act

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes files and shows what happens."""
        return self.rank == 0

    def local_range(self, count: int, rank: int | None = None) -> range:
        """Return the part of `count` things in order that belongs to `rank` (None: this process): a run of
        neighbors."""
        rank = self.rank if rank is None else rank
        return range(rank * count // self.world_size, (rank + 1) * count // self.world_size)

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Allocate what `sum_` of such `tensors` needs, before training: a process that then ran out of memory would
        leave the others waiting for its part of the sum."""
        if self.world_size > 1:
            self._buffer = tensors[0].new_empty(max(_size(bucket) for bucket in _buckets(tensors)))

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of `tensors`, of one type and device, by its sum over the processes."""
        if self.world_size == 1:
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

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows [n, ...] of all processes as [N, ...] in the order of ranks, on the CPU.

        Processes may have different numbers n of rows; all else must be equal.
        """
        if self.world_size == 1:
            return tensor
        kind = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
        own = tensor.detach().cpu().to(kind)
        counts = [int(count) for count in torch.cat(self._gathered(torch.tensor([len(own)])))]
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        parts = self._gathered(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(tensor.dtype)

    def broadcast_text(self, text: str) -> str:
        """Return the `text` that the first process has."""
        own = torch.tensor([*text.encode()] if self.is_main_process else [], dtype=torch.uint8)
        return bytes(self.gather(own).tolist()).decode()

    def all_gather(self, row: Tensor) -> Tensor:
        """Return the `row` [n] of each process as [N, n], on the CPU."""
        return torch.stack([row] if self.world_size == 1 else self._gathered(row.cpu()))

    def mismatched_ranks(self, value: Tensor) -> list[int]:
        """Return the ranks whose `value` [n] differs from rank 0's."""
        values = self.all_gather(value)
        return [rank for rank, each in enumerate(values) if not torch.equal(each, values[0])]

    @contextmanager
    def synchronized(self) -> Iterator[None]:
        """Make a block succeed in every process, or fail in every process.

        An error in one process is raised in the first, under the other's name; the rest end quietly. A signal that any
        of them received is `Terminated` in all.
        """
        if self.world_size == 1:
            yield
            return
        failure: BaseException | None = None
        try:
            yield
        except (UserError, TrainingError, Terminated, OSError) as error:
            if self.aborting:
                raise
            failure = error
            if isinstance(error, OSError):
                failure = UserError(f"{error.filename or 'input'}: {error.strerror or error}")
        codes = {UserError: _USER_ERROR, TrainingError: _TRAINING_ERROR, Terminated: _TERMINATED}
        code = next((code for kind, code in codes.items() if isinstance(failure, kind)), _FINE)
        if code == _FINE and self._watch is not None and self._watch.termination.pending:
            code = _TERMINATED
        statuses = self._gathered(_encoded(code, str(failure or "")))
        failed = [(rank, *_decoded(status)) for rank, status in enumerate(statuses) if status[0] != _FINE]
        self.aborting = bool(failed)
        errors = [each for each in failed if each[1] != _TERMINATED]
        if errors:
            self._raise(*errors[0], failure)
        if failed:
            raise Terminated

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Mark a block that does no communication, so that a signal may interrupt it. Use inside `synchronized`."""
        if self._watch is None:
            yield
            return
        with self._watch.termination.immediate():
            yield

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Attribute a torch error to the process that died, if one did."""
        try:
            yield
        except RuntimeError as error:
            if self._watch is None or not self._watch.finds_one_gone():
                raise
            raise TrainingError(self._watch.who_is_gone(error)) from error

    def _raise(self, rank: int, code: int, text: str, own: BaseException | None) -> NoReturn:
        if not self.is_main_process:
            raise SystemExit(1)
        if rank == 0 and own is not None:
            raise own
        kind = UserError if code == _USER_ERROR else TrainingError
        raise kind(f"process {rank} of {self.world_size}: {text}")

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with self._talking():
            dist.all_gather(parts, tensor.contiguous())
        return parts

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Name the process that is gone in errors of torch.distributed."""
        try:
            yield
        except RuntimeError as error:
            if self._watch is None:
                raise
            raise TrainingError(self._watch.who_is_gone(error)) from error


@contextmanager
def init_distributed(termination: SignalHandler, silence: float) -> Iterator[DistributedGroup]:
    """Initialize torch.distributed; yield a group of one in a single-process run.

    `silence`: seconds without a heartbeat after which a process is taken for gone. Raises `UserError` if the processes
    cannot be connected.
    """
    world = world_size()
    if world == 1:
        yield DistributedGroup()
        return
    if "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE is {world}, but RANK is not set; start processes by torchrun, or unset it")
    rank = int(os.environ["RANK"])
    termination.defer()  # first: a process that left alone, while it connects, would leave the others waiting
    watch: HeartbeatMonitor | None = None
    ranks: DistributedGroup | None = None
    try:
        try:
            store = next(rendezvous("env://", timeout=timedelta(seconds=300)))[0]
            watch = HeartbeatMonitor(store.clone(), rank, world, termination, silence)
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
        ranks = DistributedGroup(rank, world, watch)
        yield ranks
        ranks.aborting = True
    finally:
        if ranks is not None and ranks.aborting:
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
