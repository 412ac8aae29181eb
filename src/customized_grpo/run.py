"""A training run: its folder, its loop, what it logs and what it leaves to look at."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from customized_grpo import build
from customized_grpo.checkpoint import DamagedCheckpoint, list_checkpoints, load_checkpoint, save_checkpoint
from customized_grpo.config import Config, flatten
from customized_grpo.data import SubjectDataset, fit, image_grid, save_image
from customized_grpo.display import Display, Training
from customized_grpo.errors import UserError
from customized_grpo.evaluation import Evaluation, chance_levels, evaluate
from customized_grpo.policies import Policy
from customized_grpo.report import write_report
from customized_grpo.rewards import Reward
from customized_grpo.runtime import configure
from customized_grpo.termination import STATUS, Terminated, Termination
from customized_grpo.toybox.judge import Judge
from customized_grpo.trainer import RATIO_TOLERANCE, Metrics, Trainer, TrainingError

LOGS = ("metrics.jsonl", "evaluations.jsonl")
UNFINISHED = "config.yaml.part"
GALLERY_SIDE, GALLERY_PADDING = 128, 4
"""Smaller pictures are shown enlarged by a whole factor; both in pixels."""
REPORTED_IMAGES = 24
WRITTEN = (
    *LOGS,
    "config.yaml",
    "weights.json",
    "report.html",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "checkpoints",
    "diagnosis",
    "evaluation",
    "galleries",
    "tensorboard",
)
"""What a run writes into its folder, and all that --overwrite deletes."""
MAY_CHANGE = (
    "output", "iterations", "threads", "policy.device", "policy.offload", "policy.gradient_checkpointing",
    "policy.cache", "data.validation", "data.test", "data.max_pixels", "rewards.max_invalid_share",
    "rewards.device", "rewards.micro_batch", "rollout.micro_batch", "optimizer.micro_batch", "checkpoint.",
    "evaluation.", "log.",
)  # fmt: skip
"""Fields in which a resumed run may differ from the one it resumes."""


def train(config: Config, display: Display, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train as `config` says; returns the path of the report. Raises `UserError` on bad input, before any work."""
    configure(config.threads)
    config = build.resolved(config)
    output = config.output
    _check_output(output, resume=resume, overwrite=overwrite)
    termination = Termination()
    with termination.listening():
        try:
            return _train(config, display, termination, resume=resume, overwrite=overwrite)
        except Terminated:
            raise SystemExit(STATUS) from None


def _train(config: Config, display: Display, termination: Termination, *, resume: bool, overwrite: bool) -> Path:
    output = config.output
    # Cheapest first: what is wrong is told before the next part is paid for.
    writer = _summary_writer() if config.log.tensorboard else None
    datasets = {
        name: build.read_dataset(path, config)
        for name, path in config.data.model_dump(include={"path", "validation", "test"}).items()
        if path is not None
    }
    rewards, judge = build.build_rewards(config), build.build_judge(config)
    policy = build.build_policy(config.policy, config.seed)
    for dataset in datasets.values():
        build.check_prompts(dataset, policy)
    evaluation = config.evaluation
    wanted = {
        "path": None,
        "validation": max(evaluation.pairs, evaluation.gallery),
        "test": evaluation.test_pairs,
    }
    used = {dataset: wanted[name] for name, dataset in datasets.items()}
    build.tell_long_prompts(config, policy, rewards, used, display)
    with display.stages() as stages:
        build.encode_ahead(policy, used, stages)
    trainer = Trainer(config, policy, rewards, datasets["path"])
    session = _Session(config, trainer, datasets, display, judge, writer, termination)
    if overwrite:
        _delete_run(output)
    session.start(resume=resume)
    session.loop()
    return session.finish()


