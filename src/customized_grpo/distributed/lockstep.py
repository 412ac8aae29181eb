"""Work in unequal shares on one transformer that is sharded over processes.

Its weights are gathered anew whenever it runs, forward and backward, and all processes take part in that: all must run
it equally often, in the same order. Their shares differ - in prompts, micro-batches, shapes. So each tells the others
what it is about to do, and whoever has less to do makes up for it with idle runs.
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
    """The processes meet before every `velocity` of any of them, and at the end of their shares.

    What computes a gradient runs its backward pass before the next meeting.
    """

    def __init__(self, ranks: DistributedGroup, idle: Callable[[], Tensor]) -> None:
        """`idle` runs the transformer once, on next to nothing."""
        self._ranks, self._idle = ranks, idle
        self._abandoned = False

    def velocity(self, runs: int, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returns, which runs the transformer `runs` times, and idle runs up to the most of any process.

        Raises `Terminated` where another process has failed: what this one is about is then of no use.
        """
        most, _ = self._meet(_WORKING, runs)
        velocity = compute()
        for _ in range(most - runs):
            idle = self._idle()
            if idle.requires_grad:
                # Part of the graph, so that the backward pass goes through it here where it does elsewhere.
                velocity = velocity + 0 * idle.sum()
        return velocity

    def drain(self) -> None:
        """Run idly along with the others until all have done their shares."""
        while True:
            most, grad = self._meet(_DONE, 0)
            if most == 0:
                return
            with torch.set_grad_enabled(grad):
                idle = torch.stack([self._idle().sum() for _ in range(most)])
                if idle.requires_grad:
                    (0 * idle.sum()).backward()

    def abort(self) -> None:
        """Tell the others, at their next meeting, that this process has failed."""
        if not self._abandoned:
            with suppress(Terminated):
                self._meet(_FAILED, 0)

    def _meet(self, state: int, runs: int) -> tuple[int, bool]:
        """The most runs that a process is about to make, and whether with gradients."""
        own = torch.tensor([state, runs, torch.is_grad_enabled()])
        states, each, grads = self._ranks.all_gather(own).unbind(1)
        if bool((states == _FAILED).any()):
            # `DistributedGroup.synchronized`, around the phase, raises what the other has met instead.
            self._abandoned = True
            raise Terminated
        return int(each.max()), bool(grads[states == _WORKING].any())


@contextmanager
def phase(ranks: DistributedGroup, idle: Callable[[], Tensor]) -> Iterator[LockstepForward]:
    """All processes enter it within `DistributedGroup.synchronized`, whatever their share, and leave it when all have
    done theirs, or
    one has failed."""
    current = LockstepForward(ranks, idle)
    with ranks.blaming():
        try:
            yield current
        except (UserError, TrainingError, OSError, Terminated):  # all that `together` tells the others of
            current.abort()
            raise
        current.drain()
