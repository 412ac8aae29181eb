"""A training run under way: iterations, validations, checkpoints."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from customized_grpo.config.rewards import objectives
from customized_grpo.config.run import Config
from customized_grpo.distributed.launch import saving
from customized_grpo.distributed.termination import SignalHandler, Terminated
from customized_grpo.errors import WeightsDivergedError
from customized_grpo.evaluation.before_after import Side, write_evaluation
from customized_grpo.evaluation.evaluator import Evaluation, Evaluator
from customized_grpo.io.files import StorageError, writing
from customized_grpo.io.jsonl import Metrics, read_rows
from customized_grpo.policies.policy import Policy
from customized_grpo.report import write_report
from customized_grpo.runtime.memory import COPYING, EVALUATING, explain_out_of_memory
from customized_grpo.tracking.console import Display, TrainingProgress
from customized_grpo.tracking.registry import OpenTracker
from customized_grpo.tracking.time_left import TimeLeft
from customized_grpo.tracking.trackers import Tracker
from customized_grpo.training.checkpoint import State
from customized_grpo.training.ema import EMA
from customized_grpo.training.gallery import draw_gallery
from customized_grpo.training.resume import Restorer, check_equal_weights, delete_after, truncate_logs
from customized_grpo.training.run_dir import BEST, EVALUATIONS, GALLERIES, METRICS, RunDir
from customized_grpo.training.saving import CheckpointSaver
from customized_grpo.training.snapshot import Snapshot
from customized_grpo.training.trainer import Trainer
from customized_grpo.training.validation import Validation, forget_best_after
from customized_grpo.training.warnings import (
    ClippingWatch,
    held_out_warnings,
    iteration_warnings,
    validation_warnings,
)

ITERATION, VALIDATION = "iteration", "validation"
"""Parts of a run that are timed."""


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
        self.test = test
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
        self.validation = Validation(config, validation, self.run, self.ranks)
        self._clipping = ClippingWatch(config.optimizer.num_minibatches)
        self._told: set[str] = set()
        """Warnings that are given once a run."""
        self._time = TimeLeft()
        settings, sides = config.evaluation, 2 + (config.select is not None)  # the base, the best and the last
        samples = 0 if test is None else sides * min(settings.num_test_samples, len(test.dataset))
        self._final_share = samples / min(settings.num_samples, len(validation.dataset))
        """How many validations the evaluation at the end is."""

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
            forget_best_after(self.run.path, done)
            self.run.write_weights(objectives(self.config.rewards), self.trainer.sigmas, self.trainer.weights)
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
                    for tracker in self.trackers:
                        with suppress(StorageError):  # the error that ended the run is the one to tell
                            tracker.close(failed=not isinstance(error, Terminated))
            raise

    def _loop(self) -> None:
        last = self.config.iterations
        with explain_out_of_memory("evaluating the base", EVALUATING):
            self.validation.remember_base(self.policy, self._poll)
        with self.display.training(last, self.trainer.iteration) as show:
            if self._validation_is_due():
                self._validate()
            over = self._is_over()
            while self.trainer.iteration < last and not over:
                began = time.monotonic()
                metrics = self._iterate(show)
                self._time.took(ITERATION, time.monotonic() - began)
                show.iteration(metrics, self._time.left(self._parts_left()))
                iteration = self.trainer.iteration
                if self._validation_is_due() or iteration == last:
                    self._validate()
                    over = self._is_over()
                due = iteration % self.config.checkpoint.every == 0 or iteration == last or over
                if due or iteration % self.config.distributed.check_weights_every == 0:
                    with self.ranks.synchronized():
                        self._check_equal(f"after iteration {iteration}; go on from the last checkpoint with --resume")
                if due:
                    self._save()

    def _parts_left(self) -> dict[str, float]:
        """Return how many iterations and validations are left, and what evaluations at the end are of validations."""
        done, last, every = self.trainer.iteration, self.config.iterations, self.config.evaluation.every
        validations = last // every - (done - 1) // every + (last % every != 0)  # the one after this iteration too
        return {ITERATION: last - done, VALIDATION: validations + self._final_share}

    def _iterate(self, show: TrainingProgress) -> Metrics:
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
        self._warn_once(self._clipping.see(metrics))
        return metrics

    def _warn_once(self, warnings: Iterable[tuple[str, str]]) -> None:
        """Show each of the `warnings`, by what they are about, the first time in a run."""
        for about, warning in warnings:
            if about not in self._told:
                self._told.add(about)
                self.display.warn(warning)

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
        iteration, began = self.trainer.iteration, time.monotonic()
        with explain_out_of_memory("evaluating the averaged weights", EVALUATING), self._evaluated_weights():
            evaluation, row = self.validation.evaluate(iteration, self._poll)
            with self.ranks.synchronized(), self.termination.critical_section():
                # With the line in the log, a validation is done: so the line comes last.
                if self.ranks.is_main_process:
                    self._log_gallery(evaluation)
                    self.validation.keep_if_best(row, self.policy)
                self._log(EVALUATIONS, row)
        self._time.took(VALIDATION, time.monotonic() - began)
        self.display.validation(row)
        if self.ranks.is_main_process and (told := self.validation.told()):
            self.display.note(told)
        for warning in validation_warnings(evaluation, iteration):
            self.display.warn(warning)
        self._warn_once(held_out_warnings(row, self.validation.rows(), self.validation.copies_more(evaluation)))

    def _is_over(self) -> bool:
        """Return whether the run ends here, as no validation was better for so long; all processes say the same."""
        over = self.ranks.is_main_process and self.validation.is_over()
        over = bool(self.ranks.gather(torch.tensor([over]))[0])
        if over:
            patience = self.config.evaluation.patience
            self.display.note(f"no better one among the last {patience} validations: training ends here")
        return over

    def finish(self) -> Path | None:
        """Write the adapter, the adapter of averaged weights if they are kept, the final evaluation and the report.

        Returns the report's path; None in processes other than the first.
        """
        with self.ranks.synchronized():
            if self.ranks.is_main_process:
                with saving():
                    self.run.write_adapters(self.policy, self.average)
        figures = {"iterations": float(self.trainer.iteration)}
        if (best := self.validation.best()) is not None:
            figures["best iteration"] = float(best)
        if self.test is not None:
            figures |= self._compare_before_after(self.test)
        for tracker in self.trackers:
            tracker.summarize(figures)
            tracker.close()
        with self.ranks.synchronized(), writing(self.run.path):
            return write_report(self.run.path) if self.ranks.is_main_process else None

    def _compare_before_after(self, test: Evaluator) -> dict[str, float]:
        """Evaluate on the test data; return the mean of each figure by `evaluation/<side>/<figure>`."""
        self.display.note("evaluating before and after on the test data ...")
        last, best = self.trainer.iteration, self.validation.best()
        adapters = {"tuned": Side(last, self._evaluated_weights)}
        if best:  # at 0 it is the start, which is shown as the base
            adapters = {"best": Side(best, self._best_weights)} | adapters
        with self.ranks.synchronized():
            results = write_evaluation(
                test, self.config.evaluation.num_test_samples, adapters, self.run.evaluation,
                held_out=self.config.held_out, on_progress=self._poll,
            )  # fmt: skip
        self.display.comparison(results)
        return {
            f"evaluation/{side}/{name}": interval["mean"]
            for side, result in results.items()
            for name, interval in result["summary"].items()
        }

    @contextmanager
    def _best_weights(self) -> Iterator[None]:
        """Use the adapter of the best validation inside this block."""
        before = [parameter.detach().clone() for _, parameter in self.state.parameters]
        try:
            self.policy.load_adapter(self.run.path / BEST)
            yield
        finally:
            with torch.no_grad():
                for (_, parameter), value in zip(self.state.parameters, before, strict=True):
                    parameter.copy_(value)

    def _evaluated_weights(self) -> AbstractContextManager[None]:
        """Give the generator the weights to evaluate: averaged ones if they are kept, unless `ema.evaluate` is off."""
        if self.average is None or not self.config.ema.evaluate:
            return nullcontext()
        return self.average.swapped()

    def _log(self, name: str, row: Metrics) -> None:
        for tracker in self.trackers:
            tracker.log(name, row, self.trainer.iteration)

    def _log_gallery(self, evaluation: Evaluation) -> None:
        assert self.validation.base_images is not None
        gallery = draw_gallery(
            evaluation, self.validation.base_images, self.config.evaluation.gallery, self.policy.size
        )
        prompts = [sample.prompt for sample in evaluation.samples[: self.config.evaluation.gallery]]
        caption = f"references, images of the base, tuned images: {' | '.join(prompts)}"
        for tracker in self.trackers:
            tracker.log_images(GALLERIES, gallery, self.trainer.iteration, caption)

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
