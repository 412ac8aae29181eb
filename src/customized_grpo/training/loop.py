"""A training run under way: its loop, the files that it fills, and how it goes on from a checkpoint."""

import json
import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from customized_grpo.config.run import Config
from customized_grpo.data import SubjectDataset, fit, image_grid, save_image
from customized_grpo.distributed.env import local_rank
from customized_grpo.distributed.launch import saving
from customized_grpo.distributed.termination import SignalHandler, Terminated
from customized_grpo.errors import UserError, WeightsDivergedError, describe_changes
from customized_grpo.evaluation.before_after import evaluate_pairs, write_evaluation
from customized_grpo.evaluation.evaluator import Evaluation
from customized_grpo.io.files import StorageError, write_whole, writing
from customized_grpo.io.jsonl import Metrics
from customized_grpo.policies.policy import Policy
from customized_grpo.report import write_report
from customized_grpo.runtime.memory import COPYING, EVALUATING, explain_out_of_memory
from customized_grpo.toybox.oracle import Oracle
from customized_grpo.tracking.console import Display, TrainingProgress
from customized_grpo.training.checkpoint import (
    CorruptCheckpointError,
    State,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    remove_checkpoint,
    save_checkpoint,
)
from customized_grpo.training.ema import EMA
from customized_grpo.training.fingerprints import fingerprints, resume_fingerprint
from customized_grpo.training.run_dir import CHECKPOINTS, EMA_FOLDER, LOGS
from customized_grpo.training.snapshot import Snapshot
from customized_grpo.training.trainer import RATIO_TOLERANCE, Trainer

GALLERY_SIDE, GALLERY_PADDING = 128, 4
"""Smaller pictures are shown enlarged by a whole factor; both in pixels."""


