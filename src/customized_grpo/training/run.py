"""The commands on a run: train it, evaluate it afterwards; and what its folder may be."""

from contextlib import ExitStack, nullcontext
from pathlib import Path

from customized_grpo.config.run import Config
from customized_grpo.distributed.group import DistributedGroup, init_distributed
from customized_grpo.distributed.termination import SignalHandler, Terminated
from customized_grpo.errors import UserError
from customized_grpo.evaluation.before_after import Side, write_evaluation
from customized_grpo.factory.config import check_shares, resolve_config
from customized_grpo.factory.data import (
    check_prompts,
    encode_ahead,
    load_dataset,
    read_dataset,
    read_samples,
    warn_truncated_prompts,
)
from customized_grpo.factory.metrics import build_evaluator, build_scorers
from customized_grpo.factory.policy import build_policy, build_start, policy_device, policy_with
from customized_grpo.factory.rewards import build_rewards, reward_loader
from customized_grpo.io.files import LOCK, locked, writing
from customized_grpo.io.jsonl import last_row
from customized_grpo.report import write_report
from customized_grpo.runtime.device import configure
from customized_grpo.tracking.console import Display
from customized_grpo.tracking.registry import load_trackers
from customized_grpo.training.checkpoint import list_checkpoints, read_manifest
from customized_grpo.training.loop import TrainingLoop
from customized_grpo.training.optimizer import check_optimizer
from customized_grpo.training.resume import pin
from customized_grpo.training.run_dir import (
    ANOTHER,
    CHECKPOINTS,
    LOGS,
    adapter_folder,
    best_iteration,
    check_output,
    check_start,
    delete_run,
    load_run_config,
    own,
)
from customized_grpo.training.trainer import Trainer


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
    config = resolve_config(config)
    termination = SignalHandler()
    with termination.listening():
        try:
            with init_distributed(termination, config.distributed.heartbeat_timeout) as ranks, ExitStack() as held:
                display = display if ranks.is_main_process else Display.silent()
                with ranks.synchronized():
                    check_output(config.output, resume=resume or resume_from is not None, overwrite=overwrite)
                    check_start(config, overwrite=overwrite)
                    if ranks.is_main_process and (config.output / LOCK).is_file():
                        with locked(config.output, ANOTHER):
                            pass  # found out now rather than when all is loaded
                    first = _first_iteration(config.output, resume=resume, resume_from=resume_from)
                    run = _training_loop(config, display, termination, ranks, first)
                fingerprint = pin(config, run.trainer.dataset, ranks)
                with ranks.synchronized():
                    if ranks.is_main_process:
                        held.enter_context(own(config.output, display))
                        if overwrite:
                            delete_run(config.output)
                run.start(fingerprint, resume=resume, resume_from=resume_from)
                run.loop()
                return run.finish()
        except Terminated:
            raise SystemExit(termination.status) from None


def _first_iteration(output: Path, *, resume: bool, resume_from: Path | None) -> int:
    """Return the earliest iteration from which a run may resume: all checkpoints but the oldest may prove damaged."""
    if resume_from is not None:
        return read_manifest(resume_from).iteration
    checkpoints = list_checkpoints(output / CHECKPOINTS) if resume else []
    return min((int(path.name) for path in checkpoints), default=0)


