"""`customized-grpo train`: tune a generator."""

from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.options import print_path, validate_settings
from customized_grpo.cli.parser import Parser
from customized_grpo.config.policy import PIPELINES
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError

FLAGS = ("resume", "resume_from", "overwrite", "init_from", "dry_run", "gpu_memory", "num_processes")
"""Options that are no settings of a run."""


def build_parser() -> Parser:
    """Return the parser of `train`: every field of `Config`, and FLAGS."""
    train = Parser(
        usage="customized-grpo train --config FILE [--resume | --resume_from DIR | --overwrite] "
        "[--output DIR] [--any.field VALUE ...]",
        description="Tune a subject-driven generator with GRPO, SARS and TDW.",
    )
    train.add_config(Config)
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    train.add_argument("--resume_from", type=Path | None, help="go on from this checkpoint: RUN/checkpoints/000020")
    train.add_argument(
        "--init_from", type=str | None, help="start from the values of an adapter: stands for --policy.init_from"
    )
    train.add_argument("--overwrite", action="store_true", help="delete the run in the output folder and start again")
    train.add_argument(
        "--dry_run", action="store_true", help="say what an iteration takes (parameters, operations, memory), and stop"
    )
    train.add_argument(
        "--gpu_memory", type=float | None,
        help="with --dry_run: GiB of the device. A tenth is left free; if the rest is too little, settings that fit "
        "are named, the cheapest first",
    )  # fmt: skip
    train.add_argument("--num_processes", type=int, default=1, help="processes on this machine, a GPU each")
    train.add_fields(Config)
    return train


def run(options: Namespace) -> None:
    """Train, and print the path of the report; with --dry_run print the costs of an iteration."""
    if options.init_from is not None:
        if options.policy.init_from not in (None, options.init_from):
            raise UserError("--init_from stands for --policy.init_from, and they name two adapters; give one of them")
        options.policy.init_from = options.init_from
    config = validate_settings(Config, options, *FLAGS)
    if options.gpu_memory is not None and not (options.dry_run and options.gpu_memory > 0):
        raise UserError("--gpu_memory: GiB above 0 that --dry_run holds its estimate against; give both")
    if options.dry_run:
        _print_costs(config, options.num_processes, options.gpu_memory)
        return
    from customized_grpo.tracking.console import Display
    from customized_grpo.training.run import train

    how = {name: options[name] for name in ("resume", "resume_from", "overwrite")}
    print_path("report", train(config, Display(), **how))


def _print_costs(config: Config, count: int, limit: float | None) -> None:
    """Print what an iteration takes. Raises `UserError` where that is more than `limit` GiB, with settings that fit."""
    from customized_grpo.tracking.console import Display
    from customized_grpo.training.dry_run import dry_run
    from customized_grpo.training.estimate import Estimate
    from customized_grpo.training.fit import GIB, Fit, fits, fitted, roomier

    display, whose = Display(), "" if count == 1 else f" of each of {count} processes"
    found = dry_run(config, count)
    display.table(f"one iteration, and what it needs{whose}", found.rows())
    if limit is None:
        return

    def again(changed: Config) -> Estimate:
        return dry_run(changed, count)

    def show(fit: Fit) -> None:
        peak = fit.estimate.peak_bytes / GIB
        display.note(f"{peak:.1f} GiB, in the {fit.estimate.peak_phase}, with {fit.options}")

    if fits(found, limit):
        less = roomier(config, limit, again, show)
        if less is not None:
            display.note(f"there is room to recompute less: {less.options} fits too, and is faster")
        return
    fit = fitted(config, limit, again, show)
    takes = f"--gpu_memory {limit:g}: an iteration takes {found.peak_bytes / GIB:.1f} GiB, in the {found.peak_phase}"
    if fit is not None:
        raise UserError(
            f"{takes}, and a tenth is left free; it takes {fit.estimate.peak_bytes / GIB:.1f} GiB with {fit.options}"
        )
    smaller = (
        "make policy.pipeline.height, width or reference_side smaller, put rewards on another device "
        "(rewards.NAME.local.device), quantize with policy.pipeline.quantization, or take a smaller model"
        if config.policy.kind in PIPELINES
        else "give more"
    )
    raise UserError(f"{takes}, and no setting that is tried here brings it under; {smaller}")


TRAIN = Command(
    "train", "tune a generator", build_parser, run, "; `train --resume` goes on from the last checkpoint"
)  # fmt: skip