def evaluate_run(run: Path, data: Path | None, pairs: int | None, display: Display) -> Path:
    """Evaluate a finished run's base and tuned generator on `data` (default: the run's test, validation or training
    data), write `evaluation/` and the report. Returns the report's path."""
    if pairs is not None and pairs < 1:
        raise UserError(f"--pairs: {pairs} pairs cannot be evaluated; give 1 or more")
    config = load_run_config(run)
    configure(config.threads)
    policy = build.build_policy(config.policy, config.seed)
    path = data or config.data.test or config.data.validation or config.data.path
    dataset = build.open_dataset(path, config, policy)
    policy.load_adapter(run)
    pairs = pairs or config.evaluation.test_pairs
    rewards, judge = build.build_rewards(config), build.build_judge(config)
    build.tell_long_prompts(config, policy, rewards, {dataset: pairs}, display)
    with display.stages() as stages:
        build.encode_ahead(policy, {dataset: pairs}, stages)
    display.comparison(write_evaluation(config, policy, dataset, rewards, judge, run / "evaluation", pairs))
    return write_report(run)


def load_run_config(run: Path) -> Config:
    """The configuration of the run in the folder `run`. Raises `UserError` where there is none, or a damaged one."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{run} is not the folder of a run: it has no config.yaml; name the --output of a train command"
        )
    try:
        return Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not the configuration that train wrote ({error}); restore it") from error


def write_evaluation(
    config: Config,
    policy: Policy[Any],
    dataset: SubjectDataset,
    rewards: Sequence[Reward],
    judge: Judge | None,
    folder: Path,
    pairs: int,
) -> dict[str, dict[str, Any]]:
    """Evaluate the untuned ("base") and the tuned generator on equal pairs and noise; write and return both results."""
    with policy.untuned():
        base = _evaluate(config, policy, dataset, rewards, judge, pairs)
    tuned = _evaluate(config, policy, dataset, rewards, judge, pairs)
    results = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, evaluation in (("base", base), ("tuned", tuned)):
        results[name] = {
            "split": dataset.folder.name,
            "pairs": len(evaluation.samples),
            "seed": config.seed,
            "chance": chance_levels(evaluation, judge) if judge else {},
            "ceiling": judge.ceiling if judge else {},
            "records": evaluation.records(),
            "summary": evaluation.summary(),
        }
        (folder / f"{name}.json").write_text(json.dumps(results[name], indent=1), encoding="utf-8")
        for sample, image in list(zip(evaluation.samples, evaluation.images, strict=True))[:REPORTED_IMAGES]:
            save_image(image, folder / "images" / f"{sample.id}_{name}.png")
    for sample, reference in list(zip(base.samples, base.references, strict=True))[:REPORTED_IMAGES]:
        save_image(reference[0], folder / "images" / f"{sample.id}_reference.png")
    return results


def _evaluate(
    config: Config,
    policy: Policy[Any],
    dataset: SubjectDataset,
    rewards: Sequence[Reward],
    judge: Judge | None,
    pairs: int,
) -> Evaluation:
    return evaluate(
        policy, dataset, rewards, judge, pairs=pairs, num_steps=config.rollout.num_steps, shift=config.rollout.shift,
        seed=config.seed, micro_batch=config.rollout.micro_batch,
        masks=config.rewards.identity_reference == "segmented",
    )  # fmt: skip


class _Session:
    """The files of a run and the loop that fills them."""

    def __init__(
        self,
        config: Config,
        trainer: Trainer[Any],
        datasets: dict[str, SubjectDataset],
        display: Display,
        judge: Judge | None,
        writer: Any,
        termination: Termination,
    ) -> None:
        """`writer`: TensorBoard's class, None where it is not wanted."""
        self.config, self.trainer, self.datasets, self.display = config, trainer, datasets, display
        self.policy: Policy[Any] = trainer.policy
        self.output = config.output
        self.judge = judge
        self.termination = termination
        self._updating = False
        self.base_images: torch.Tensor | None = None
        self.tensorboard: Any = None
        self._writer = writer

    def start(self, *, resume: bool) -> None:
        """Make the folder, or go back to the newest checkpoint in it."""
        self.output.mkdir(parents=True, exist_ok=True)
        if resume:
            self._resume(list_checkpoints(self.output / "checkpoints"))
        # First of all files, and whole or not at all: a folder without it is not taken for a run's.
        unfinished = self.output / UNFINISHED
        unfinished.write_text(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        os.replace(unfinished, self.output / "config.yaml")
        self._cut_logs()
        if self._writer is not None:
            self.tensorboard = self._writer(self.output / "tensorboard", purge_step=self.trainer.iteration + 1)
        weights = {"sigmas": self.trainer.sigmas.tolist(), "weights": self.trainer.weights.tolist()}
        (self.output / "weights.json").write_text(json.dumps(weights), encoding="utf-8")

    def loop(self) -> None:
        """Train to the last iteration, with validations and checkpoints on the way. On SIGTERM a checkpoint of the last
        whole iteration is left, and `Terminated` raised; and so where rewards fail, before the error goes on."""
        try:
            self._loop()
        except (UserError, TrainingError):
            if self.trainer.iteration > 0 and not self._updating:
                self._checkpoint()
            raise
        except Terminated:
            if self.trainer.iteration > 0:
                self._checkpoint()
            self.display.note(
                f"stopped by SIGTERM after iteration {self.trainer.iteration}; `train --resume` goes on from there"
            )
            raise

    def _loop(self) -> None:
        last = self.config.iterations
        self._remember_base()
        with self.display.training(last, self.trainer.iteration) as show:
            if self._validation_is_due():
                self._validate()
            while self.trainer.iteration < last:
                self._iterate(show)
                iteration = self.trainer.iteration
                if self._validation_is_due() or iteration == last:
                    self._validate()
                if iteration % self.config.checkpoint.every == 0 or iteration == last:
                    with self.termination.whole():
                        self._checkpoint()

    def _iterate(self, show: Training) -> None:
        """One iteration: its update and its lines in the logs are whole, or not there."""
        with ExitStack() as stack:

            def on_phase(phase: str, share: float) -> None:
                if phase == "update" and share == 0.0:
                    stack.enter_context(self.termination.whole())
                    self._updating = True
                show.phase(phase, share)

            metrics = self.trainer.train_step(on_phase)
            self._log(LOGS[0], metrics)
            self._watch_ratio(metrics)
            show.iteration(metrics)
            self._updating = False

    def _validation_is_due(self) -> bool:
        """A run that was stopped may have been so between an iteration and its validation."""
        iteration = self.trainer.iteration
        if iteration % self.config.evaluation.every != 0:
            return False
        return all(row["iteration"] != iteration for row in _read_log(self.output / LOGS[1]))

    def _resume(self, checkpoints: Sequence[Path]) -> None:
        """Go back to the newest of the `checkpoints` that is whole; damaged ones are passed over with a warning."""
        if not checkpoints:
            self.display.note(f"{self.output} has no checkpoint yet: starting from the first iteration")
            return
        for path in reversed(checkpoints):
            try:
                done = load_checkpoint(
                    path, _pinned(self.config), self.policy.trainable_parameters(), self.trainer.optimizer
                )
            except DamagedCheckpoint as error:
                self.display.warn(f"{error}: passed over")
                continue
            self._check_progress(done)
            self.trainer.iteration = done
            self.display.note(f"resuming after iteration {done}, from {path}")
            return
        raise UserError(
            f"{self.output}: none of its {len(checkpoints)} checkpoints is whole, so there is nothing to go on from; "
            "restore one, or start anew with --overwrite"
        )

    def finish(self) -> Path:
        """Write the adapter, the final evaluation and the report."""
        self.policy.save_adapter(self.output)
        if "test" in self.datasets:
            self.display.note("evaluating before and after on the test data ...")
            folder, pairs = self.output / "evaluation", self.config.evaluation.test_pairs
            parts = (self.policy, self.datasets["test"], self.trainer.rewards, self.judge)
            self.display.comparison(write_evaluation(self.config, *parts, folder, pairs))
        if self.tensorboard is not None:
            self.tensorboard.close()
        return write_report(self.output)

    def _check_progress(self, done: int) -> None:
        if done > self.config.iterations:
            raise UserError(
                f"iterations: {self.config.iterations} were asked for, but the run in {self.output} has done {done}; "
                "ask for more, or use a new --output"
            )

    def _cut_logs(self) -> None:
        """Leave in the logs what the run that never stopped would have there by now.

        What came after the checkpoint goes, and so do validations made only because a shorter run ended there.
        """
        done, every = self.trainer.iteration, self.config.evaluation.every
        for name in LOGS:
            kept = []
            for row in _read_log(self.output / name) if done else []:
                interim = name == LOGS[1] and row["iteration"] % every != 0 and done < self.config.iterations
                if interim:
                    self._gallery(row["iteration"]).unlink(missing_ok=True)
                elif row["iteration"] <= done:
                    kept.append(json.dumps(row) + "\n")
            (self.output / name).write_text("".join(kept), encoding="utf-8")

    def _gallery(self, iteration: int) -> Path:
        return self.output / "galleries" / f"{iteration:06d}.png"

    def _evaluate(self, pairs: int) -> Evaluation:
        dataset = self.datasets.get("validation", self.datasets["path"])
        return _evaluate(self.config, self.policy, dataset, self.trainer.rewards, self.judge, pairs)

    def _remember_base(self) -> None:
        with self.policy.untuned():
            self.base_images = self._evaluate(self.config.evaluation.gallery).images

    def _validate(self) -> None:
        evaluation = self._evaluate(self.config.evaluation.pairs)
        row = {"iteration": self.trainer.iteration, "pairs": len(evaluation.samples), **evaluation.means()}
        with self.termination.whole():
            self._log(LOGS[1], row)
            self._draw_gallery(evaluation)
        self.display.validation(row)

    def _draw_gallery(self, evaluation: Evaluation) -> None:
        shown = min(self.config.evaluation.gallery, len(evaluation.images))
        assert self.base_images is not None
        size = self.policy.size
        references = torch.stack([fit(row[0], size) for row in evaluation.references[:shown]])
        rows = [references, self.base_images[:shown].cpu(), evaluation.images[:shown].cpu()]
        scale = max(1, GALLERY_SIDE // max(size))
        grid = image_grid(torch.cat(rows), columns=shown, scale=scale, padding=GALLERY_PADDING)
        save_image(grid, self._gallery(self.trainer.iteration))

    def _watch_ratio(self, metrics: Metrics) -> None:
        off = max(abs(metrics["first_ratio/min"] - 1), abs(metrics["first_ratio/max"] - 1))
        if off > RATIO_TOLERANCE:
            self.display.warn(
                f"iteration {metrics['iteration']}: the first-pass ratio is {off:.1e} away from 1 (more than "
                f"{RATIO_TOLERANCE:.0e}): rollout and update do not compute the same thing. Use policy.precision=fp32, "
                "or equal rollout.micro_batch and optimizer.micro_batch"
            )

    def _checkpoint(self) -> None:
        save_checkpoint(
            self.output / "checkpoints",
            self.trainer.iteration,
            _pinned(self.config),
            self.policy.trainable_parameters(),
            self.trainer.optimizer,
            self.config.checkpoint.keep,
        )

    def _log(self, name: str, row: Metrics) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with (self.output / name).open("a", encoding="utf-8") as log:
            log.write(json.dumps(clean) + "\n")
        if self.tensorboard is not None:
            for key, value in row.items():
                if isinstance(value, int | float) and key != "iteration":
                    self.tensorboard.add_scalar(f"{name.split('.')[0]}/{key}", value, row["iteration"])


def _read_log(path: Path) -> list[Metrics]:
    """The rows of a log; a last line torn by a killed run is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite deletes it; pass one of them")
    nearest = next(path for path in (output, *output.resolve().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "cannot be written to" if nearest.is_dir() else "is a file"
        raise UserError(f"output: {nearest} {what}; name a folder elsewhere")
    if not output.exists() or not any(path.name != UNFINISHED for path in output.iterdir()):
        return
    if not (resume or overwrite):
        raise UserError(
            f"output: the folder {output} is not empty. Pass --resume to go on with the run in it, --overwrite to "
            "delete it and start anew, or another --output"
        )
    if not (output / "config.yaml").is_file():
        raise UserError(f"output: {output} holds other files than a run's (no config.yaml); name another folder")
    load_run_config(output)


def _delete_run(output: Path) -> None:
    """Delete what a run wrote into `output`, and nothing else."""
    for path in (output / name for name in WRITTEN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _pinned(config: Config) -> dict[str, Any]:
    """The fields that decide the result of a run, by dotted name."""
    flat = flatten(config.model_dump(mode="json")) | {"data.path": str(config.data.path.resolve())}
    return {name: value for name, value in flat.items() if not name.startswith(MAY_CHANGE)}


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("log.tensorboard needs TensorBoard: pip install 'customized-grpo[tensorboard]'") from error
    return SummaryWriter
