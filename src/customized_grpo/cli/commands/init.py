"""`customized-grpo init`: a first run on one's own photographs."""

import sys
from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.parser import Parser
from customized_grpo.config.policy import PIPELINES
from customized_grpo.errors import UserError


def build_parser() -> Parser:
    """Return the parser of `init`."""
    init = Parser(
        description="Make a first run on your own photographs: data folders with prompts, settings that fit your GPU "
        "by the estimate, and the command that starts it. What is not given is asked for.",
    )
    init.add_argument("folder", type=Path, help="folder to write; new or empty")
    init.add_argument(
        "--pictures", type=Path | None,
        help="photographs of one subject, or a folder of them for each; NAME_mask.png is the mask of NAME",
    )  # fmt: skip
    init.add_argument(
        "--called", type=str | None, help="how prompts name the subject, with its article: 'a dog'; 'this item' leaves "
        "what it is to the pictures"
    )  # fmt: skip
    init.add_argument("--generator", choices=PIPELINES, default="flux2-klein", help="what to tune")
    init.add_argument("--gpu_memory", type=float | None, help="GiB of one GPU")
    init.add_argument("--segment", action="store_true", help="cut the subject out of each photograph (needs rembg)")
    return init


def run(options: Namespace) -> None:
    """Ask for what is missing, write the run, and print the next command."""
    from customized_grpo.runtime.libraries import silence_libraries
    from customized_grpo.tracking.console import Display
    from customized_grpo.training.first_run import Asked, make_first_run
    from customized_grpo.training.fit import Fit

    pictures = options.pictures or Path(_ask("--pictures", "Folder of photographs"))
    called = options.called or _ask("--called", "How do prompts name the subject, with its article (a dog, this item)?")
    memory = options.gpu_memory or _number("--gpu_memory", _ask("--gpu_memory", "GiB of the GPU's memory"))
    silence_libraries()
    display = Display()

    def show(fit: Fit) -> None:
        peak = fit.estimate.peak_bytes / 2**30
        display.note(
            f"estimate: {peak:.1f} GiB, in the {fit.estimate.peak_phase}{f', with {fit.options}' * bool(fit.changes)}"
        )

    asked = Asked(options.folder, pictures, called, options.generator, memory, options.segment)
    with display.stages() as stages:
        made = make_first_run(asked, stages.update, show)
    for problem in made.left_out:
        display.warn(f"left out: {problem.place}: {problem.text}")
    counts = ", ".join(f"{count} {split}" for split, count in made.samples.items())
    print(f"samples: {counts}, in {options.folder / 'data'}; read their prompts, and write your own")
    takes = f"an iteration takes {made.peak_gib:.1f} of {memory:g} GiB by the estimate"
    print(f"settings: {made.settings}, those of the recipe {made.recipe} for your data; {takes}")
    print(f"next: customized-grpo train --config {made.settings}")


def _ask(option: str, question: str) -> str:
    """Ask on the terminal. Raises `UserError`, naming the option, if no terminal is there."""
    if not sys.stdin.isatty():
        raise UserError(f"init: {option} is missing, and there is no terminal to ask on; give it")
    from rich.prompt import Prompt

    return str(Prompt.ask(question))


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{option}: '{text}' is no number; give GiB, as 24") from error


INIT = Command("init", "make a first run on your own photographs", build_parser, run)
