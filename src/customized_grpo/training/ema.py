"""An exponential moving average of the trained weights (Polyak averaging): steadier than the last iterate."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The average, in fp32, of `parameters`; it starts at their present values."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self._before: list[Tensor] | None = None
        self.tensors = {name: parameter.detach().float().clone() for name, parameter in self._parameters}

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the weights after `iteration` (1 is the first): average <- k average + (1 - k) weights, with
        k = min(decay, (1 + iteration) / (10 + iteration)), so that the start is soon forgotten."""
        keep = min(self._decay, (1 + iteration) / (10 + iteration))
        for name, parameter in self._parameters:
            self.tensors[name].lerp_(parameter.float(), 1 - keep)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Use the averaged weights inside this block; afterwards the parameters are restored bitwise."""
        self._before = [parameter.detach().clone() for _, parameter in self._parameters]
        try:
            self._put([self.tensors[name] for name, _ in self._parameters])
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """End `swapped`; outside of it nothing changes."""
        if self._before is not None:
            self._put(self._before)
            self._before = None

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        for (_, parameter), value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
