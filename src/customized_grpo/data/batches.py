"""Which samples an iteration uses."""

import torch

from customized_grpo.randomness import generator


def batch_indices(num_samples: int, per_iteration: int, seed: int, iteration: int) -> list[int]:
    """Return indices of the `per_iteration` samples that iteration `iteration` (counted from 0) uses.

    All samples once in a shuffled order, then all again in another: epoch e's order depends on (seed, e)
    alone, and iteration k takes the places from k x per_iteration on, across the ends of epochs. Raises
    ValueError for numbers below 1 (iteration: below 0).
    """
    if num_samples < 1 or per_iteration < 1 or iteration < 0:
        raise ValueError(
            f"expected num_samples >= 1, per_iteration >= 1, iteration >= 0; "
            f"got {num_samples}, {per_iteration}, {iteration}"
        )
    places = range(iteration * per_iteration, (iteration + 1) * per_iteration)
    first_epoch, last_epoch = places[0] // num_samples, places[-1] // num_samples
    order: list[int] = []
    for epoch in range(first_epoch, last_epoch + 1):
        order += torch.randperm(num_samples, generator=generator(seed, epoch, "sample order")).tolist()
    start = places[0] - first_epoch * num_samples
    return order[start : start + per_iteration]
