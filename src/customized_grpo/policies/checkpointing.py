"""Gradient checkpointing of all blocks of a transformer, or of all but every n-th."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from customized_grpo.policies.block_offload import repeated_blocks


def enable_checkpointing(transformer: Any, keep_every: int | None = None) -> float:
    """Let the backward pass recompute the activations of blocks, but for every `keep_every`-th block.

    Returns the share of blocks that are recomputed.
    """
    blocks = repeated_blocks(transformer)
    kept = set(blocks[::keep_every]) if keep_every else set()

    def run(block: nn.Module, *args: Any) -> Any:
        return block(*args) if block in kept else checkpoint(block, *args, use_reentrant=False)

    transformer.enable_gradient_checkpointing(run)
    return 1 - len(kept) / len(blocks)
