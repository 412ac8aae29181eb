"""`customized-grpo report`: write a run's report again."""

from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.options import print_path
from customized_grpo.cli.parser import Parser


def build_parser() -> Parser:
    """Return the parser of `report`."""
    report = Parser(description="Write a run's report.html again.")
    report.add_argument("--run", type=Path, required=True, help="folder of the run (the --output of train)")
    return report


def run(options: Namespace) -> None:
    """Write the report, and print its path."""
    from customized_grpo.report import write_report

    print_path("report", write_report(options.run))


REPORT = Command("report", "write a run's report again", build_parser, run)
