"""What the command line takes: its commands, their options and help. Nothing here loads torch."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from customized_grpo import __version__
from customized_grpo.benchmark.config import BenchmarkConfig
from customized_grpo.compare.config import CompareConfig
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError


class BadArguments(Exception):
    """The arguments, or a configuration file they name, are wrong."""


class Parser(ArgumentParser):
    """Takes options by their whole names alone, and leaves the wording of errors to `main`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self.commands: dict[str, Parser] = {}

    def command_of(self, arguments: Sequence[str]) -> tuple[list[str], "Parser"]:
        """The words of `arguments` that name a command, and its parser."""
        if not arguments or arguments[0] not in self.commands:
            return [], self
        words, command = self.commands[arguments[0]].command_of(arguments[1:])
        return [arguments[0], *words], command

    def options(self) -> list[str]:
        """Names of all options."""
        return re.findall(r"^  --([\w.]+)", self.format_help(), re.MULTILINE)

    def underscored(self, arguments: Sequence[str]) -> list[str]:
        """Rewrite --max-bad as --max_bad: the names of this command's options, no value, and nothing after `--`."""
        end = arguments.index("--") if "--" in arguments else len(arguments)
        dashed = [argument for argument in arguments[:end] if "-" in argument.partition("=")[0].removeprefix("--")]
        known = {f"--{name}" for name in self.options()} if dashed else set()
        rewritten = []
        for argument in arguments[:end]:
            name, equals, value = argument.partition("=")
            plain = "--" + name.removeprefix("--").replace("-", "_")
            rewritten.append(plain + equals + value if name.startswith("--") and plain in known else argument)
        return [*rewritten, *arguments[end:]]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise BadArguments(message) from ex


class _FileOnly(argparse.Action):
    """A setting that a configuration file for `train` has, which is no option here."""

    def __call__(self, *arguments: object) -> NoReturn:
        raise UserError("--output: diagnose writes to --out DIR; leave it out")


def build_parser() -> Parser:
    """The parser of all commands. Raises `BadArguments` when it parses wrong ones."""
    parser = Parser(
        prog="customized-grpo", description="Online RL for subject-driven image generators.", version=__version__
    )
    commands = parser.add_subcommands(required=True, title="commands")
    commands.add_subcommand("train", _train_parser(), help="tune a generator")

    commands.add_subcommand("evaluate", _evaluate_parser(), help="base against tuned, or a benchmark")

    commands.add_subcommand("generate", _generate_parser(), help="draw pictures with a tuned generator")

    commands.add_subcommand("compare", _compare_parser(), help="run presets x seeds and compare them")
    commands.add_subcommand("diagnose", _diagnose_parser(), help="measure conflict, and when rewards are decided")
    figures = Parser(description="Draw figures anew, of a comparison's table or a diagnosis' record.")
    figures.add_argument("--csv", type=Path | None, help="a comparison.csv that compare wrote")
    figures.add_argument("--diagnosis", type=Path | None, help="a diagnosis.json that diagnose wrote")
    figures.add_argument("--output", type=Path, required=True, help="folder for the SVG and PNG files")
    commands.add_subcommand("figures", figures, help="draw the figures of a comparison or diagnosis anew")

    commands.add_subcommand("prepare", _prepare_parser(), help="make a data folder of data as others lay it out")
    commands.add_subcommand("serve-reward", _serve_parser(), help="serve a reward to trainers on other machines")

    commands.add_subcommand("export", _export_parser(), help="write the adapter of a checkpoint")
    cache = Parser(
        description="Show the size of the folder of encoded prompts and references (policy.pipeline.cache), or "
        "empty it. Nothing is removed while a run uses the folder."
    )
    cache.add_argument(
        "--folder", type=Path, default=PolicyConfig().pipeline.cache, help="the folder; %(default)s if left out"
    )
    cache.add_argument("--clear", action="store_true", help="remove all that is encoded; runs encode it again")
    commands.add_subcommand("cache", cache, help="size of the encoded prompts and references, and how to clear them")

    report = Parser(description="Write a run's report.html anew.")
    report.add_argument("--run", type=Path, required=True, help="folder of the run (the --output of train)")
    commands.add_subcommand("report", report, help="write a run's report anew")

    commands.add_subcommand(
        "env", Parser(description="Versions and hardware, for a bug report."), help="versions and hardware"
    )
    toybox = Parser(description="ToyBox, a small complete subject-driven world.")
    commands.add_subcommand("toybox", toybox, help="the CPU-scale subject world")
    _add_toybox_actions(toybox)
    parser.commands = commands.choices
    return parser


