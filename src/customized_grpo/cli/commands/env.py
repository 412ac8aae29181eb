"""`customized-grpo env`: versions and hardware, for a bug report."""

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.parser import Parser


def build_parser() -> Parser:
    """Return the parser of `env`, which takes no options."""
    return Parser(description="Versions and hardware, for a bug report.")


def run(options: Namespace) -> None:
    """Print the versions of the package and its libraries, and the hardware."""
    from customized_grpo.runtime.environment import describe

    for name, value in describe().items():
        print(f"{name}: {value}")


ENV = Command("env", "versions and hardware", build_parser, run)
