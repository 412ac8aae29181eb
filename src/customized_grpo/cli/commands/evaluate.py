"""`customized-grpo evaluate`: a run's base against its tuned generator, or a benchmark."""

from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.benchmark.config import BenchmarkConfig
from customized_grpo.cli.command import Command
from customized_grpo.cli.options import changed_settings, print_path, validate_settings
from customized_grpo.cli.parser import Parser
from customized_grpo.errors import UserError

OF_A_RUN = ("run", "num_samples", "best", "height", "width")
"""Options of --run."""


def build_parser() -> Parser:
    """Return the parser of `evaluate`: every field of `BenchmarkConfig`, and the options of --run."""
    evaluate = Parser(
        usage="customized-grpo evaluate (--run DIR | --benchmark NAME --data DIR) [--any.field VALUE ...]",
        description="Compare a run's tuned generator with its base on a data folder and renew the report; or draw and "
        "measure a benchmark.",
    )
    evaluate.add_config(BenchmarkConfig)
    evaluate.add_argument("--run", type=Path | None, help="folder of a run (the --output of train): base against tuned")
    evaluate.add_argument(
        "--num_samples",
        type=int | None,
        help="with --run: samples to evaluate, from the first; default: the run's evaluation.num_test_samples",
    )
    evaluate.add_argument("--best", action="store_true", help="with --run: the adapter of its best validation")
    for name in ("height", "width"):
        help_ = f"with --run: {name} in pixels, a multiple of 16, not of ToyBox; default: the run's"
        evaluate.add_argument(f"--{name}", type=int | None, help=help_)
    evaluate.add_argument("--num_processes", type=int, default=1, help="processes on this machine, a GPU each")
    flags = ("ema", "hpsv3_as_published")
    evaluate.add_fields(BenchmarkConfig, skip=flags)
    for name in flags:
        evaluate.add_argument(f"--{name}", action="store_true", help=BenchmarkConfig.model_fields[name].description)
    return evaluate


def run(options: Namespace) -> None:
    """Evaluate a run if --run names one, else a benchmark, and print what was written."""
    config = validate_settings(BenchmarkConfig, options, *OF_A_RUN, "num_processes")
    if options.run is not None:
        _evaluate_run(config, options)
        return
    if config.benchmark is None and config.images is None:
        raise UserError(
            "evaluate: name a run with --run DIR, or a benchmark with --benchmark dreambench --data DIR (and --adapter "
            "RUN, --policy.kind KIND, or --images DIR)"
        )
    for name in OF_A_RUN[1:]:
        if options[name]:
            raise UserError(f"--{name}: only with --run; leave it out")
    from customized_grpo.benchmark.command import run_benchmark
    from customized_grpo.tracking.console import Display

    print_path("benchmark", run_benchmark(config, Display()))


def _evaluate_run(config: BenchmarkConfig, options: Namespace) -> None:
    if given := changed_settings(config.model_copy(update={"data": None, "ema": False})):
        raise UserError(f"evaluate: --run compares a run with its base; {given} belongs to --benchmark")
    from customized_grpo.tracking.console import Display
    from customized_grpo.training.run import evaluate_run

    path = evaluate_run(
        options.run, config.data, options.num_samples, Display(), ema=config.ema, best=options.best,
        size=(options.height, options.width),
    )  # fmt: skip
    print_path("report" if path and path.is_file() else "evaluation", path)


EVALUATE = Command(
    "evaluate", "base against tuned, or a benchmark", build_parser, run,
    "; of a benchmark, the same command goes on with the pictures that are left",
)  # fmt: skip
