"""Validations of a run: held against the base; the best adapter is kept, and without a better one the run ends."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.config.run import Config
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.evaluation.against_base import INTERVALS, AgainstBase
from customized_grpo.evaluation.evaluator import Evaluation, Evaluator
from customized_grpo.evaluation.selection import Row, best_row, should_stop
from customized_grpo.io.files import write_whole, writing
from customized_grpo.io.jsonl import read_rows
from customized_grpo.policies.policy import Policy
from customized_grpo.report.best import describe_best
from customized_grpo.tracking.timer import OnProgress
from customized_grpo.training.run_dir import BEST, BEST_RECORD, RunDir, best_iteration


class Validation:
    """Validates the generator of a run, on the first samples of the validation data.

    All processes evaluate; the first has the log, from which the best validation and the end are read. So a run that is
    resumed anywhere has the same best, and stops where it would have stopped.
    """

    def __init__(self, config: Config, evaluator: Evaluator, run: RunDir, ranks: DistributedGroup) -> None:
        """Validate as `config` says; `run` is the folder whose log and best adapter these are."""
        self._config, self._evaluator, self._run, self._ranks = config, evaluator, run, ranks
        self._against: AgainstBase | None = None
        self.base_images: Tensor | None = None

    def remember_base(self, policy: Policy[Any], on_progress: OnProgress) -> None:
        """Evaluate the base generator, which validations are held against."""
        with policy.base_weights():
            base = self._evaluate(on_progress)
        self.base_images = base.images[: self._config.evaluation.gallery]
        trained = [f"reward/{name}" for name, reward in self._config.rewards.items() if reward.is_objective]
        self._against = AgainstBase(base, self._config.held_out, trained)

    def evaluate(self, iteration: int, on_progress: OnProgress) -> tuple[Evaluation, dict[str, Any]]:
        """Return the evaluation after `iteration`, and its row for the log.

        Before the first iteration the generator is the base, unless it starts from an adapter.
        """
        assert self._against is not None
        is_base = iteration == 0 and self._config.policy.init_from is None
        evaluation = self._against.base if is_base else self._evaluate(on_progress)
        return evaluation, self._against.row(iteration, evaluation, self.rows())

    def _evaluate(self, on_progress: OnProgress) -> Evaluation:
        evaluation = self._evaluator.evaluate(self._config.evaluation.num_samples, on_progress)
        shown = self._config.evaluation.gallery
        return replace(evaluation, images=evaluation.images[:shown].clone())

    def rows(self) -> list[Row]:
        """Return the rows of the log; none in processes other than the first."""
        return list(read_rows(self._run.evaluations)) if self._ranks.is_main_process else []

    def keep_if_best(self, row: Row, policy: Policy[Any]) -> None:
        """Write the adapter of the weights as they were evaluated, if no validation before was as good as `row`."""
        name = self._config.select
        if name is None or best_row([*self.rows(), row], name) is not row:
            return
        folder = self._run.path / BEST
        with writing(folder):
            (folder / BEST_RECORD).unlink(missing_ok=True)  # first: what stands there is not whole from now on
            policy.save_adapter(folder)
            record = {"iteration": row["iteration"], "select": name, "value": row[name]}
            interval = row.get(INTERVALS, {}).get(name)
            write_whole(folder / BEST_RECORD, json.dumps(record | ({"interval": interval} if interval else {})))

    def best(self) -> int | None:
        """Return the iteration whose adapter is kept as the best one; None if no adapter is.

        All processes say the same.
        """
        own = best_iteration(self._run.path) if self._ranks.is_main_process else None
        found = int(self._ranks.gather(torch.tensor([-1 if own is None else own]))[0])
        return None if found < 0 else found

    def told(self) -> str | None:
        """Return a sentence on the best validation so far; None where nothing is selected by, or in other processes."""
        return None if self._config.select is None else describe_best(self.rows(), self._config.select)

    def is_over(self) -> bool:
        """Return whether validations have not become better for as long as `evaluation.patience` says."""
        name = self._config.select
        return name is not None and should_stop(self.rows(), name, self._config.evaluation.patience)

    def copies_more(self, evaluation: Evaluation) -> str | None:
        """Return the figure of copy-paste that is significantly above the base's; None if there is none."""
        assert self._against is not None
        return self._against.copies_more(evaluation)


def forget_best_after(folder: Path, done: int) -> None:
    """Delete the best adapter in `folder` if it is of an iteration after `done`, to which the run went back."""
    best = best_iteration(folder)
    if best is not None and best > done:
        with writing(folder):
            shutil.rmtree(folder / BEST)