class TrainingLoop:
    """The files of a run and the loop that fills them."""

    def __init__(
        self,
        config: Config,
        trainer: Trainer[Any],
        datasets: dict[str, SubjectDataset],
        display: Display,
        judge: Oracle | None,
        writer: Any,
        termination: SignalHandler,
    ) -> None:
        """`writer`: TensorBoard's class, None where it is not wanted."""
        self.config, self.trainer, self.datasets, self.display = config, trainer, datasets, display
        self.policy: Policy[Any] = trainer.policy
        self.output = config.output
        self.judge = judge
        self.termination = termination
        self.ranks = trainer.ranks
        decay = config.ema.decay
        self.average = None if decay is None else EMA(self.policy.trainable_parameters(), decay)
        self.resume_fingerprint: dict[str, Any] = {}
        self.state = State(list(self.policy.trainable_parameters()), trainer.optimizer, self.average)
        self.snapshot = Snapshot(self.state)
        self._saved: int | None = None
        self._save_lock = threading.Lock()
        self._failed: int | None = None
        """The iteration whose save failed: it is not tried again."""
        self.base_images: torch.Tensor | None = None
        self.tensorboard: Any = None
        self._writer = writer

    def start(self, *, resume: bool, resume_from: Path | None = None) -> None:
        """Make the folder, or go back to the newest checkpoint in it, or to the checkpoint `resume_from`.

        `pin` comes first.
        """
        with self.ranks.synchronized():
            if resume_from is not None:
                self._restore(resume_from)
            elif resume:
                self._resume(list_checkpoints(self._checkpoints))
        with self.ranks.synchronized():
            self._take_snapshot()
        with self.ranks.synchronized():
            self._check_equal("--resume: the output folder must be on a disk that all processes share")
            if self.ranks.is_main_process:
                self._begin(resume_from)

    def pin(self) -> None:
        """Work out what decides the result, once a machine, and check that all machines have the same.

        Raises `UserError` where they have not. Nothing is written or deleted before that.
        """
        own: dict[str, Any] = {}
        with self.ranks.synchronized():
            if self.ranks.is_main_process or local_rank() == 0:
                with self.ranks.interruptible():
                    hashes = fingerprints(self.config) | {"data": self.trainer.dataset.sha256()}
                own = resume_fingerprint(self.config, hashes)
        self.resume_fingerprint = json.loads(self.ranks.broadcast_text(json.dumps(own)))
        with self.ranks.synchronized():
            if own and (changed := describe_changes(self.resume_fingerprint, own, {*own, *self.resume_fingerprint})):
                raise UserError(
                    f"the machine of process {self.ranks.rank} has other data or weights than that of process 0 "
                    f"({changed}); copy them there"
                )

    def _begin(self, resume_from: Path | None) -> None:
        """Write what a run's folder has before the first iteration, and cut what comes after the present one."""
        with writing(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
        if resume_from is not None:
            self._delete_after(resume_from)
        config = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        weights = {"sigmas": self.trainer.sigmas.tolist(), "weights": self.trainer.weights.tolist()}
        with writing(self.output):
            # First of all files, and whole or not at all: a folder without it is not taken for a run's.
            write_whole(self.output / "config.yaml", config)
            self._truncate_logs()
            write_whole(self.output / "weights.json", json.dumps(weights))
        if self._writer is not None:
            with writing(self.output):
                self.tensorboard = self._writer(self.output / "tensorboard", purge_step=self.trainer.iteration + 1)

    def loop(self) -> None:
        """Train to the last iteration, with validations and checkpoints on the way.

        Whatever ends it early - a signal, an error, a full disk - leaves a checkpoint of the last whole iteration,
        unless the processes hold different weights (`WeightsDivergedError`).
        """
        if self.ranks.is_main_process:
            self.ranks.before_force(self._save_in_a_thread)
        try:
            self._loop()
        except WeightsDivergedError:
            raise
        except BaseException as error:
            with suppress(Terminated), self.termination.critical_section():
                self._save_on_interrupt(error)
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
                due = iteration % self.config.checkpoint.every == 0 or iteration == last
                if due or iteration % self.config.distributed.check_weights_every == 0:
                    with self.ranks.synchronized():
                        self._check_equal(f"after iteration {iteration}; go on from the last checkpoint with --resume")
                if due:
                    with self.ranks.synchronized(), self.termination.critical_section():
                        if self.ranks.is_main_process:
                            self._checkpoint()
                            self._prune()

    def _check_equal(self, remedy: str) -> None:
        """Raise `WeightsDivergedError` where the processes differ in weights or iterations."""
        if self.ranks.world_size == 1:
            return
        sums = [_checksum(parameter.detach()) for _, parameter in self.state.parameters]
        unlike = self.ranks.mismatched_ranks(torch.tensor([self.trainer.iteration, *sums]))
        if unlike:
            raise WeightsDivergedError(f"the weights of process {unlike[0]} are not those of process 0; {remedy}")

    def _iterate(self, show: TrainingProgress) -> None:
        """Run one iteration; it counts once its line is in the log and its weights are in the snapshot."""

        def on_phase(phase: str, share: float) -> None:
            self.termination.poll()
            self.snapshot.poll()
            show.phase(phase, share)

        metrics = self.trainer.train_step(on_phase, self.snapshot.wait)
        with self.ranks.synchronized(), self.termination.critical_section():
            if self.average is not None:
                self.average.update(self.trainer.iteration)
            self._log(LOGS[0], metrics)
            self._take_snapshot()
        self._watch_ratio(metrics)
        self._watch_rewards(metrics)
        show.iteration(metrics)

    def _take_snapshot(self) -> None:
        if self.ranks.is_main_process:  # the one that writes checkpoints
            with explain_out_of_memory("copying the training state to the host's memory", COPYING):
                self.snapshot.take(self.trainer.iteration)

    def _validation_is_due(self) -> bool:
        """A run that was stopped may have been so between an iteration and its validation."""
        iteration = self.trainer.iteration
        if iteration % self.config.evaluation.every != 0:
            return False
        due = all(row["iteration"] != iteration for row in _read_log(self.output / LOGS[1]))
        return bool(self.ranks.gather(torch.tensor([due]))[0])  # the first writes the log, and knows

    def _resume(self, checkpoints: Sequence[Path]) -> None:
        """Go back to the newest of the `checkpoints` that is whole; damaged ones are passed over with a warning."""
        if not checkpoints:
            self.display.note(f"{self.output} has no checkpoint yet: starting from the first iteration")
            return
        for path in reversed(checkpoints):
            try:
                self._restore(path)
            except CorruptCheckpointError as error:
                self.display.warn(f"{error}: passed over")
                continue
            return
        raise UserError(
            f"{self.output}: none of its {len(checkpoints)} checkpoints is whole, so there is nothing to go on from; "
            "restore one, or start anew with --overwrite"
        )

    def _delete_after(self, path: Path) -> None:
        """What the run has after the checkpoint `path`, from which it goes on, is made again."""
        logged = max((row["iteration"] for row in _read_log(self.output / LOGS[0])), default=0)
        if logged < self.trainer.iteration:
            raise UserError(
                f"--resume_from: {path} is of iteration {self.trainer.iteration}, but the log in {self.output} ends at "
                f"{logged}; name the --output of the run that made it"
            )
        if path.resolve().parent != self._checkpoints.resolve():
            self._saved = None
            self._checkpoint()  # the run's own, before those after it go: it is never without one
        for later in list_checkpoints(self._checkpoints):
            if int(later.name) > self.trainer.iteration:
                remove_checkpoint(later)

    def _restore(self, path: Path) -> None:
        manifest = load_checkpoint(path, self.resume_fingerprint, self.state)
        done = manifest.iteration
        if done > self.config.iterations:
            raise UserError(
                f"iterations: {self.config.iterations} were asked for, but the run in {self.output} has done {done}; "
                "ask for more, or use a new --output"
            )
        if others := manifest.other_libraries():
            self.display.warn(
                f"{path} was made under other versions ({', '.join(others)}): from here on the run may differ in its "
                "last bits from one that never stopped"
            )
        self.trainer.iteration = self._saved = done
        self.display.note(f"resuming after iteration {done}, from {path}")

    def finish(self) -> Path | None:
        """Write the adapter, that of the averaged weights where there are, the final evaluation and the report.

        Returns the report's path; None in processes other than the first.
        """
        with self.ranks.synchronized():
            if self.ranks.is_main_process:
                with saving():
                    self._save_adapters()
        if "test" in self.datasets:
            self.display.note("evaluating before and after on the test data ...")
            folder, pairs = self.output / "evaluation", self.config.evaluation.num_test_samples
            parts = (self.policy, self.datasets["test"], self.trainer.rewards, self.judge)
            with self._evaluated_weights(), self.ranks.synchronized():
                results = write_evaluation(self.config, *parts, folder, pairs, self.ranks, self._poll)
            self.display.comparison(results)
        if self.tensorboard is not None:
            with writing(self.output):
                self.tensorboard.close()
        with self.ranks.synchronized(), writing(self.output):
            return write_report(self.output) if self.ranks.is_main_process else None

    def _save_adapters(self) -> None:
        with writing(self.output):
            self.policy.save_adapter(self.output)
        if self.average is not None:
            with self.average.swapped(), writing(self.output):
                self.policy.save_adapter(self.output / EMA_FOLDER)

    def _poll(self, share: float) -> None:
        self.termination.poll()

    @property
    def _checkpoints(self) -> Path:
        return self.output / CHECKPOINTS

    def _evaluated_weights(self) -> AbstractContextManager[None]:
        """Within it the generator has the weights that evaluations are of: the averaged ones where there are, unless
        the configuration wants the others."""
        if self.average is None or not self.config.ema.evaluate:
            return nullcontext()
        return self.average.swapped()

    def _truncate_logs(self) -> None:
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
            write_whole(self.output / name, "".join(kept))

    def _gallery(self, iteration: int) -> Path:
        return self.output / "galleries" / f"{iteration:06d}.png"

    def _evaluate(self, pairs: int) -> Evaluation:
        dataset = self.datasets.get("validation", self.datasets["path"])
        parts = (self.policy, dataset, self.trainer.rewards, self.judge)
        return evaluate_pairs(self.config, *parts, pairs, self.ranks, self._poll)

    def _remember_base(self) -> None:
        with self.policy.base_weights():
            self.base_images = self._evaluate(self.config.evaluation.gallery).images

    def _validate(self) -> None:
        self.snapshot.wait()
        with explain_out_of_memory("evaluating the averaged weights", EVALUATING), self._evaluated_weights():
            evaluation = self._evaluate(self.config.evaluation.num_samples)
        row = {"iteration": self.trainer.iteration, "pairs": len(evaluation.samples), **evaluation.means()}
        with self.ranks.synchronized(), self.termination.critical_section():
            # The gallery first: with the line in the log, a validation is done.
            if self.ranks.is_main_process:
                self._draw_gallery(evaluation)
            self._log(LOGS[1], row)
        self.display.validation(row)
        if (share := evaluation.missing_share()) > 0:
            self.display.warn(
                f"validation after iteration {row['iteration']}: {share:.1%} of the rewards could not be computed"
                f"{self.trainer.failures()}; its means are of the others"
            )

    def _draw_gallery(self, evaluation: Evaluation) -> None:
        shown = min(self.config.evaluation.gallery, len(evaluation.images))
        assert self.base_images is not None
        size = self.policy.size
        references = torch.stack([fit(row[0], size) for row in evaluation.references[:shown]])
        rows = [references, self.base_images[:shown].cpu(), evaluation.images[:shown].cpu()]
        scale = max(1, GALLERY_SIDE // max(size))
        grid = image_grid(torch.cat(rows), columns=shown, scale=scale, padding=GALLERY_PADDING)
        with writing(self.output):
            save_image(grid, self._gallery(self.trainer.iteration))

    def _watch_ratio(self, metrics: Metrics) -> None:
        off = max(abs(metrics["first_ratio/min"] - 1), abs(metrics["first_ratio/max"] - 1))
        if off > RATIO_TOLERANCE:
            self.display.warn(
                f"iteration {metrics['iteration']}: the first-pass ratio is {off:.1e} away from 1 (more than "
                f"{RATIO_TOLERANCE:.0e}): rollout and update do not compute the same thing. Use policy.precision=fp32, "
                "or equal rollout.micro_batch and optimizer.micro_batch"
            )

    def _watch_rewards(self, metrics: Metrics) -> None:
        if (share := metrics["invalid_share"]) > 0:
            self.display.warn(
                f"iteration {metrics['iteration']}: {share:.1%} of the rewards could not be computed"
                f"{self.trainer.failures()}; they count in no group's statistics"
            )
        if metrics["silent_groups"] == 1:
            self.display.warn(
                f"iteration {metrics['iteration']}: no group taught anything: within each all images have equal "
                "rewards, or fewer than two have any. Check the rewards, or raise rollout.eta or rollout.group_size"
            )

    def _checkpoint(self) -> None:
        """Save the last whole iteration, unless that was done already: a whole checkpoint is not touched."""
        with self._save_lock:
            iteration = self.snapshot.iteration
            if iteration is None or self._saved == iteration:
                return
            self._failed = iteration
            with saving():
                save_checkpoint(self._checkpoints, iteration, self.resume_fingerprint, self.snapshot.tensors())
            self._saved, self._failed = iteration, None

    def _prune(self) -> None:
        """Remove old checkpoints. A run that ends early removes none: what ended it may be in the newest weights."""
        settings = self.config.checkpoint
        if self._saved is not None:
            with writing(self._checkpoints):
                prune_checkpoints(self._checkpoints, self._saved, settings.keep_last, settings.keep_every)

    def _save_on_interrupt(self, error: BaseException) -> None:
        """Save the last whole iteration of a run that `error` ends, and say where it goes on."""
        if not self.ranks.is_main_process:
            return
        done = self.snapshot.iteration or 0
        if done and self._failed == done:
            self._say_what_is_left("it could not be saved")
            return
        if done:
            try:
                self._checkpoint()
            except (StorageError, RuntimeError) as failure:  # the disk, or the device of a copy that was under way
                self._say_what_is_left(str(failure))
                return
        how = f"stopped by {self.termination.name}" if isinstance(error, Terminated) else "stopped"
        self.display.note(f"{how} after iteration {done}; `train --resume` goes on from there")

    def _save_in_a_thread(self) -> None:
        """Save the last whole iteration, where another process is lost and the main thread may wait for it for ever."""
        with self.snapshot.lock:
            if self.snapshot.iteration:
                self._checkpoint()

    def _say_what_is_left(self, reason: str) -> None:
        self.display.warn(f"what came after the last checkpoint is lost: {reason}")
        if any(list_checkpoints(self._checkpoints)):
            self.display.note("what was saved before is as it was; `train --resume` goes on from it")

    def _log(self, name: str, row: Metrics) -> None:
        if not self.ranks.is_main_process:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with writing(self.output), (self.output / name).open("a", encoding="utf-8") as log:
            log.write(json.dumps(clean) + "\n")
        if self.tensorboard is not None:
            with writing(self.output):
                for key, value in row.items():
                    if isinstance(value, int | float) and key != "iteration":
                        self.tensorboard.add_scalar(f"{name.split('.')[0]}/{key}", value, row["iteration"])


def _checksum(tensor: torch.Tensor) -> int:
    """Of the bits of an fp32 tensor, by place: integers wrap around, and are summed alike in any order."""
    bits = tensor.contiguous().view(torch.int32).flatten().long()
    return int((bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum())


def _read_log(path: Path) -> list[Metrics]:
    """The rows of a log; a last line torn by a killed run is left out. Raises `UserError` where another is none."""
    rows: list[Metrics] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.is_file() else (), 1):
        if line.endswith(b"\n"):
            try:
                rows.append(json.loads(line))
                int(rows[-1]["iteration"])
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}:{number}: not a row of a log; remove this line and those after it") from error
    return rows
