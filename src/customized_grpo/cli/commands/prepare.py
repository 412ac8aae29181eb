"""`customized-grpo prepare`: make a data folder from data in another layout."""

from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.parser import Parser
from customized_grpo.errors import UserError

FORMATS = ("auto", "folders", "dreambench", "manifest", "syncd", "huggingface")


def build_parser() -> Parser:
    """Return the parser of `prepare`."""
    prepare = Parser(
        description="Make a data folder of subject folders with a prompts.txt, of DreamBench, SynCD, UNO's lists, or a "
        "Hugging Face dataset on disk. Pictures are turned upright, laid on white, converted to sRGB, and scaled down "
        "where large.",
    )
    prepare.add_argument("src", type=Path, help="folder to read")
    prepare.add_argument("out", type=Path | None, nargs="?", help="data folder to write; new or empty")
    prepare.add_argument("--format", choices=FORMATS, default="auto", help="layout of SRC")
    prepare.add_argument(
        "--references", choices=("first", "all"), default="first", help="pictures of a subject that become references"
    )
    prepare.add_argument("--max_side", type=int, default=1024, help="larger pictures are scaled down to it, in pixels")
    prepare.add_argument("--segment", action="store_true", help="make the masks that are missing (needs rembg)")
    prepare.add_argument("--check", action="store_true", help="list every problem, and write nothing")
    prepare.add_argument("--max_bad", type=int, default=0, help="leave out up to so many unusable entries")
    for name in ("prompt", "reference"):
        help_ = f"huggingface: the column with the {name}, where it has another name than the usual ones"
        prepare.add_argument(f"--{name}_column", type=str | None, help=help_)
    prepare.add_argument("--split", type=str | None, help="huggingface: the split to read; default: all")
    return prepare


def run(options: Namespace) -> None:
    """Write the data folder, or only check its source, and print what was found."""
    from customized_grpo.data.prepare import Options, prepare
    from customized_grpo.tracking.console import Display

    settings = Options(**{name: options[name] for name in Options.__dataclass_fields__})
    if (options.out is None) != options.check:
        raise UserError("prepare: name the folder to write after SRC, or pass --check to write nothing")
    display = Display()
    with display.stages() as stages:
        outcome = prepare(
            options.src, options.out, settings, lambda done, of: stages.update("checking pictures", done, of)
        )
    for problem in outcome.problems:
        display.warn(f"left out: {problem.place}: {problem.text}")
    done = "could be written" if options.check else f"written to {options.out}"
    print(f"{outcome.format}: {outcome.samples} samples of {outcome.pictures} pictures {done}")


PREPARE = Command("prepare", "make a data folder of data as others lay it out", build_parser, run)
