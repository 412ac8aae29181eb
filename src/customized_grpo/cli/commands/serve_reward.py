"""`customized-grpo serve-reward`: serve a reward to trainers on other machines."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from pydantic import ValidationError

from customized_grpo.cli.command import Command
from customized_grpo.cli.parser import Parser
from customized_grpo.config.evaluation import MetricConfig
from customized_grpo.config.messages import format_validation_error
from customized_grpo.config.rewards import IDENTITY_ENCODERS, PRETRAINED
from customized_grpo.errors import UserError

if TYPE_CHECKING:
    from customized_grpo.rewards.reward import Reward

PREFIX = "python:"
LOCAL = ("device", "precision", "micro_batch")
"""Options that are settings of `ScoreConfig.local`."""
PARTS = {
    "model": PRETRAINED, "backbone": ("hpsv2", "hpsv3"), "instruction": ("hpsv3",), "reference": IDENTITY_ENCODERS,
}  # fmt: skip
"""Options that only some rewards read, and those rewards."""


def build_parser() -> Parser:
    """Return the parser of `serve-reward`."""
    serve = Parser(
        description="Serve a reward over HTTP; a trainer reaches it by a reward of kind remote, and its URL in "
        "rewards.NAME.remote.url. With the environment variable "
        "CUSTOMIZED_GRPO_REWARD_TOKEN set on both sides, requests without that token are refused; needed wherever "
        "other machines reach the server.",
    )
    serve.add_argument(
        "name", type=str, help="hpsv3, hpsv2, dino, clip_i, clip_t, siglip, pickscore, or python:module.function"
    )
    serve.add_argument("--model", type=str | None, help="folder or hub id of the model; default: the usual one")
    serve.add_argument("--backbone", type=str | None, help="hpsv2, hpsv3: folder or hub id of its backbone")
    serve.add_argument("--instruction", type=Path | None, help="hpsv3: file with its text")
    serve.add_argument("--device", type=str, default="auto", help="where it runs: auto, cpu, cuda, cuda:1, mps")
    serve.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: hpsv3 in bf16 on CUDA, else fp32"
    )
    serve.add_argument(
        "--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0 for all, with a token"
    )
    serve.add_argument("--port", type=int, default=8321, help="port to listen on; 0 for a free one")
    serve.add_argument("--max_images", type=int, default=256, help="most images in a request")
    serve.add_argument(
        "--max_pixels", type=int, default=2**27, help="most pixels in a request, of images, references and masks"
    )
    serve.add_argument("--max_bytes", type=int, default=512 * 2**20, help="largest request in bytes")
    serve.add_argument("--micro_batch", type=int, default=32, help="images that go through the encoder at once")
    serve.add_argument(
        "--reference", choices=("whole", "segmented"), default="whole", help="dino, clip_i: cut the subject out"
    )
    return serve


def run(options: Namespace) -> None:
    """Serve until interrupted; everything cheap is checked before the reward is loaded."""
    from customized_grpo.rewards.score_request import Limits
    from customized_grpo.rewards.server import check_server, serve

    local = {name: options[name] for name in LOCAL}
    own = {}
    for part, readers in PARTS.items():
        if options[part] not in (None, "whole"):
            if options.name not in readers:
                raise UserError(f"--{part}: only for {' or '.join(readers)}; leave it out")
            own[part] = options[part]
    address = (options.host, options.port)
    limits = Limits(options.max_images, options.max_pixels, options.max_bytes)
    check_server(address, limits)
    reward = load_reward(options.name, own, local)
    serve(reward, options.name, address, limits, on_ready=lambda text: print(text, flush=True))


def load_reward(name: str, own: Mapping[str, Any], local: Mapping[str, Any]) -> "Reward":
    """Return the reward `name`; `own` are settings of its kind, `local` of where it runs.

    Raises `UserError` for a reward that does not exist or cannot be loaded, and for settings that it does not read.
    """
    from customized_grpo.factory.rewards import RewardLoader
    from customized_grpo.rewards.custom import CustomReward
    from customized_grpo.runtime.device import resolve_device

    if name.startswith(PREFIX):
        _config("python", {"function": name.removeprefix(PREFIX)}, local)
        return CustomReward.load("serve-reward", name.removeprefix(PREFIX), masks=True)
    if name not in PRETRAINED:
        raise UserError(f"serve-reward: no reward '{name}'; choose {', '.join(PRETRAINED)} or {PREFIX}module.function")
    config = _config(name, own, local)
    try:
        return RewardLoader(resolve_device(config.local.device, "--")).load("", config)
    except UserError as error:
        raise UserError(_as_options(name, str(error))) from error


def _config(kind: str, own: Mapping[str, Any], local: Mapping[str, Any]) -> MetricConfig:
    """Return the configuration of a reward of `kind`. Raise `UserError` for settings that it does not read."""
    try:
        return MetricConfig.model_validate({"kind": kind, kind: own, "local": local})
    except ValidationError as error:
        raise UserError(_as_options(kind, format_validation_error(error))) from error


def _as_options(kind: str, message: str) -> str:
    """Return a `message` on fields with the options of this command in their place."""
    names = "|".join((*PARTS, *LOCAL, "function"))
    return re.sub(rf"(?<![\w/])\.?({re.escape(kind)}|local)\.({names})\b", r"--\2", message)


SERVE_REWARD = Command("serve-reward", "serve a reward to trainers on other machines", build_parser, run)
