"""The commands on a run: train it, evaluate it afterwards; and what its folder may be."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from customized_grpo.config.messages import worded
from customized_grpo.config.run import Config
from customized_grpo.distributed.group import Ranks, started
from customized_grpo.distributed.termination import Terminated, Termination
from customized_grpo.errors import UserError
from customized_grpo.evaluation.before_after import write_evaluation
from customized_grpo.factory import config as build
from customized_grpo.io.files import LOCK, UNFINISHED, check_folder, locked, writing
from customized_grpo.report import write_report
from customized_grpo.report.records import read_lines
from customized_grpo.runtime.device import configure
from customized_grpo.tracking.console import Display
from customized_grpo.training.checkpoint import list_checkpoints, read_manifest
from customized_grpo.training.loop import CHECKPOINTS, EMA, LOGS, Session
from customized_grpo.training.trainer import Trainer

WRITTEN = (
    *LOGS,
    "weights.json",
    *(f"{name}{UNFINISHED}" for name in (*LOGS, "config.yaml", "weights.json")),
    "report.html",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    CHECKPOINTS,
    "diagnosis",
    EMA,
    "evaluation",
    "galleries",
    "tensorboard",
    "config.yaml",
)
"""What a run writes into its folder, and all that --overwrite deletes, in this order: a folder without a config.yaml is
not taken for a run's."""
ANOTHER = "another run"


def train(
    config: Config,
    display: Display,
    *,
    resume: bool = False,
    resume_from: Path | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Train as `config` says; returns the path of the report, None in processes other than the first. `resume_from`: go
    on from this checkpoint and no other.

    Raises `UserError` on bad input, before any work.
    """
    configure(config.threads)
    config = build.resolved(config)
    termination = Termination()
    with termination.listening():
        try:
            with started(termination, config.ranks.silence) as ranks, ExitStack() as held:
                display = display if ranks.first else Display.silent()
                with ranks.together():
                    _check_output(config.output, resume=resume or resume_from is not None, overwrite=overwrite)
                    _check_start(config, overwrite=overwrite)
                    if ranks.first and (config.output / LOCK).is_file():
                        with locked(config.output, ANOTHER):
                            pass  # found out now rather than when all is loaded
                    first = _first_iteration(config.output, resume=resume, resume_from=resume_from)
                    session = _session(config, display, termination, ranks, first)
                session.pin()
                with ranks.together():
                    if ranks.first:
                        held.enter_context(_own(config.output, display))
                        if overwrite:
                            _delete_run(config.output)
                session.start(resume=resume, resume_from=resume_from)
                session.loop()
                return session.finish()
        except Terminated:
            raise SystemExit(termination.status) from None


def _first_iteration(output: Path, *, resume: bool, resume_from: Path | None) -> int:
    """The earliest iteration that a run may go on from: newer checkpoints than the oldest may prove damaged."""
    if resume_from is not None:
        return read_manifest(resume_from).iteration
    checkpoints = list_checkpoints(output / CHECKPOINTS) if resume else []
    return min((int(path.name) for path in checkpoints), default=0)


def _session(config: Config, display: Display, termination: Termination, ranks: Ranks, first: int) -> Session:
    """All parts of a run that goes on from iteration `first` or later, built and checked; nothing is written yet but
    what is encoded."""
    build.check_shares(config, ranks.world)
    if ranks.world > 1:
        display.note(f"{ranks.world} processes share {config.rollout.prompts_per_iteration} groups an iteration")
    # Cheapest first: what is wrong is told before the next part is paid for.
    writer = _summary_writer() if config.log.tensorboard else None
    datasets = {
        name: build.read_dataset(path, config)
        for name, path in config.data.model_dump(include={"path", "validation", "test"}).items()
        if path is not None
    }
    rewards, judge = build.build_rewards(config), build.build_judge(config)
    policy = build.build_start(config.policy, config.seed)
    for dataset in datasets.values():
        build.check_prompts(dataset.folder, dataset, policy)
    used = build.read_samples(config, datasets, first)
    build.tell_long_prompts(config, policy, rewards, used, display)
    with display.stages() as stages, ranks.alone():
        build.encode_ahead(policy, used, stages)
    trainer = Trainer(config, policy, rewards, datasets["path"], ranks)
    return Session(config, trainer, datasets, display, judge, writer, termination)


def evaluate_run(
    run: Path, data: Path | None, pairs: int | None, display: Display, *, ema: bool = False
) -> Path | None:
    """Evaluate a finished run's base and tuned generator on `data` (default: the run's test, validation or training
    data), write `evaluation/` and the report; with `ema`, the averaged weights are the tuned ones. Returns the report's
    path, that of `evaluation/` for an exported adapter, None in processes other than the first."""
    if pairs is not None and pairs < 1:
        raise UserError(f"--pairs: {pairs} pairs cannot be evaluated; give 1 or more")
    config = load_run_config(run)
    adapter = adapter_folder(run, ema=ema)
    configure(config.threads)
    path = data or config.data.test or config.data.validation or config.data.path
    pairs = pairs or config.evaluation.test_pairs
    with started(Termination(), config.ranks.silence) as ranks:
        display = display if ranks.first else Display.silent()
        with ranks.together():
            policy = build.build_policy(config.policy, config.seed)
            dataset = build.open_dataset(path, config, policy)
            policy.load_adapter(adapter)
            rewards, judge = build.build_rewards(config), build.build_judge(config)
            used = {dataset: dataset.samples[:pairs]}
            build.tell_long_prompts(config, policy, rewards, used, display)
            with display.stages() as stages:
                build.encode_ahead(policy, used, stages)
        parts = (config, policy, dataset, rewards, judge, run / "evaluation", pairs, ranks)
        with ranks.together():
            display.comparison(write_evaluation(*parts))
            if not ranks.first:
                return None
            if not (run / LOGS[0]).is_file():  # of an exported adapter: it has no training to report
                return run / "evaluation"
            with writing(run):
                return write_report(run)


def adapter_folder(run: Path, *, ema: bool) -> Path:
    """Return where the run in the folder `run` has its adapter, or that of the averaged weights.

    Raises `UserError` where there is none, or only that of an earlier end, from which the run went on.
    """
    rows, last = read_lines(run / LOGS[0]), load_run_config(run).iterations
    if rows and rows[-1]["iteration"] < last:
        raise UserError(
            f"{run} is at iteration {rows[-1]['iteration']} of {last}, and its adapter is written in the end; go on "
            "with train --resume, or take a checkpoint with customized-grpo export"
        )
    if not ema:
        return run
    if not (run / EMA).is_dir():
        raise UserError(
            f"--ema: {run} holds no averaged weights (no folder {EMA}): train keeps them where ema.decay is set, "
            "and writes them when it ends. Leave --ema out for the trained ones"
        )
    return run / EMA


def finished_adapter(run: Path, option: str, instead: str, *, ema: bool) -> Path:
    """Return where the finished run in the folder `run` has its adapter, or that of the averaged weights.

    Raises `UserError` where the run is not finished: names the `option` that named the run, and what to do `instead`
    with its newest checkpoint.
    """
    checkpoints = list_checkpoints(run / CHECKPOINTS)
    if checkpoints and not any(run.glob("*.safetensors")):
        raise UserError(f"{option}: {run} is not finished, and has no adapter yet; {instead} {checkpoints[-1]}")
    return adapter_folder(run, ema=ema)


def load_run_config(run: Path) -> Config:
    """The configuration of the run in the folder `run`. Raises `UserError` where there is none, or a damaged one."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{run} is not the folder of a run: it has no config.yaml; name the --output of a train command"
        )
    try:
        return Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UserError(f"{path}: not the configuration that train wrote ({worded(error)}); restore it") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not the configuration that train wrote ({error}); restore it") from error


