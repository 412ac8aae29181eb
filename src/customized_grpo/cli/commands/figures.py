"""`customized-grpo figures`: draw the figures of a comparison or a diagnosis again."""

from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.options import print_path
from customized_grpo.cli.parser import Parser
from customized_grpo.errors import UserError


def build_parser() -> Parser:
    """Return the parser of `figures`."""
    figures = Parser(description="Draw figures again, from a comparison's table or a diagnosis' record.")
    figures.add_argument("--csv", type=Path | None, help="a comparison.csv that compare wrote")
    figures.add_argument("--diagnosis", type=Path | None, help="a diagnosis.json that diagnose wrote")
    figures.add_argument("--output", type=Path, required=True, help="folder for the SVG and PNG files")
    return figures


def run(options: Namespace) -> None:
    """Draw the figures, and print their folder."""
    if (options.csv is None) == (options.diagnosis is None):
        raise UserError("figures: name the table of a comparison with --csv, or a diagnosis.json with --diagnosis")
    if options.csv is not None:
        from customized_grpo.compare.command import figures

        print_path("figures", figures(options.csv, options.output))
    else:
        from customized_grpo.diagnosis.figure import redraw

        print_path("figures", redraw(options.diagnosis, options.output))


FIGURES = Command("figures", "draw the figures of a comparison or diagnosis again", build_parser, run)
