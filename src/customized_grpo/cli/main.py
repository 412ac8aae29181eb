"""The command line. torch is loaded by the commands that need it, not by --help."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from jsonargparse import Namespace
from pydantic import ValidationError

from customized_grpo.benchmark.config import BenchmarkConfig
from customized_grpo.cli.parser import BadArguments, build_parser
from customized_grpo.compare.config import CompareConfig
from customized_grpo.config.files import check_file
from customized_grpo.config.messages import format_parser_error, format_validation_error, values_of
from customized_grpo.config.run import Config, flatten
from customized_grpo.config.section import Section
from customized_grpo.distributed.launch import is_launched, launch
from customized_grpo.errors import TrainingError, UserError, first_line
from customized_grpo.runtime.memory import is_out_of_memory

SectionT = TypeVar("SectionT", bound=Section)
DIAGNOSE = ("prompts", "group_size", "batches")
USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130
SETTINGS: dict[str, type[Section]] = {
    "train": Config, "diagnose": Config, "compare": CompareConfig, "evaluate": BenchmarkConfig,
}  # fmt: skip
"""Whose fields a command takes as options, and in the file of --config."""
RESUME_HINTS = {
    "train": "; `train --resume` goes on from the last checkpoint",
    "evaluate": "; of a benchmark, the same command goes on with the pictures that are left",
    "compare": "; the same command goes on: finished runs are kept, the others go on from their last checkpoint",
}
"""What an interrupted command says, beyond that it was."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, or 2 on bad input, 1 when training cannot go on, 130 when interrupted."""
    # Read by OpenMP when torch is loaded. Threads that spin while they wait slow ToyBox several times beside a busy
    # process, such as a browser; those that sleep cost a tenth on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        arguments = ["--help"]
    try:
        parser = build_parser()
        arguments = parser.command_of(arguments)[1].underscored(arguments)
        _check_files(arguments)
        options = parser.parse_args(arguments)
        chosen = options[options.subcommand]
        count = chosen.get("num_processes", 1)
        if not is_launched(count) and not chosen.get("dry_run"):
            raise SystemExit(launch(arguments, count))
        _run(options)
    except BadArguments as error:
        words, command = parser.command_of(arguments)
        told = format_parser_error(str(error), arguments, SETTINGS.get(arguments[0], Section), command.options())
        _fail(f"{told}\nSee {' '.join([parser.prog, *words])} --help for all options.")
    except UserError as error:
        _fail(str(error))
    except TrainingError as error:
        _fail(str(error), FAILURE)
    except OSError as error:
        _fail(f"{error.filename or 'input'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(
            f"out of memory ({first_line(error)}). Smaller micro-batches or images, or another device, need less",
            FAILURE,
        )
    except KeyboardInterrupt:
        _fail(f"interrupted{RESUME_HINTS.get(arguments[0], '')}", INTERRUPTED)


def _run(options: Namespace) -> None:
    command = options.subcommand
    chosen = options[command]
    if command == "train":
        _train(chosen)
    elif command == "compare":
        _compare(chosen)
    elif command == "diagnose":
        _diagnose(chosen)
    elif command == "figures":
        _figures(chosen)
    elif command == "evaluate":
        _evaluate(chosen)
    elif command == "generate":
        from customized_grpo.generate import Options, generate

        print(generate(Options(**{name: chosen[name] for name in Options.__dataclass_fields__})))
    elif command == "export":
        from customized_grpo.training.export import export

        print(f"adapter: {export(chosen.source, chosen.out, ema=chosen.ema)}")
    elif command == "report":
        from customized_grpo.report import write_report

        print(f"report: {write_report(chosen.run)}")
    elif command == "prepare":
        _prepare(chosen)
    elif command == "serve-reward":
        _serve_reward(chosen)
    elif command == "cache":
        _cache(chosen.folder, clear=chosen.clear)
    elif command == "env":
        from customized_grpo.runtime.environment import describe

        for name, value in describe().items():
            print(f"{name}: {value}")
    else:
        _toybox(chosen)


def _check_files(arguments: Sequence[str]) -> None:
    """Each by itself, before all are merged: afterwards nothing tells where a setting came from."""
    if arguments[0] not in SETTINGS:
        return
    for path in values_of("config", arguments):
        check_file(Path(path), SETTINGS[arguments[0]])


def _settings(model: type[SectionT], options: Namespace, *flags: str) -> SectionT:
    """The options as a configuration; `flags` are those that are not part of it."""
    settings = {key: value for key, value in options.as_dict().items() if key not in ("config", *flags)}
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise UserError(format_validation_error(error)) from error


def _compare(options: Namespace) -> None:
    config = _settings(CompareConfig, options, "report_only")
    from customized_grpo.compare.command import GridError, compare
    from customized_grpo.tracking.console import Display

    try:
        page = compare(config, Display(), report_only=options.report_only)
    except GridError as error:
        _fail(str(error), FAILURE)
    print(f"comparison: {page}")


