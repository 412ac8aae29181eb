"""`customized-grpo serve-reward`: a reward behind a small HTTP server, for trainers on other machines.

The protocol is `rewards.remote`'s. One request is scored at a time; others wait.
"""

import base64
import hmac
import io
import json
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from customized_grpo.config_rewards import ENCODERS, IDENTITY_ENCODERS, RewardsConfig
from customized_grpo.errors import UserError
from customized_grpo.messages import worded
from customized_grpo.rewards import Reward, Scores, Task
from customized_grpo.rewards.catalogue import load_hpsv3_reward, load_pretrained
from customized_grpo.rewards.own import PREFIX, OwnReward
from customized_grpo.rewards.remote import TOKEN
from customized_grpo.rewards.transport import secret
from customized_grpo.runtime import check_precision, resolve_device

PNG = b"\x89PNG\r\n\x1a\n"
LARGEST_SIDE = 4096
"""Pictures with a longer side are refused by their header, before they are decoded."""


class _Refused(Exception):
    """A request that is answered with a status and a reason."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Serves `reward` under `name`; `max_images` and `max_bytes` bound a request."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], reward: Reward, name: str, *, max_images: int, max_bytes: int, token: str | None
    ) -> None:
        super().__init__(address, _Handler)
        self.reward, self.name, self.token = reward, name, token
        self.max_images, self.max_bytes = max_images, max_bytes
        self.turn = threading.Lock()

    def score(self, body: bytes) -> dict[str, Any]:
        """The answer to a request's body. Raises `_Refused` for one that cannot be scored."""
        try:
            request = json.loads(body)
            prompts, groups = request["prompts"], request["images"]
            count = sum(len(group) for group in groups)
            if count > self.max_images:
                raise _Refused(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{count} images, and {self.max_images} are taken at once"
                )
            images = torch.stack([torch.stack([_decoded(text, 3) for text in group]) for group in groups])
            references = [[_decoded(text, 3) for text in row] for row in request["references"]]
            masks = request.get("masks")
            masks = None if masks is None else [[_decoded(text, 1) for text in row] for row in masks]
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError("prompts are strings")
            if not len(prompts) == len(groups) == len(references) == len(references if masks is None else masks):
                raise ValueError("prompts, images, references and masks differ in number")
        except (KeyError, TypeError, ValueError, RuntimeError, OSError, RecursionError) as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"not a request for scores: {str(error)[:200]}") from error
        try:
            with self.turn:
                return _answer(self.reward.score(images, Task(prompts, references, masks)))
        except (UserError, ValueError, RuntimeError) as error:
            # Of 4xx, for the trainer to stop and say so: the same request would fail again.
            raise _Refused(HTTPStatus.UNPROCESSABLE_ENTITY, f"the reward failed: {str(error)[:200]}") from error


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60

    def do_GET(self) -> None:
        if self.path != "/health":
            self._reply(HTTPStatus.NOT_FOUND, {"error": "there are GET /health and POST /score"})
        elif self._allowed():
            about = {"status": "ok", "reward": self.server.name, "max_images": self.server.max_images}
            self._reply(HTTPStatus.OK, about)

    def do_POST(self) -> None:
        if self.path != "/score":
            self._reply(HTTPStatus.NOT_FOUND, {"error": "there are GET /health and POST /score"})
            return
        if not self._allowed():
            return
        try:
            self._reply(HTTPStatus.OK, self.server.score(self._body()))
        except _Refused as error:
            self._reply(error.status, {"error": str(error)})

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the trainer tells what fails."""

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        if int(length) > self.server.max_bytes:
            self.close_connection = True
            limit = f"{length} bytes, and {self.server.max_bytes} are taken at once"
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, limit)
        return self.rfile.read(int(length))

    def _allowed(self) -> bool:
        wanted = self.server.token
        given = self.headers.get("Authorization", "")
        if wanted is None or hmac.compare_digest(given.encode(), f"Bearer {wanted}".encode()):
            return True
        self.close_connection = True
        self._reply(HTTPStatus.UNAUTHORIZED, {"error": "a bearer token is wanted, and this is not it"})
        return False

    def _reply(self, status: HTTPStatus, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _decoded(text: str, channels: int) -> Tensor:
    """The base64 of a PNG as [channels, H, W] in [0, 1]."""
    data = base64.b64decode(text, validate=True)
    if not data.startswith(PNG):
        raise ValueError("pictures are PNGs")
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if max(image.size) > LARGEST_SIDE:
            raise ValueError(f"a picture of {image.size[0]}x{image.size[1]}; {LARGEST_SIDE} is the longest side taken")
        pixels = torch.from_numpy(np.array(image.convert("RGB" if channels == 3 else "L")))
    return pixels.reshape(*pixels.shape[:2], channels).permute(2, 0, 1).float() / 255


def _answer(scores: Scores) -> dict[str, Any]:
    valid = (scores.valid & scores.values.isfinite()).tolist()
    values = [
        [value if known else None for value, known in zip(*rows, strict=True)]
        for rows in zip(scores.values.tolist(), valid, strict=True)
    ]
    return {"values": values, "valid": valid}


def serve(
    name: str,
    model: str | None,
    settings: Mapping[str, Any],
    address: tuple[str, int],
    *,
    max_images: int,
    max_bytes: int,
    on_ready: Callable[[str], None],
) -> None:
    """Serve the reward `name` until interrupted; `settings` are of `RewardsConfig`. `on_ready` hears where. Raises
    `UserError` for a reward that cannot be had, settings that it does not read, bounds below 1, and an address that
    cannot be listened on."""
    for option, value in (("--max_images", max_images), ("--max_bytes", max_bytes)):
        if value < 1:
            raise UserError(f"{option}: {value} takes no request; give 1 or more")
    reward = _reward(name, model, settings)
    try:
        server = RewardServer(address, reward, name, max_images=max_images, max_bytes=max_bytes, token=secret(TOKEN))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host, --port: cannot listen on {address[0]}:{address[1]} ({error}); name others") from error
    with server:
        host, port = server.server_address[:2]
        guarded = "a token is wanted" if server.token else f"no token is wanted: {TOKEN} is not set"
        on_ready(f"serving {name} on http://{host!s}:{port} ({guarded})")
        server.serve_forever()


def _reward(name: str, model: str | None, settings: Mapping[str, Any]) -> Reward:
    if name.startswith(PREFIX):
        if model is not None:
            raise UserError(f"--model: {name} takes none; leave it out")
        reward = OwnReward.load("serve-reward", name)
        _config(name, None, settings)
        return reward
    if name not in (*ENCODERS, "hpsv3"):
        raise UserError(
            f"serve-reward: no reward '{name}'; choose hpsv3, {', '.join(ENCODERS)} or python:module.function"
        )
    config = _config(name, model, settings)
    device = resolve_device(config.device, "--")
    check_precision(config.precision, device, "--")
    if name == "hpsv3":
        return load_hpsv3_reward(config, model, device)
    return load_pretrained(name, "--model", model, config, device)


def _config(name: str, model: str | None, settings: Mapping[str, Any]) -> RewardsConfig:
    """The configuration of the reward `name`. Raises `UserError` for settings that it does not read."""
    side = "identity" if name in IDENTITY_ENCODERS else "prompt"
    if side == "prompt" and settings.get("identity_reference", "whole") != "whole":
        raise UserError(f"--identity_reference: only for {' or '.join(IDENTITY_ENCODERS)}; leave it out")
    try:
        return RewardsConfig.model_validate({side: name, f"{side}_model": model, **settings})
    except ValidationError as error:
        raise UserError(f"--{worded(error).replace(f'{side}_model', 'model')}") from error
