"""A reward of the user's own: a function, found from the folder in which the command runs."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.errors import UserError, first_line
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.types import PromptBatch

Function = Callable[[Tensor, PromptBatch], Tensor | Scores]


class CustomReward(Reward):
    """Calls `function(images [P, G, 3, H, W], batch)`, which answers values [P, G], higher is better, or `Scores`.

    A value that is not finite is invalid: its sample leaves the group.
    """

    def __init__(self, name: str, function: Function, *, masks: bool = False) -> None:
        """Wrap a `function`; `masks`: it wants the masks of references that have some."""
        self._name, self._function, self._masks = name, function, masks

    @classmethod
    def load(cls, field: str, name: str, *, masks: bool = False) -> "CustomReward":
        """Load the function `module.function` that the configuration's `field` names. Raises `UserError` if there is
        none."""
        module_name, _, function_name = name.rpartition(".")
        if not module_name:
            raise UserError(f"{field}: '{name}' names no function; write module.function")
        folder = str(Path.cwd())
        if folder not in sys.path:
            sys.path.insert(0, folder)
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # the module is the user's: anything may come out of it
            raise UserError(
                f"{field}: module '{module_name}' could not be imported ({type(error).__name__}: {first_line(error)}); "
                f"it is looked for in {folder} and among what is installed"
            ) from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise UserError(f"{field}: {module_name} ({module.__file__}) has no function '{function_name}'")
        return cls(name, function, masks=masks)

    @torch.no_grad()
    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        """See `Reward.score`. Raises `UserError` where the function raises, or answers anything but a number for each
        image."""
        try:
            found = self._function(images, batch if self._masks else batch.without_masks())
        except Exception as error:  # it is the user's: anything may come out of it
            raise UserError(
                f"{self._name} raised {type(error).__name__}: {first_line(error)}; mend the function, or have it "
                "answer NaN for what it cannot score"
            ) from error
        scores = found if isinstance(found, Scores) else Scores(found, torch.ones(images.shape[:2], dtype=torch.bool))
        shape = tuple(images.shape[:2])
        for part in (scores.values, scores.valid):
            if not isinstance(part, Tensor) or tuple(part.shape) != shape:
                given = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise UserError(f"{self._name} answered {given}, expected a tensor of {list(shape)}, a number an image")
        if not isinstance(scores.reason, str | None):
            raise UserError(f"{self._name} answered a reason of {type(scores.reason).__name__}, expected a str or None")
        values = scores.values.float()
        known = scores.valid.to(values.device) & values.isfinite()
        return Scores(torch.where(known, values, 0.0), known, scores.reason)