def _train_parser() -> ArgumentParser:
    train = Parser(
        usage="customized-grpo train --config FILE [--resume | --resume_from DIR | --overwrite] "
        "[--output DIR] [--any.field VALUE ...]",
        description="Tune a subject-driven generator with GRPO, SARS and TDW.",
    )
    train.add_argument("--config", action="config", help="YAML file of settings; options given after it override it")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    train.add_argument("--resume_from", type=Path | None, help="go on from this checkpoint: RUN/checkpoints/000020")
    train.add_argument(
        "--init_from", type=str | None, help="start from the values of an adapter: stands for --policy.init_from"
    )
    train.add_argument("--overwrite", action="store_true", help="delete the run in the output folder and start anew")
    train.add_argument(
        "--dry_run", action="store_true", help="say what an iteration takes (parameters, operations, memory), and stop"
    )
    train.add_argument("--num_processes", type=int, default=1, help="processes on this machine, a GPU each")
    train.add_class_arguments(Config)
    return train


def _evaluate_parser() -> ArgumentParser:
    evaluate = Parser(
        usage="customized-grpo evaluate (--run DIR | --benchmark NAME --data DIR) [--any.field VALUE ...]",
        description="Compare a run's tuned generator with its base on a data folder and renew the report; or draw and "
        "measure a benchmark.",
    )
    evaluate.add_argument("--config", action="config", help="YAML file of settings; options given after it override it")
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


def _generate_parser() -> ArgumentParser:
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


def _export_parser() -> ArgumentParser:
    export = Parser(
        description="Write the adapter of a checkpoint as `train` writes a finished run's. Diffusers loads the folder "
        "with pipe.load_lora_weights(OUT), and generate, evaluate and train --init_from take it as a run's.",
    )
    export.add_argument("source", type=Path, help="checkpoint RUN/checkpoints/000020, or the folder of a finished run")
    export.add_argument("out", type=Path, help="folder to write; new or empty")
    export.add_argument("--ema", action="store_true", help="write the averaged weights, of a run with ema.decay")
    return export


def _diagnose_parser() -> ArgumentParser:
    diagnose = Parser(
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
    diagnose.add_argument(
        "--output", action=_FileOnly, default=Config.model_fields["output"].default, help=argparse.SUPPRESS
    )
    diagnose.add_class_arguments(Config, skip={"output"})
    return diagnose


def _prepare_parser() -> ArgumentParser:
    prepare = Parser(
        description="Make a data folder of subject folders with a prompts.txt, of DreamBench, SynCD, UNO's lists, or a "
        "Hugging Face dataset on disk. Pictures are turned upright, laid on white, converted to sRGB, and scaled down "
        "where large.",
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
    serve = Parser(
        description="Serve a reward over HTTP; a trainer reaches it by rewards.prompt (or identity) = remote and the "
        "URL in rewards.remote.prompt_url (or identity_url). With the environment variable "
        "CUSTOMIZED_GRPO_REWARD_TOKEN set on both sides, "
        "requests without that token are refused; needed wherever other machines reach the server.",
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
    serve.add_argument(
        "--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0 for all, with a token"
    )
    serve.add_argument("--port", type=int, default=8321, help="port to listen on; 0 for a free one")
    serve.add_argument("--max_images", type=int, default=256, help="most images in a request")
    serve.add_argument(
        "--max_pixels", type=int, default=2**27, help="most pixels in a request, of images, references and masks"
    )
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
    compare = Parser(
        usage="customized-grpo compare --config FILE [--report_only] [--jobs N] [--any.field VALUE ...]",
        description="Run a grid of presets x seeds, a process each, and compare them; goes on where it stopped.",
    )
    compare.add_argument("--config", action="config", help="YAML file of settings; options given after it override it")
    compare.add_argument("--report_only", action="store_true", help="run nothing; write the page of what is done")
    compare.add_class_arguments(CompareConfig)
    return compare


def _add_toybox_actions(toybox: Parser) -> None:
    actions = toybox.add_subcommands(required=True, title="actions")
    export = Parser(description="Write prompts, references and masks of ToyBox as a data folder.")
    export.add_argument("folder", type=Path, help="folder to write; new or empty")
    export.add_argument(
        "--split", choices=("train", "validation", "test"), default="train", help="identities to draw from"
    )
    export.add_argument("--count", type=int, default=256, help="number of prompts")
    export.add_argument("--seed", type=int, default=0, help="seed of the draw")
    actions.add_subcommand("export", export, help="write a data folder")
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
    actions.add_subcommand("pretrain", pretrain, help="make the shipped weights again")
    toybox.commands = actions.choices