def _training_loop(
    config: Config, display: Display, termination: SignalHandler, ranks: DistributedGroup, first: int
) -> TrainingLoop:
    """Build and check all parts of a run that resumes at iteration `first` or later; nothing is written yet
    but what is encoded."""
    check_shares(config, ranks.world_size)
    if ranks.world_size > 1:
        display.note(f"{ranks.world_size} processes share {config.rollout.prompts_per_iteration} groups an iteration")
    # Cheapest first: what is wrong is told before the next part is paid for.
    trackers = load_trackers(config, display.warn)
    check_optimizer(config.optimizer, policy_device(config.policy))
    datasets = {
        name: read_dataset(path, config)
        for name, path in config.data.model_dump(include={"path", "validation", "test"}).items()
        if path is not None
    }
    loader = reward_loader(config)
    rewards = build_rewards(config, loader)
    scorers = build_scorers(config, rewards, loader)
    policy = build_start(config.policy, config.seed)
    for dataset in datasets.values():
        check_prompts(dataset.folder, dataset, policy)
    used = read_samples(config, datasets, first)
    _tell_what_selects(config, display)
    warn_truncated_prompts(config, policy, rewards, used, display)
    with display.stages() as stages, ranks.interruptible():
        encode_ahead(policy, used, stages)
    trainer = Trainer(config, policy, rewards, datasets["path"], ranks)
    validation = build_evaluator(config, policy, datasets.get("validation", datasets["path"]), scorers, ranks)
    test = build_evaluator(config, policy, datasets["test"], scorers, ranks) if "test" in datasets else None
    return TrainingLoop(config, trainer, validation, test, display, trackers, termination)


def _tell_what_selects(config: Config, display: Display) -> None:
    """Say where validations cannot tell what they are for."""
    if config.select is None:
        display.note(
            "evaluation.metrics: nothing held out is measured, so no adapter is kept as the best; name metrics that "
            "are no rewards (docs/metrics.md)"
        )
    elif config.data.validation is None:
        display.note(
            f"data.validation: none is named, so the best adapter by {config.select} is chosen on training samples"
        )


def _last_iteration(run: Path, config: Config) -> int:
    """Return the iteration of a finished run's adapter: it may have ended early, and an export has no log."""
    last = last_row(run / LOGS[0])
    return config.iterations if last is None else int(last["iteration"])


def evaluate_run(
    run: Path, data: Path | None, pairs: int | None, display: Display, *, ema: bool = False, best: bool = False,
    size: tuple[int | None, int | None] = (None, None),
) -> Path | None:  # fmt: skip
    """Evaluate a finished run's base and tuned generator on `data`, and write `evaluation/` and the report.

    `data` None: the run's test, validation or training data. With `ema`, the averaged weights are the tuned ones; with
    `best`, those of the best validation. `size`: height and width to draw in, None for the run's own. Returns the
    report's path, the path of `evaluation/` for an exported adapter, None in processes other than the first.
    """
    if pairs is not None and pairs < 1:
        raise UserError(f"--num_samples: {pairs} samples cannot be evaluated; give 1 or more")
    config = load_run_config(run)
    adapter = adapter_folder(run, ema=ema, best=best)
    config = config.model_copy(update={"policy": policy_with(config.policy, height=size[0], width=size[1])})
    configure(config.threads)
    path = data or config.data.test or config.data.validation or config.data.path
    pairs = pairs or config.evaluation.num_test_samples
    with init_distributed(SignalHandler(), config.distributed.heartbeat_timeout) as ranks:
        display = display if ranks.is_main_process else Display.silent()
        with ranks.synchronized():
            policy = build_policy(config.policy, config.seed)
            dataset = load_dataset(path, config, policy)
            policy.load_adapter(adapter)
            loader = reward_loader(config)
            rewards = build_rewards(config, loader)
            evaluator = build_evaluator(config, policy, dataset, build_scorers(config, rewards, loader), ranks)
            used = {dataset: dataset.samples[:pairs]}
            warn_truncated_prompts(config, policy, rewards, used, display)
            with display.stages() as stages:
                encode_ahead(policy, used, stages)
        with ranks.synchronized():
            last = best_iteration(run) if best else None
            last = _last_iteration(run, config) if last is None else last
            sides = {"best" if best else "tuned": Side(last, nullcontext)}
            results = write_evaluation(evaluator, pairs, sides, run / "evaluation", held_out=config.held_out)
            display.comparison(results)
            if not ranks.is_main_process:
                return None
            if not (run / LOGS[0]).is_file():  # of an exported adapter: it has no training to report
                return run / "evaluation"
            with writing(run):
                return write_report(run)
