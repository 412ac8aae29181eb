"""`customized-grpo export`: write the adapter of a checkpoint."""

from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.options import print_path
from customized_grpo.cli.parser import Parser
from customized_grpo.errors import UserError


def build_parser() -> Parser:
    """Return the parser of `export`."""
    export = Parser(
        description="Write the adapter of a checkpoint as `train` writes a finished run's. Diffusers loads the folder "
        "with pipe.load_lora_weights(OUT), and generate, evaluate and train --init_from take it as a run's.",
    )
    export.add_argument("source", type=Path, help="checkpoint RUN/checkpoints/000020, or the folder of a finished run")
    export.add_argument("out", type=Path, help="folder to write; new or empty")
    export.add_argument("--ema", action="store_true", help="write the averaged weights, of a run with ema.decay")
    export.add_argument("--best", action="store_true", help="write the adapter of a run's best validation")
    export.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="then upload OUT to this model on the hub; config.yaml names your data's folders",
    )
    export.add_argument("--public", action="store_true", help="with --push: a new model there is public, not private")
    return export


def run(options: Namespace) -> None:
    """Write the adapter, and print its folder; upload it where that was asked for, and print its address."""
    from customized_grpo.training.export import export

    if options.public and options.push is None:
        raise UserError("--public: only with --push; leave it out")
    if options.push is not None:
        from customized_grpo.io.hub import check_upload, upload

        check_upload(options.push, "--push")
    folder = export(options.source, options.out, ema=options.ema, best=options.best)
    print_path("adapter", folder)
    if options.push is not None:
        print_path("model", upload(folder, options.push, "--push", public=options.public))


EXPORT = Command("export", "write the adapter of a checkpoint", build_parser, run)
