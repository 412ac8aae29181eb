"""The command line. torch is loaded by the commands that need it, not by --help."""

import os
import sys
from collections.abc import Sequence

from customized_grpo import __version__
from customized_grpo.cli.command import add_commands, find_command
from customized_grpo.cli.commands.cache import CACHE
from customized_grpo.cli.commands.compare import COMPARE
from customized_grpo.cli.commands.diagnose import DIAGNOSE
from customized_grpo.cli.commands.env import ENV
from customized_grpo.cli.commands.evaluate import EVALUATE
from customized_grpo.cli.commands.export import EXPORT
from customized_grpo.cli.commands.figures import FIGURES
from customized_grpo.cli.commands.generate import GENERATE
from customized_grpo.cli.commands.init import INIT
from customized_grpo.cli.commands.prepare import PREPARE
from customized_grpo.cli.commands.recipes import RECIPES
from customized_grpo.cli.commands.report import REPORT
from customized_grpo.cli.commands.serve_reward import SERVE_REWARD
from customized_grpo.cli.commands.toybox import TOYBOX
from customized_grpo.cli.commands.train import TRAIN
from customized_grpo.cli.options import FAILURE, INTERRUPTED, fail
from customized_grpo.cli.parser import BadArguments, Parser
from customized_grpo.config.messages import format_parser_error
from customized_grpo.config.section import Section
from customized_grpo.distributed.launch import is_launched, launch
from customized_grpo.errors import TrainingError, UserError, first_line
from customized_grpo.runtime.libraries import silence_imports
from customized_grpo.runtime.memory import is_out_of_memory

COMMANDS = (
    TRAIN, EVALUATE, GENERATE, COMPARE, DIAGNOSE, FIGURES, INIT, PREPARE, SERVE_REWARD, EXPORT, CACHE, REPORT, RECIPES,
    ENV, TOYBOX,
)  # fmt: skip
"""In the order of --help."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 0, 2 on bad input, 1 when training cannot go on, or 130 when interrupted."""
    # Read by OpenMP when torch is loaded. Threads that spin while they wait slow ToyBox several times beside a busy
    # process, such as a browser; those that sleep cost a tenth on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    silence_imports()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        arguments = ["--help"]
    parser = build_parser()
    words, chosen = parser.command_of(arguments)
    arguments = chosen.normalize_flags(arguments)
    try:
        _run(parser, chosen.resolve_configs(arguments))
    except BadArguments as error:
        message = format_parser_error(str(error), arguments, chosen.settings or Section, chosen.options())
        fail(f"{message}\nSee {' '.join([parser.prog, *words])} --help for all options.")
    except UserError as error:
        fail(str(error))
    except TrainingError as error:
        fail(str(error), FAILURE)
    except OSError as error:
        fail(f"{error.filename or 'input'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail(
            f"out of memory ({first_line(error)}). Smaller micro-batches or images, or another device, need less",
            FAILURE,
        )
    except KeyboardInterrupt:
        hints = [command.resume_hint for command in COMMANDS if command.name == arguments[0]]
        fail(f"interrupted{''.join(hints)}", INTERRUPTED)


def build_parser() -> Parser:
    """Return the parser of all commands. It raises `BadArguments` for wrong ones."""
    parser = Parser(
        prog="customized-grpo", description="Online RL for subject-driven image generators.", version=__version__
    )
    add_commands(parser, COMMANDS, "commands")
    return parser


def _run(parser: Parser, arguments: list[str]) -> None:
    """Run a command, in as many processes as --num_processes says."""
    parsed = parser.parse_args(arguments)
    command = find_command(COMMANDS, parsed.subcommand)
    options = parsed[command.name]
    count = options.get("num_processes", 1)
    if not is_launched(count) and not options.get("dry_run"):
        raise SystemExit(launch(arguments, count))
    command.run(options)
