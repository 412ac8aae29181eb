"""A reward on another machine: the client, and the small HTTP protocol that `customized-grpo serve-reward` speaks.

`POST /score` takes `{"prompts": [P], "images": [P][G], "references": [P][K], "masks": [P][K] or null}`, every picture
as the base64 of a PNG, and answers `{"values": [P][G], "valid": [P][G]}`; a value that is not valid is null. `GET
/health` answers `{"status": "ok", "reward": NAME, "max_images": N}`. With a token, both want `Authorization: Bearer
TOKEN`.
"""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from customized_grpo.data.images import to_pil
from customized_grpo.errors import UserError, first_line
from customized_grpo.policies import References
from customized_grpo.rewards import Scores, Task
from customized_grpo.rewards.transport import Refused, Scoring, Transport, Unavailable

TOKEN = "CUSTOMIZED_GRPO_REWARD_TOKEN"
"""Environment variable of the token, on both sides."""


class RemoteReward:
    """A `Reward` that asks a server, as many groups at once as it takes; a `TellsFailure`."""

    def __init__(self, transport: Transport) -> None:
        """Raises `UserError` where no reward server answers."""
        self._transport = transport
        health = transport.get("/health")
        if not isinstance(health, dict) or not isinstance(health.get("max_images"), int):
            told = transport.without_token(repr(health))
            raise UserError(
                f"{transport.field_name}: {transport.url} is no reward server (its /health answered {told:.100}); "
                "start one with: customized-grpo serve-reward NAME"
            )
        self._max_images: int = health["max_images"]
        self.last_failure: str | None = None
        self._probed = False

    def score(self, images: Tensor, task: Task) -> Scores:
        """See `Reward.score`: what the server could not score in time is invalid."""
        groups, group_size = images.shape[:2]
        if group_size > self._max_images:
            raise UserError(
                f"{self._transport.field_name}: the server takes {self._max_images} images at once, and a group has "
                f"{group_size}; start it with a larger --max_images"
            )
        self.last_failure = None
        self._probed = False
        scoring = self._transport.scoring()
        at_once = max(1, self._max_images // group_size)
        rows = [range(p, min(p + at_once, groups)) for p in range(0, groups, at_once)]
        parts = [self._ask(images, task, part, scoring) for part in rows]
        values, valid = (torch.cat(column) for column in zip(*parts, strict=True))
        return Scores(values, valid)

    def _ask(self, images: Tensor, task: Task, rows: range, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """Values and their validity of the groups `rows`. What is refused is asked again in parts, down to single
        images: one that cannot be scored leaves the others their scores."""
        shape = (len(rows), images.shape[1])
        missing = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        if scoring.is_over():
            return missing
        payload = {
            "prompts": [task.prompts[p] for p in rows],
            "images": [[encoded(image) for image in images[p]] for p in rows],
            "references": _encoded(task.references, rows),
            "masks": None if task.masks is None else _encoded(task.masks, rows),
        }
        try:
            return parsed(self._transport.post("/score", payload, scoring), shape)
        except Refused as error:
            self._probe(images, task, scoring, error)
            if shape == (1, 1):
                self.last_failure = str(error)
                return missing
            return self._in_parts(images, task, rows, scoring)
        except (Unavailable, ValueError) as error:
            told = self._transport.without_token(str(error))
            self.last_failure = told if isinstance(error, Unavailable) else f"{self._transport.field_name}: {told}"
            return missing

    def _in_parts(self, images: Tensor, task: Task, rows: range, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """Ask of several groups each, of one group each image."""
        if len(rows) > 1:
            parts = [self._ask(images, task, range(p, p + 1), scoring) for p in rows]
        else:
            parts = [self._ask(image, task, rows, scoring) for image in images.split(1, dim=1)]
        values, valid = (torch.cat(column, dim=0 if len(rows) > 1 else 1) for column in zip(*parts, strict=True))
        return values, valid

    def _probe(self, images: Tensor, task: Task, scoring: Scoring, refusal: Refused) -> None:
        """Find out, once a scoring, whether these images are refused or all are: ask about a grey one. Raises
        `UserError` where that is refused too."""
        if self._probed:
            return
        self._probed = True
        grey = encoded(torch.full_like(images[0, 0], 0.5))
        masks = None if task.masks is None else [[encoded(torch.ones_like(images[0, 0, :1]))]]
        payload = {"prompts": ["a grey picture"], "images": [[grey]], "references": [[grey]], "masks": masks}
        try:
            self._transport.post("/score", payload, scoring)
        except Refused as error:
            raise UserError(f"{refusal}; a trial image, all grey, was refused too: {error}") from error
        except Unavailable:
            pass  # it is busy, which says nothing of the refusal


def encoded(image: Tensor) -> str:
    """A picture [C, H, W] in [0, 1] as the base64 of a PNG."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def parsed(answer: Any, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Values and their validity [P, G] of a server's answer. Raises ValueError where it is not one."""
    try:
        values = [[_number(value) for value in row] for row in answer["values"]]
        valid = torch.tensor([[_flag(value) for value in row] for row in answer["valid"]])
        found = torch.tensor(values, dtype=torch.float32)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"no scores in the answer ({type(error).__name__}: {first_line(error)})") from error
    if found.shape != shape or valid.shape != shape:
        raise ValueError(f"scores of {list(found.shape)} for {list(shape)} images")
    known = valid & found.isfinite()
    return torch.where(known, found, 0.0), known


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a value is a {type(value).__name__}, expected a number or null")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"a validity is a {type(value).__name__}, expected true or false")
    return value


def _encoded(pictures: References, rows: Sequence[int]) -> list[list[str]]:
    return [[encoded(picture) for picture in pictures[p]] for p in rows]