def _diagnose(options: Namespace) -> None:
    given = {name: options[name] for name in DIAGNOSE}
    if (options.run is None) == (not options.config):
        raise UserError("diagnose: name a trained run with --run DIR, or what to start from with --config FILE")
    config = _settings(Config, options, "run", "out", *DIAGNOSE)
    if options.run and (given_too := _differing(config)):
        raise UserError(f"diagnose: a run is measured with its own settings; leave out {given_too}, or give --config")
    from customized_grpo.diagnosis.command import diagnose
    from customized_grpo.tracking.console import Display

    out = options.out or (options.run / "diagnosis" if options.run else Path("diagnosis"))
    record = diagnose(None if options.run else config, out, Display(), run=options.run, **given)
    print(f"diagnosis: {record}")


def _evaluate(options: Namespace) -> None:
    config = _settings(BenchmarkConfig, options, "run", "num_samples", "num_processes")
    from customized_grpo.tracking.console import Display

    if options.run is not None:
        if given := _differing(config.model_copy(update={"data": None, "ema": False})):
            raise UserError(f"evaluate: --run compares a run with its base; {given} belongs to --benchmark")
        from customized_grpo.training.run import evaluate_run

        path = evaluate_run(options.run, config.data, options.num_samples, Display(), ema=config.ema)
        _print_path("report" if path and path.is_file() else "evaluation", path)
        return
    if config.benchmark is None and config.images is None:
        raise UserError(
            "evaluate: name a run with --run DIR, or a benchmark with --benchmark dreambench --data DIR (and --adapter "
            "RUN, --policy.kind KIND, or --images DIR)"
        )
    if options.num_samples is not None:
        raise UserError("--num_samples: only with --run; a benchmark is taken whole")
    from customized_grpo.benchmark.command import run_benchmark

    _print_path("benchmark", run_benchmark(config, Display()))


def _print_path(what: str, path: Path | None) -> None:
    """What was written; of several processes only the first writes."""
    if path is not None:
        print(f"{what}: {path}")


def _differing(config: Section) -> str:
    """Names of the fields that are not as they are left out."""
    usual = flatten(type(config)().model_dump())
    return ", ".join(name for name, value in flatten(config.model_dump()).items() if value != usual.get(name))


def _figures(options: Namespace) -> None:
    if (options.csv is None) == (options.diagnosis is None):
        raise UserError("figures: name the table of a comparison with --csv, or a diagnosis.json with --diagnosis")
    if options.csv is not None:
        from customized_grpo.compare.command import figures

        print(f"figures: {figures(options.csv, options.output)}")
    else:
        from customized_grpo.diagnosis.figure import redraw

        print(f"figures: {redraw(options.diagnosis, options.output)}")


def _train(options: Namespace) -> None:
    if options.init_from is not None:
        if options.policy.init_from not in (None, options.init_from):
            raise UserError("--init_from stands for --policy.init_from, and they name two adapters; give one of them")
        options.policy.init_from = options.init_from
    flags = ("resume", "resume_from", "overwrite", "init_from", "dry_run", "num_processes")
    config = _settings(Config, options, *flags)
    from customized_grpo.tracking.console import Display

    if options.dry_run:
        from customized_grpo.training.dry_run import dry_run

        count = options.num_processes
        whose = "" if count == 1 else f" of each of {count} processes"
        Display().table(f"one iteration, and what it needs{whose}", dry_run(config, count).rows())
        return
    from customized_grpo.training.run import train

    how = {name: options[name] for name in ("resume", "resume_from", "overwrite")}
    _print_path("report", train(config, Display(), **how))


def _prepare(options: Namespace) -> None:
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


def _cache(folder: Path, *, clear: bool) -> None:
    from customized_grpo.policies import cache_folder

    if not folder.is_dir():
        raise UserError(f"--folder: there is no folder {folder}; name the policy.pipeline.cache of your runs")
    if clear:
        count, size = cache_folder.clear(folder)
        print(f"{folder}: {count} files removed, {cache_folder.gigabytes(size)}")
    else:
        files = cache_folder.list_files(folder)
        print(f"{folder}: {len(files)} files, {cache_folder.gigabytes(sum(each.bytes for each in files))}")


def _serve_reward(options: Namespace) -> None:
    from customized_grpo.rewards.score_request import Limits
    from customized_grpo.rewards.server import serve

    local = {name: options[name] for name in ("device", "precision", "micro_batch")}
    settings = {"identity_reference": options.identity_reference, "local": local}
    parts = {"backbone": ("hpsv2", "hpsv3"), "instruction": ("hpsv3",)}
    for part, takers in parts.items():
        if options[part] is not None:
            if options.name not in takers:
                raise UserError(f"--{part}: only for {' or '.join(takers)}; leave it out")
            settings.setdefault(options.name, {})[part] = options[part]
    serve(
        options.name, options.model, settings, (options.host, options.port),
        Limits(options.max_images, options.max_pixels, options.max_bytes),
        on_ready=lambda text: print(text, flush=True),
    )  # fmt: skip


def _toybox(options: Namespace) -> None:
    action = options.subcommand
    chosen = options[action]
    if action == "export":
        from customized_grpo.toybox.export import export

        print(export(chosen.folder, chosen.split, chosen.count, chosen.seed))
        return
    from customized_grpo.toybox.pretrain import pretrain
    from customized_grpo.tracking.console import Display

    pretrain(chosen.output, chosen.seed, chosen.only, chosen.threads, Display())


def _fail(message: str, status: int = USAGE_ERROR) -> NoReturn:
    print(f"customized-grpo: error: {message}", file=sys.stderr)
    raise SystemExit(status)
