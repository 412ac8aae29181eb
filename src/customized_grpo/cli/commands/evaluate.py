"""`customized-grpo evaluate`: a run's base against its tuned generator, or a benchmark."""

from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.benchmark.config import BenchmarkConfig
from customized_grpo.cli.command import Command
from customized_grpo.cli.options import changed_settings, print_path, validate_settings
from customized_grpo.cli.parser import Parser
from customized_grpo.errors import UserError


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
    evaluate.add_argument("--num_processes", type=int, default=1, help="processes on this machine, a GPU each")
    flags = ("ema", "hpsv3_as_published")
    evaluate.add_class_arguments(BenchmarkConfig, skip=set(flags))
    for name in flags:
        evaluate.add_argument(f"--{name}", action="store_true", help=BenchmarkConfig.model_fields[name].description)
    return evaluate


def run(options: Namespace) -> None:
    """Evaluate a run if --run names one, else a benchmark, and print what was written."""
    config = validate_settings(BenchmarkConfig, options, "run", "num_samples", "num_processes")
    if options.run is not None:
        _evaluate_run(config, options.run, options.num_samples)
        return
    if config.benchmark is None and config.images is None:
        raise UserError(
            "evaluate: name a run with --run DIR, or a benchmark with --benchmark dreambench --data DIR (and --adapter "
            "RUN, --policy.kind KIND, or --images DIR)"
        )
    if options.num_samples is not None:
        raise UserError("--num_samples: only with --run; a benchmark is taken whole")
    from customized_grpo.benchmark.command import run_benchmark
    from customized_grpo.tracking.console import Display

    print_path("benchmark", run_benchmark(config, Display()))


def _evaluate_run(config: BenchmarkConfig, folder: Path, num_samples: int | None) -> None:
    if given := changed_settings(config.model_copy(update={"data": None, "ema": False})):
        raise UserError(f"evaluate: --run compares a run with its base; {given} belongs to --benchmark")
    from customized_grpo.tracking.console import Display
    from customized_grpo.training.run import evaluate_run

    path = evaluate_run(folder, config.data, num_samples, Display(), ema=config.ema)
    print_path("report" if path and path.is_file() else "evaluation", path)


EVALUATE = Command(
    "evaluate", "base against tuned, or a benchmark", build_parser, run,
    "; of a benchmark, the same command goes on with the pictures that are left",
)  # fmt: skip
