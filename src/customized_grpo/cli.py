"""The command line. torch is loaded by the commands that need it, not by --help."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from jsonargparse import ArgumentParser, Namespace
from pydantic import ValidationError

from customized_grpo import __version__
from customized_grpo.benchmark.config import BenchmarkConfig
from customized_grpo.compare.config import CompareConfig
from customized_grpo.config import Config, flatten
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.launch import is_launched, launch
from customized_grpo.messages import explain, worded
from customized_grpo.section import Section

SectionT = TypeVar("SectionT", bound=Section)
DIAGNOSE = ("prompts", "group_size", "batches")
USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130
SETTINGS: dict[str, type[Section]] = {"compare": CompareConfig, "evaluate": BenchmarkConfig}
"""Whose fields a command's options are, where they are not those of `train`."""
GOES_ON = {
    "train": "; `train --resume` goes on from the last checkpoint",
    "evaluate": "; of a benchmark, the same command goes on with the pictures that are left",
    "compare": "; the same command goes on: finished runs are kept, the others go on from their last checkpoint",
}
"""What an interrupted command says, beyond that it was."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, or 2 on bad input, 1 when training cannot go on, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        arguments = ["--help"]
    try:
        arguments = [_underscored(argument) for argument in arguments]
        options = _parser().parse_args(arguments)
        count = options[options.subcommand].get("num_processes", 1)
        if not is_launched(count):
            raise SystemExit(launch(arguments, count))
        _run(options)
    except _BadArguments as error:
        _fail(explain(str(error), arguments, SETTINGS.get(arguments[0], Config)))
    except UserError as error:
        _fail(str(error))
    except TrainingError as error:
        _fail(str(error), FAILURE)
    except OSError as error:
        _fail(f"{error.filename or 'input'}: {error.strerror or error}")
    except UnicodeDecodeError as error:
        _fail(f"a configuration file is not UTF-8 text ({error}); save it as UTF-8")
    except KeyboardInterrupt:
        _fail(f"interrupted{GOES_ON.get(arguments[0], '')}", INTERRUPTED)


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
        from customized_grpo.generate import generate

        asked = (chosen.run, chosen.reference, chosen.prompt, chosen.out, chosen.base, chosen.seed, chosen.count)
        print(generate(*asked, ema=chosen.ema))
    elif command == "report":
        from customized_grpo.report import write_report

        print(f"report: {write_report(chosen.run)}")
    elif command == "prepare":
        _prepare(chosen)
    elif command == "serve-reward":
        _serve_reward(chosen)
    elif command == "env":
        from customized_grpo.environment import describe

        for name, value in describe().items():
            print(f"{name}: {value}")
    else:
        _toybox(chosen)


def _settings(model: type[SectionT], options: Namespace, *flags: str) -> SectionT:
    """The options as a configuration; `flags` are those that are not part of it."""
    settings = {key: value for key, value in options.as_dict().items() if key not in ("config", *flags)}
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise UserError("; ".join(worded(each) for each in error.errors())) from error


def _compare(options: Namespace) -> None:
    config = _settings(CompareConfig, options, "report_only")
    from customized_grpo.compare.command import GridError, compare
    from customized_grpo.display import Display

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
    from customized_grpo.display import Display

    out = options.out or (options.run / "diagnosis" if options.run else Path("diagnosis"))
    record = diagnose(None if options.run else config, out, Display(), run=options.run, **given)
    print(f"diagnosis: {record}")


def _evaluate(options: Namespace) -> None:
    config = _settings(BenchmarkConfig, options, "run", "pairs", "num_processes")
    from customized_grpo.display import Display

    if options.run is not None:
        if given := _differing(config.model_copy(update={"data": None, "ema": False})):
            raise UserError(f"evaluate: --run compares a run with its base; {given} belongs to --benchmark")
        from customized_grpo.run import evaluate_run

        _tell("report", evaluate_run(options.run, config.data, options.pairs, Display(), ema=config.ema))
        return
    if config.benchmark is None and config.images is None:
        raise UserError(
            "evaluate: name a run with --run DIR, or a benchmark with --benchmark dreambench --data DIR (and --adapter "
            "RUN, --policy.kind KIND, or --images DIR)"
        )
    if options.pairs is not None:
        raise UserError("--pairs: only with --run; a benchmark is taken whole")
    from customized_grpo.benchmark.command import run_benchmark

    _tell("benchmark", run_benchmark(config, Display()))


def _tell(what: str, path: Path | None) -> None:
    """What was written; of several processes only the first writes."""
    if path is not None:
        print(f"{what}: {path}")


def _differing(config: Section) -> str:
    """Names of the fields that are not as they are left out."""
    usual = flatten(type(config)().model_dump())
    return ", ".join(name for name, value in flatten(config.model_dump()).items() if value != usual[name])


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
    config = _settings(Config, options, "resume", "resume_from", "overwrite", "dry_run", "num_processes")
    from customized_grpo.display import Display

    if options.dry_run:
        from customized_grpo import build

        Display().table("one iteration, and what it needs", build.dry_run(config).rows())
        return
    from customized_grpo.run import train

    how = {name: options[name] for name in ("resume", "resume_from", "overwrite")}
    _tell("report", train(config, Display(), **how))


def _prepare(options: Namespace) -> None:
    from customized_grpo.data.prepare import Options, prepare
    from customized_grpo.display import Display

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


def _serve_reward(options: Namespace) -> None:
    from customized_grpo.rewards.serve import serve

    settings = {name: options[name] for name in ("device", "precision", "micro_batch", "identity_reference")}
    parts = {"backbone": ("hpsv2", "hpsv3"), "instruction": ("hpsv3",)}
    for part, takers in parts.items():
        if options[part] is not None:
            if options.name not in takers:
                raise UserError(f"--{part}: only for {' or '.join(takers)}; leave it out")
            settings.setdefault(options.name, {})[part] = options[part]
    serve(
        options.name, options.model, settings, (options.host, options.port),
        max_images=options.max_images, max_bytes=options.max_bytes, on_ready=lambda text: print(text, flush=True),
    )  # fmt: skip


def _toybox(options: Namespace) -> None:
    action = options.subcommand
    chosen = options[action]
    if action == "export":
        from customized_grpo.toybox.export import export

        print(export(chosen.folder, chosen.split, chosen.count, chosen.seed))
        return
    from customized_grpo.display import Display
    from customized_grpo.toybox.pretrain import pretrain

    pretrain(chosen.output, chosen.seed, chosen.only, chosen.threads, Display())


def _underscored(argument: str) -> str:
    """--max-bad is --max_bad."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


