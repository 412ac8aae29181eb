"""Work in unequal shares on one transformer that is sharded over processes.

Its weights are gathered again whenever it runs, forward and backward, and all processes take part in that: all must run
it equally often, in the same order. Their shares differ - in prompts, micro-batches, shapes. So the processes exchange
what each is about to do, and a process with less to do makes up for it with idle runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.distributed.termination import Terminated
from customized_grpo.errors import TrainingError, UserError

_WORKING, _DONE, _FAILED = range(3)


class LockstepForward:
    """Runs a transformer equally often in all processes, whatever their shares.

    The processes meet before every `forward` of any of them, and at the end of their shares. A process that computes a
    gradient runs its backward pass before the next meeting.
    """

    def __init__(self, idle: Callable[[], Tensor]) -> None:
        """Wrap a transformer; `idle` runs it once on a minimal input."""
        self._idle = idle
        self._ranks: DistributedGroup | None = None
        self._aborted = False

    @contextmanager
    def phase(self, ranks: DistributedGroup) -> Iterator[None]:
        """Open the phase in which `forward` may be called.

        All processes enter it within `DistributedGroup.synchronized`, whatever their share, and leave it when all have
        done theirs, or one has failed.
        """
        self._ranks, self._aborted = ranks, False
        try:
            with ranks.blaming():
                try:
                    yield
                except (UserError, TrainingError, OSError, Terminated):  # all that `synchronized` reports to the others
                    self._abort()
                    raise
                self._drain()
        finally:
            self._ranks = None

    def forward(self, runs: int, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` returns, which runs the transformer `runs` times, and add idle runs up to the most of
        any process.

        Raises `Terminated` if another process has failed: the result would be of no use.
        """
        most, _ = self._meet(_WORKING, runs)
        output = compute()
        for _ in range(most - runs):
            idle = self._idle()
            if idle.requires_grad:
                # Part of the graph, so that the backward pass goes through it here where it does elsewhere.
                output = output + 0 * idle.sum()
        return output

    def _drain(self) -> None:
        """Run idly along with the others until all have done their shares."""
        while True:
            most, grad = self._meet(_DONE, 0)
            if most == 0:
                return
            with torch.set_grad_enabled(grad):
                idle = torch.stack([self._idle().sum() for _ in range(most)])
                if idle.requires_grad:
                    (0 * idle.sum()).backward()

    def _abort(self) -> None:
        """Report to the others, at their next meeting, that this process has failed."""
        if not self._aborted:
            with suppress(Terminated):
                self._meet(_FAILED, 0)

    def _meet(self, state: int, runs: int) -> tuple[int, bool]:
        """Return the most runs that a process is about to make, and whether with gradients."""
        assert self._ranks is not None, "the processes run a sharded transformer within `lockstep`"
        own = torch.tensor([state, runs, torch.is_grad_enabled()])
        states, each, grads = self._ranks.all_gather(own).unbind(1)
        if bool((states == _FAILED).any()):
            # `DistributedGroup.synchronized`, around the phase, raises what the other has met instead.
            self._aborted = True
            raise Terminated
        return int(each.max()), bool(grads[states == _WORKING].any())