def _check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise UserError("--resume and --resume_from continue a run and --overwrite deletes it; pass one of them")
    passing = (LOCK, f"config.yaml{UNFINISHED}")
    check_folder(output, "output")
    if not output.exists() or not any(path.name not in passing for path in output.iterdir()):
        return
    if not (resume or overwrite):
        raise UserError(
            f"output: the folder {output} is not empty. Pass --resume to go on with the run in it, --overwrite to "
            "delete it and start anew, or another --output"
        )
    if not (output / "config.yaml").is_file():
        raise UserError(f"output: {output} holds other files than a run's (no config.yaml); name another folder")
    load_run_config(output)


def _check_start(config: Config, *, overwrite: bool) -> None:
    """Raise `UserError` where the run starts from one that is not finished, or from what --overwrite would delete."""
    start = config.policy.init_from
    if start is not None and (Path(start) / "config.yaml").is_file():
        adapter_folder(Path(start), ema=False)
    output = config.output.resolve()
    for field in ("init_from", "base_adapter", "model", "weights") if overwrite else ():
        named = getattr(config.policy, field)
        if named is not None and Path(named).exists() and Path(named).resolve().is_relative_to(output):
            raise UserError(
                f"policy.{field}: {named} lies in {config.output}, which --overwrite deletes; name another --output, "
                "or copy it elsewhere"
            )


@contextmanager
def _own(output: Path, display: Display) -> Iterator[None]:
    """Within it no other run writes into `output`, which is made if need be."""
    with ExitStack() as stack:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(locked(output, ANOTHER))
        if lock is None:
            display.warn(f"output: the disk of {output} has no locks: see that no other run writes into it")
        yield


def _delete_run(output: Path) -> None:
    """Delete what a run wrote into `output`, and nothing else."""
    with writing(output):
        for path in (output / name for name in WRITTEN):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("log.tensorboard needs TensorBoard: pip install 'customized-grpo[tensorboard]'") from error
    return SummaryWriter
