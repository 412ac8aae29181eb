"""`customized-grpo toybox`: export ToyBox data, or make ToyBox's weights again."""

from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.cli.command import Command, find_command
from customized_grpo.cli.parser import Parser


def build_parser() -> Parser:
    """Return the parser of `toybox`, which ACTIONS complete."""
    return Parser(description="ToyBox, a small complete subject-driven world.")


def run(options: Namespace) -> None:
    """Run one of ACTIONS."""
    action = find_command(ACTIONS, options.subcommand)
    action.run(options[action.name])


def _build_export_parser() -> Parser:
    export = Parser(description="Write prompts, references and masks of ToyBox as a data folder.")
    export.add_argument("folder", type=Path, help="folder to write; new or empty")
    export.add_argument(
        "--split", choices=("train", "validation", "test"), default="train", help="identities to draw from"
    )
    export.add_argument("--count", type=int, default=256, help="number of prompts")
    export.add_argument("--seed", type=int, default=0, help="seed of the draw")
    return export


def _export(options: Namespace) -> None:
    from customized_grpo.toybox.export import export

    print(export(options.folder, options.split, options.count, options.seed))


def _build_pretrain_parser() -> Parser:
    pretrain = Parser(description="Make all shipped weights again from a seed (about an hour on two cores).")
    pretrain.add_argument("--output", type=Path, default=Path("toybox-weights"), help="folder to write")
    pretrain.add_argument("--seed", type=int, default=0, help="seed of everything")
    pretrain.add_argument(
        "--only",
        type=list[str] | None,
        help="make only these, as [name,name]: clean_generator, generator, identity_encoder_low, "
        "identity_encoder_medium, identity_encoder_high, prompt_encoder, judge",
    )
    pretrain.add_argument("--threads", type=int | None, help="CPU threads; default: all cores")
    return pretrain


def _pretrain(options: Namespace) -> None:
    from customized_grpo.toybox.pretrain import pretrain
    from customized_grpo.tracking.console import Display

    pretrain(options.output, options.seed, options.only, options.threads, Display())


ACTIONS = (
    Command("export", "write a data folder", _build_export_parser, _export),
    Command("pretrain", "make the shipped weights again", _build_pretrain_parser, _pretrain),
)
TOYBOX = Command("toybox", "the CPU-scale subject world", build_parser, run, actions=ACTIONS)