class _BadArguments(Exception):
    """The arguments, or a configuration file they name, are wrong."""


class _Parser(ArgumentParser):
    """Leaves the wording of errors to `main`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _BadArguments(message) from ex


def _parser() -> ArgumentParser:
    parser = _Parser(
        prog="customized-grpo", description="Online RL for subject-driven image generators.", version=__version__
    )
    commands = parser.add_subcommands(required=True, title="commands")
    commands.add_subcommand("train", _train_parser(), help="tune a generator")

    commands.add_subcommand("evaluate", _evaluate_parser(), help="base against tuned, or a benchmark")

    generate = _Parser(description="Draw pictures with a tuned generator.")
    generate.add_argument("--run", type=Path, required=True, help="folder of the run (the --output of train)")
    generate.add_argument("--reference", type=Path, required=True, help="picture of the subject")
    generate.add_argument("--prompt", type=str, required=True, help="what to draw")
    generate.add_argument(
        "--out", type=Path, default=Path("out.png"), help="PNG file to write; %(default)s if left out"
    )
    generate.add_argument("--base", action="store_true", help="use the generator as it was before training")
    generate.add_argument("--ema", action="store_true", help="use the averaged weights, of a run with ema.decay")
    generate.add_argument("--seed", type=int, default=0, help="seed of the noise")
    generate.add_argument("--count", type=int, default=1, help="pictures, side by side")
    commands.add_subcommand("generate", generate, help="draw pictures with a tuned generator")

    commands.add_subcommand("compare", _compare_parser(), help="run presets x seeds and compare them")
    commands.add_subcommand("diagnose", _diagnose_parser(), help="measure conflict, and when rewards are decided")
    figures = _Parser(description="Draw figures anew, of a comparison's table or a diagnosis' record.")
    figures.add_argument("--csv", type=Path | None, help="a comparison.csv that compare wrote")
    figures.add_argument("--diagnosis", type=Path | None, help="a diagnosis.json that diagnose wrote")
    figures.add_argument("--output", type=Path, required=True, help="folder for the SVG and PNG files")
    commands.add_subcommand("figures", figures, help="draw the figures of a comparison or diagnosis anew")

    commands.add_subcommand("prepare", _prepare_parser(), help="make a data folder of data as others lay it out")
    commands.add_subcommand("serve-reward", _serve_parser(), help="serve a reward to trainers on other machines")

    report = _Parser(description="Write a run's report.html anew.")
    report.add_argument("--run", type=Path, required=True, help="folder of the run (the --output of train)")
    commands.add_subcommand("report", report, help="write a run's report anew")

    commands.add_subcommand(
        "env", _Parser(description="Versions and hardware, for a bug report."), help="versions and hardware"
    )
    toybox = _Parser(description="ToyBox, a small complete subject-driven world.")
    commands.add_subcommand("toybox", toybox, help="the CPU-scale subject world")
    _add_toybox_actions(toybox)
    return parser


def _train_parser() -> ArgumentParser:
    train = _Parser(
        usage="customized-grpo train --config FILE [--resume | --resume_from DIR | --overwrite] "
        "[--output DIR] [--any.field VALUE ...]",
        description="Tune a subject-driven generator with GRPO, SARS and TDW.",
    )
    train.add_argument("--config", action="config", help="YAML file of settings; options given after it override it")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    train.add_argument("--resume_from", type=Path | None, help="go on from this checkpoint: RUN/checkpoints/000020")
    train.add_argument("--overwrite", action="store_true", help="delete the run in the output folder and start anew")
    train.add_argument(
        "--dry_run", action="store_true", help="say what an iteration takes (parameters, operations, memory), and stop"
    )
    train.add_argument("--num_processes", type=int, default=1, help="processes on this machine, a GPU each")
    train.add_class_arguments(Config)
    return train


def _evaluate_parser() -> ArgumentParser:
    evaluate = _Parser(
        usage="customized-grpo evaluate (--run DIR | --benchmark NAME --data DIR) [--any.field VALUE ...]",
        description="Compare a run's tuned generator with its base on a data folder and renew the report; or draw and "
        "measure a benchmark.",
    )
    evaluate.add_argument("--config", action="config", help="YAML file of settings; options given after it override it")
    evaluate.add_argument("--run", type=Path | None, help="folder of a run (the --output of train): base against tuned")
    evaluate.add_argument(
        "--pairs", type=int | None, help="with --run: number of pairs, from the first; default: the run's test_pairs"
    )
    evaluate.add_argument("--num_processes", type=int, default=1, help="processes on this machine, a GPU each")
    flags = ("ema", "hpsv3_as_published")
    evaluate.add_class_arguments(BenchmarkConfig, skip=set(flags))
    for name in flags:
        evaluate.add_argument(f"--{name}", action="store_true", help=BenchmarkConfig.model_fields[name].description)
    return evaluate


def _diagnose_parser() -> ArgumentParser:
    diagnose = _Parser(
        usage="customized-grpo diagnose (--run DIR | --config FILE) [--out DIR] [--any.field VALUE ...]",
        description="Measure how the rewards' gradients conflict and at which denoising steps each reward is decided; "
        "writes calibrated time weights for train.",
    )
    diagnose.add_argument("--run", type=Path | None, help="folder of a trained run: its tuned generator is measured")
    diagnose.add_argument("--config", action="config", help="YAML file of settings of train: the base is measured")
    diagnose.add_argument("--out", type=Path | None, help="folder to write; default: RUN/diagnosis, or diagnosis")
    diagnose.add_argument("--prompts", type=int, default=24, help="prompts on which sensitivity is measured")
    diagnose.add_argument("--group_size", type=int, default=12, help="images branched off at a step, for each prompt")
    diagnose.add_argument("--batches", type=int, default=8, help="batches on which gradients are measured")
    diagnose.add_class_arguments(Config)
    return diagnose


def _prepare_parser() -> ArgumentParser:
    prepare = _Parser(
        description="Make a data folder of subject folders with a prompts.txt, of DreamBench, SynCD, UNO's lists, or a "
        "Hugging Face dataset on disk. Pictures are turned upright, laid on white, and scaled down where large.",
    )
    formats = ("auto", "folders", "dreambench", "manifest", "syncd", "huggingface")
    prepare.add_argument("src", type=Path, help="folder to read")
    prepare.add_argument("out", type=Path | None, nargs="?", help="data folder to write; new or empty")
    prepare.add_argument("--format", choices=formats, default="auto", help="layout of SRC")
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


def _serve_parser() -> ArgumentParser:
    serve = _Parser(
        description="Serve a reward over HTTP; a trainer reaches it by rewards.prompt (or identity) = remote and the "
        "URL in rewards.prompt_model. With the environment variable CUSTOMIZED_GRPO_REWARD_TOKEN set on both sides, "
        "requests without that token are refused.",
    )
    serve.add_argument(
        "name", type=str, help="hpsv3, hpsv2, dino, clip_i, clip_t, siglip, pickscore, or python:module.function"
    )
    serve.add_argument("--model", type=str | None, help="folder or hub id of the model; default: the usual one")
    serve.add_argument("--backbone", type=str | None, help="hpsv2, hpsv3: folder or hub id of its backbone")
    serve.add_argument("--instruction", type=Path | None, help="hpsv3: file with its text")
    serve.add_argument("--device", type=str, default="auto", help="where it runs: auto, cpu, cuda, cuda:1, mps")
    serve.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: hpsv3 in bf16 on CUDA, else fp32"
    )
    serve.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    serve.add_argument("--port", type=int, default=8321, help="port to listen on; 0 for a free one")
    serve.add_argument("--max_images", type=int, default=256, help="most images in a request")
    serve.add_argument("--max_bytes", type=int, default=512 * 2**20, help="largest request in bytes")
    serve.add_argument("--micro_batch", type=int, default=32, help="images that go through the encoder at once")
    serve.add_argument(
        "--identity_reference",
        choices=("whole", "segmented"),
        default="whole",
        help="dino, clip_i: cut the subject out",
    )
    return serve


def _compare_parser() -> ArgumentParser:
    compare = _Parser(
        usage="customized-grpo compare --config FILE [--report_only] [--jobs N] [--any.field VALUE ...]",
        description="Run a grid of presets x seeds, a process each, and compare them; goes on where it stopped.",
    )
    compare.add_argument("--config", action="config", help="YAML file of settings; options given after it override it")
    compare.add_argument("--report_only", action="store_true", help="run nothing; write the page of what is done")
    compare.add_class_arguments(CompareConfig)
    return compare


def _add_toybox_actions(toybox: ArgumentParser) -> None:
    actions = toybox.add_subcommands(required=True, title="actions")
    export = _Parser(description="Write prompts, references and masks of ToyBox as a data folder.")
    export.add_argument("folder", type=Path, help="folder to write; new or empty")
    export.add_argument(
        "--split", choices=("train", "validation", "test"), default="train", help="identities to draw from"
    )
    export.add_argument("--count", type=int, default=256, help="number of prompts")
    export.add_argument("--seed", type=int, default=0, help="seed of the draw")
    actions.add_subcommand("export", export, help="write a data folder")
    pretrain = _Parser(description="Make all shipped weights again from a seed (about an hour on two cores).")
    pretrain.add_argument("--output", type=Path, default=Path("toybox-weights"), help="folder to write")
    pretrain.add_argument("--seed", type=int, default=0, help="seed of everything")
    pretrain.add_argument(
        "--only",
        type=list[str] | None,
        help="make only these, as [name,name]: clean_generator, generator, identity_encoder_low, "
        "identity_encoder_medium, identity_encoder_high, prompt_encoder, judge",
    )
    pretrain.add_argument("--threads", type=int | None, help="CPU threads; default: all cores")
    actions.add_subcommand("pretrain", pretrain, help="make the shipped weights again")


def _fail(message: str, status: int = USAGE_ERROR) -> NoReturn:
    print(f"customized-grpo: error: {message}", file=sys.stderr)
    raise SystemExit(status)
