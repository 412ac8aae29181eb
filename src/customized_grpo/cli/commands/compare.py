"""`customized-grpo compare`: run a grid of presets and seeds, and compare the runs."""

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.options import FAILURE, fail, print_path, validate_settings
from customized_grpo.cli.parser import Parser
from customized_grpo.compare.config import CompareConfig


def build_parser() -> Parser:
    """Return the parser of `compare`: every field of `CompareConfig`."""
    compare = Parser(
        usage="customized-grpo compare --config FILE [--report_only] [--jobs N] [--any.field VALUE ...]",
        description="Run a grid of presets x seeds, a process each, and compare them; goes on where it stopped.",
    )
    compare.add_config(CompareConfig)
    compare.add_argument("--report_only", action="store_true", help="run nothing; write the page of what is done")
    compare.add_fields(CompareConfig)
    return compare


def run(options: Namespace) -> None:
    """Run the grid, and print the path of the comparison; exit with status 1 if a run failed."""
    config = validate_settings(CompareConfig, options, "report_only")
    from customized_grpo.compare.command import GridError, compare
    from customized_grpo.tracking.console import Display

    try:
        page = compare(config, Display(), report_only=options.report_only)
    except GridError as error:
        fail(str(error), FAILURE)
    print_path("comparison", page)


COMPARE = Command(
    "compare", "run presets x seeds and compare them", build_parser, run,
    "; the same command goes on: finished runs are kept, the others go on from their last checkpoint",
)  # fmt: skip
