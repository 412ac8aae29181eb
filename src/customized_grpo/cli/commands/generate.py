"""`customized-grpo generate`: draw pictures with a tuned generator."""

from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.parser import Parser


def build_parser() -> Parser:
    """Return the parser of `generate`: an option for each field of `generation.Options`."""
    generate = Parser(description="Draw pictures with a tuned generator.")
    generate.add_argument("--run", type=Path, required=True, help="folder of the run (the --output of train)")
    generate.add_argument(
        "--reference", type=Path, nargs="+", action="extend", required=True, help="picture of the subject, or several"
    )
    generate.add_argument("--prompt", type=str, required=True, help="what to draw")
    generate.add_argument(
        "--out", type=Path, default=Path("out.png"), help="PNG file to write; %(default)s if left out"
    )
    generate.add_argument("--base", action="store_true", help="use the generator as it was before training")
    generate.add_argument("--ema", action="store_true", help="use the averaged weights, of a run with ema.decay")
    generate.add_argument("--best", action="store_true", help="use the generator of the best validation")
    generate.add_argument(
        "--checkpoint", type=Path | None, help="use the generator as it was at RUN/checkpoints/000020"
    )
    generate.add_argument("--seed", type=int, default=0, help="seed of the noise")
    generate.add_argument("--count", type=int, default=1, help="pictures, side by side")
    generate.add_argument("--num_steps", type=int | None, help="denoising steps; default: the run's")
    generate.add_argument("--device", type=str | None, help="cpu, cuda, cuda:1, mps or auto; default: the run's")
    generate.add_argument("--precision", type=str | None, help="fp32, bf16 or auto; default: the run's")
    for name in ("height", "width"):
        help_ = f"{name} in pixels, a multiple of 16, not of ToyBox; default: the run's"
        generate.add_argument(f"--{name}", type=int | None, help=help_)
    return generate


def run(options: Namespace) -> None:
    """Draw, and print the path of the pictures."""
    from customized_grpo.generation import Options, write_pictures

    print(write_pictures(Options(**{name: options[name] for name in Options.__dataclass_fields__})))


GENERATE = Command("generate", "draw pictures with a tuned generator", build_parser, run)
