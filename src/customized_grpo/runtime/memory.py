"""Words for memory that runs out, on a GPU or on the host."""

from collections.abc import Iterator
from contextlib import contextmanager

from customized_grpo.errors import TrainingError, first_line

MARKS = ("out of memory", "you tried to allocate", "ALLOC_FAILED")
"""What torch writes where an allocation fails: on CUDA, on the CPU, and in cuBLAS."""

DRAWING = "Lower rollout.micro_batch (and, for a first-pass ratio of 1, optimizer.micro_batch with it)"
SCORING = "Lower local.micro_batch of a reward, or set its local.device to another GPU"
UPDATING = (
    "Lower optimizer.micro_batch (and rollout.micro_batch with it), or set "
    "policy.pipeline.gradient_checkpointing or policy.pipeline.block_offload to true"
)
EVALUATING = "Lower rollout.micro_batch, or set ema.evaluate to false"
COPYING = "It takes as much as a checkpoint takes disk: free some, or start a new run with a lower policy.lora_rank"
"""What to do where memory runs out. A resumed run may change these settings, but for the rank."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an allocation failed in `error`, or in what it was raised from.

    Loads no torch, whose errors are RuntimeErrors.
    """
    if error is None:
        return False
    of_torch = isinstance(error, RuntimeError) and any(mark in str(error) for mark in MARKS)
    return of_torch or isinstance(error, MemoryError) or is_out_of_memory(error.__cause__)


@contextmanager
def explain_out_of_memory(doing: str, remedy: str) -> Iterator[None]:
    """Turn a failed allocation within into a `TrainingError`: what was being done, and which settings lower it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory while {doing} ({first_line(error)}). {remedy}") from error
