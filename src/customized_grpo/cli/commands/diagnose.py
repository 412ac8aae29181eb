"""`customized-grpo diagnose`: measure how the rewards conflict, and when each is decided."""

import argparse
from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.options import changed_settings, print_path, validate_settings
from customized_grpo.cli.parser import FileOnly, Parser
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError

SIZES = ("prompts", "group_size", "batches")
"""Options that say how much is measured."""


def build_parser() -> Parser:
    """Return the parser of `diagnose`: every field of `Config` but `output`, and SIZES."""
    diagnose = Parser(
        usage="customized-grpo diagnose (--run DIR | --config FILE) [--out DIR] [--any.field VALUE ...]",
        description="Measure how the rewards' gradients conflict and at which denoising steps each reward is decided; "
        "writes calibrated time weights for train.",
    )
    diagnose.add_argument("--run", type=Path | None, help="folder of a trained run: its tuned generator is measured")
    diagnose.add_config(Config, help="YAML file of settings of train, or the name of a recipe: the base is measured")
    diagnose.add_argument("--out", type=Path | None, help="folder to write; default: RUN/diagnosis, or diagnosis")
    diagnose.add_argument("--prompts", type=int, default=24, help="prompts on which sensitivity is measured")
    diagnose.add_argument("--group_size", type=int, default=12, help="images branched off at a step, for each prompt")
    diagnose.add_argument("--batches", type=int, default=8, help="batches on which gradients are measured")
    diagnose.add_argument(
        "--output", action=FileOnly, const="--output: diagnose writes to --out DIR; leave it out",
        default=Config.model_fields["output"].default, help=argparse.SUPPRESS,
    )  # fmt: skip
    diagnose.add_fields(Config, skip={"output"})
    return diagnose


def run(options: Namespace) -> None:
    """Measure a run or a configuration, and print the path of the record."""
    sizes = {name: options[name] for name in SIZES}
    if (options.run is None) == (not options.config):
        raise UserError("diagnose: name a trained run with --run DIR, or what to start from with --config FILE")
    config = validate_settings(Config, options, "run", "out", *SIZES)
    if options.run and (given := changed_settings(config)):
        raise UserError(f"diagnose: a run is measured with its own settings; leave out {given}, or give --config")
    from customized_grpo.diagnosis.command import diagnose
    from customized_grpo.tracking.console import Display

    out = options.out or (options.run / "diagnosis" if options.run else Path("diagnosis"))
    print_path("diagnosis", diagnose(None if options.run else config, out, Display(), run=options.run, **sizes))


DIAGNOSE = Command("diagnose", "measure conflict, and when rewards are decided", build_parser, run)
