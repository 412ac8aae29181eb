"""A training run under way: iterations, validations, checkpoints."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from customized_grpo.config.run import Config
from customized_grpo.distributed.launch import saving
from customized_grpo.distributed.termination import SignalHandler, Terminated
from customized_grpo.errors import WeightsDivergedError
from customized_grpo.evaluation.before_after import write_evaluation
from customized_grpo.evaluation.evaluator import Evaluation, Evaluator
from customized_grpo.io.files import writing
from customized_grpo.io.jsonl import Metrics, read_rows
from customized_grpo.policies.policy import Policy
from customized_grpo.report import write_report
from customized_grpo.runtime.memory import COPYING, EVALUATING, explain_out_of_memory
from customized_grpo.tracking.console import Display, TrainingProgress
from customized_grpo.tracking.registry import OpenTracker
from customized_grpo.tracking.trackers import Tracker
from customized_grpo.training.checkpoint import State
from customized_grpo.training.ema import EMA
from customized_grpo.training.gallery import draw_gallery
from customized_grpo.training.resume import Restorer, check_equal_weights, delete_after, truncate_logs
from customized_grpo.training.run_dir import EVALUATIONS, GALLERIES, METRICS, RunDir
from customized_grpo.training.saving import CheckpointSaver
from customized_grpo.training.snapshot import Snapshot
from customized_grpo.training.trainer import Trainer
from customized_grpo.training.warnings import iteration_warnings, validation_warnings


class TrainingLoop:
    """Iterate to the end, and validate, record and save on the way."""

    def __init__(
        self,
        config: Config,
        trainer: Trainer[Any],
        validation: Evaluator,
        test: Evaluator | None,
        display: Display,
        open_trackers: Sequence[OpenTracker],
        termination: SignalHandler,
    ) -> None:
        """Take the parts of a run; `validation` and `test` evaluate its generator, `test` is None without test data."""
        self.config, self.trainer, self.display = config, trainer, display
        self.validation, self.test = validation, test
        self.policy: Policy[Any] = trainer.policy
        self.termination = termination
        self.ranks = trainer.ranks
        self.run = RunDir(config.output)
        decay = config.ema.decay
        self.average = None if decay is None else EMA(self.policy.trainable_parameters(), decay)
        self.state = State(list(self.policy.trainable_parameters()), trainer.optimizer, self.average)
        self.snapshot = Snapshot(self.state)
        self.saver = CheckpointSaver(self.run.checkpoints, config.checkpoint, self.snapshot, display)
        self.trackers: list[Tracker] = []
        """Open in the first process alone."""
        self._open_trackers = open_trackers
        self._base_images: torch.Tensor | None = None

    def start(self, fingerprint: dict[str, Any], *, resume: bool, resume_from: Path | None = None) -> None:
        """Begin the run's folder, or go back to its newest checkpoint, or to the checkpoint `resume_from`.

        `fingerprint`: what `pin` returned.
        """
        self.saver.fingerprint = fingerprint
        restorer = Restorer(self.config, fingerprint, self.state, self.display)
        with self.ranks.synchronized():
            if resume_from is not None:
                self.trainer.iteration = restorer.restore(resume_from)
            elif resume:
                self.trainer.iteration = restorer.restore_newest(self.run)
        self.saver.saved = self.trainer.iteration
        with self.ranks.synchronized():
            self._take_snapshot()
        with self.ranks.synchronized():
            self._check_equal("--resume: the output folder must be on a disk that all processes share")
            if self.ranks.is_main_process:
                self._begin(resume_from)

    def _begin(self, resume_from: Path | None) -> None:
        """Write the files of a run before its first iteration, cut its logs, and open the trackers."""
        done = self.trainer.iteration
        self.run.make()
        if resume_from is not None:
            delete_after(resume_from, done, self.run, self.saver)
        with writing(self.run.path):
            self.run.write_config(self.config)  # first of all files: a folder without it is not taken for a run's
            truncate_logs(self.run, done, self.config)
            self.run.write_weights(self.trainer.sigmas, self.trainer.weights)
        self.trackers = [open_tracker(self.run.path, done + 1) for open_tracker in self._open_trackers]

    def loop(self) -> None:
        """Train to the last iteration, with validations and checkpoints on the way.

        Whatever ends it early - a signal, an error, a full disk - leaves a checkpoint of the last whole iteration,
        unless the processes hold different weights (`WeightsDivergedError`).
        """
        if self.ranks.is_main_process:
            self.ranks.before_force(self.saver.save_from_thread)
        try:
            self._loop()
        except WeightsDivergedError:
            raise
        except BaseException as error:
            with suppress(Terminated), self.termination.critical_section():
                if self.ranks.is_main_process:
                    how = f"stopped by {self.termination.name}" if isinstance(error, Terminated) else "stopped"
                    self.saver.save_at_end(how)
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
                    self._save()

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
            self._log(METRICS, metrics)
            self._take_snapshot()
        for warning in iteration_warnings(metrics, self.trainer.reasons):
            self.display.warn(warning)
        show.iteration(metrics)

    def _validation_is_due(self) -> bool:
        """Return whether this iteration is one to validate, and is not validated yet.

        A run may have been stopped between an iteration and its validation.
        """
        iteration = self.trainer.iteration
        if iteration % self.config.evaluation.every != 0:
            return False
        due = all(row["iteration"] != iteration for row in read_rows(self.run.evaluations))
        return bool(self.ranks.gather(torch.tensor([due]))[0])  # the first writes the log, and knows

    def _validate(self) -> None:
        self.snapshot.wait()
        with explain_out_of_memory("evaluating the averaged weights", EVALUATING), self._evaluated_weights():
            evaluation = self.validation.evaluate(self.config.evaluation.num_samples, self._poll)
        iteration = self.trainer.iteration
        row = {"iteration": iteration, "pairs": len(evaluation.samples), **evaluation.means()}
        with self.ranks.synchronized(), self.termination.critical_section():
            # The gallery first: with the line in the log, a validation is done.
            if self.ranks.is_main_process:
                self._log_gallery(evaluation)
            self._log(EVALUATIONS, row)
        self.display.validation(row)
        for warning in validation_warnings(evaluation, iteration):
            self.display.warn(warning)

    def finish(self) -> Path | None:
        """Write the adapter, the adapter of averaged weights if they are kept, the final evaluation and the report.

        Returns the report's path; None in processes other than the first.
        """
        with self.ranks.synchronized():
            if self.ranks.is_main_process:
                with saving():
                    self.run.write_adapters(self.policy, self.average)
        if self.test is not None:
            self._compare_before_after(self.test)
        for tracker in self.trackers:
            tracker.close()
        with self.ranks.synchronized(), writing(self.run.path):
            return write_report(self.run.path) if self.ranks.is_main_process else None

    def _compare_before_after(self, test: Evaluator) -> None:
        self.display.note("evaluating before and after on the test data ...")
        pairs, iterations = self.config.evaluation.num_test_samples, self.config.iterations
        with self._evaluated_weights(), self.ranks.synchronized():
            results = write_evaluation(test, pairs, iterations, self.run.evaluation, self._poll)
        self.display.comparison(results)

    def _remember_base(self) -> None:
        with self.policy.base_weights():
            self._base_images = self.validation.evaluate(self.config.evaluation.gallery, self._poll).images

    def _evaluated_weights(self) -> AbstractContextManager[None]:
        """Give the generator the weights to evaluate: averaged ones if they are kept, unless `ema.evaluate` is off."""
        if self.average is None or not self.config.ema.evaluate:
            return nullcontext()
        return self.average.swapped()

    def _log(self, name: str, row: Metrics) -> None:
        for tracker in self.trackers:
            tracker.log(name, row, self.trainer.iteration)

    def _log_gallery(self, evaluation: Evaluation) -> None:
        assert self._base_images is not None
        gallery = draw_gallery(evaluation, self._base_images, self.config.evaluation.gallery, self.policy.size)
        for tracker in self.trackers:
            tracker.log_images(GALLERIES, gallery, self.trainer.iteration)

    def _take_snapshot(self) -> None:
        if self.ranks.is_main_process:  # the one that writes checkpoints
            with explain_out_of_memory("copying the training state to the host's memory", COPYING):
                self.snapshot.take(self.trainer.iteration)

    def _save(self) -> None:
        with self.ranks.synchronized(), self.termination.critical_section():
            if self.ranks.is_main_process:
                self.saver.save()
                self.saver.prune()

    def _check_equal(self, remedy: str) -> None:
        check_equal_weights(self.state, self.trainer.iteration, self.ranks, remedy)

    def _poll(self, share: float) -> None:
        self.termination.poll()
