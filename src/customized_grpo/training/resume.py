"""What a run may go on from: equal settings, data and weights, a whole checkpoint, and logs that are cut to it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from customized_grpo.config.rewards import PRETRAINED
from customized_grpo.config.run import Config, flatten
from customized_grpo.data import SubjectDataset
from customized_grpo.distributed.env import local_rank
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import UserError, WeightsDivergedError, describe_changes
from customized_grpo.io.files import write_whole
from customized_grpo.io.jsonl import read_rows
from customized_grpo.tracking.console import Display
from customized_grpo.training.checkpoint import (
    CorruptCheckpointError,
    State,
    list_checkpoints,
    load_checkpoint,
    remove_checkpoint,
)
from customized_grpo.training.fingerprints import fingerprints
from customized_grpo.training.run_dir import RunDir
from customized_grpo.training.saving import CheckpointSaver

OF_A_SCORE = (
    *(f"{kind}.model" for kind in PRETRAINED), "hpsv2.backbone", "hpsv3.backbone", "hpsv3.instruction", "local.device",
    "local.micro_batch", "remote.url", "remote.timeout", "vlm_judge.url", "vlm_judge.timeout", "vlm_judge.concurrency",
)  # fmt: skip
MUTABLE_ON_RESUME = (
    "output", "iterations", "threads", "policy.pipeline.model", "policy.pipeline.base_adapter", "policy.init_from",
    "policy.toybox.weights",
    "policy.device", "policy.pipeline.text_encoders", "policy.pipeline.fsdp", "policy.pipeline.block_offload",
    "policy.pipeline.gradient_checkpointing", "policy.pipeline.keep_every", "policy.pipeline.cache",
    "data.", "rewards.*.max_invalid_share",
    *(f"{place}.*.{name}" for place in ("rewards", "evaluation.metrics") for name in OF_A_SCORE), "rollout.micro_batch",
    "optimizer.micro_batch", "checkpoint.", "ema.evaluate", "evaluation.every", "evaluation.num_test_samples",
    "evaluation.gallery", "evaluation.patience", "distributed.", "log.",
)  # fmt: skip
"""Fields in which a resumed run may differ from the one it resumes, and sections, whose names end with a dot; * stands
for a name of a reward or metric. The contents of data and weights may not."""


def resume_fingerprint(config: Config, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Map each field that decides a run's result to its value, by dotted name, with the `hashes` of named files.

    The files themselves may be anywhere.
    """
    flat = flatten(config.model_dump(mode="json"))
    mutable = re.compile("|".join(re.escape(name).replace(r"\*", "[^.]+") for name in MUTABLE_ON_RESUME))
    fields = {name: value for name, value in flat.items() if not mutable.match(name)}
    return fields | {f"{field}.sha256": sha256 for field, sha256 in hashes.items()}


def pin(config: Config, dataset: SubjectDataset, group: DistributedGroup) -> dict[str, Any]:
    """Return the fingerprint of a run, hashed once on each machine. Nothing is written or deleted.

    Raises `UserError` if a machine has other data or weights than the machine of the first process.
    """
    own: dict[str, Any] = {}
    with group.synchronized():
        if group.is_main_process or local_rank() == 0:
            with group.interruptible():
                hashes = fingerprints(config) | {"data": dataset.sha256()}
            own = resume_fingerprint(config, hashes)
    first: dict[str, Any] = json.loads(group.broadcast_text(json.dumps(own)))
    with group.synchronized():
        if own and (changed := describe_changes(first, own, {*own, *first})):
            raise UserError(
                f"the machine of process {group.rank} has other data or weights than the machine of process 0 "
                f"({changed}); copy them there"
            )
    return first


@dataclass(frozen=True)
class Restorer:
    """Bring the state of training back to a checkpoint that was made with an equal fingerprint."""

    config: Config
    fingerprint: Mapping[str, Any]
    state: State
    display: Display

    def restore(self, path: Path) -> int:
        """Bring the state back to the checkpoint `path`; return the number of iterations done by then.

        Raises what `load_checkpoint` does, and `UserError` where more iterations are done than the configuration has.
        """
        manifest = load_checkpoint(path, dict(self.fingerprint), self.state)
        done = manifest.iteration
        if done > self.config.iterations:
            raise UserError(
                f"iterations: {self.config.iterations} were asked for, but the run in {self.config.output} has done "
                f"{done}; ask for more, or use a new --output"
            )
        if others := manifest.other_libraries():
            self.display.warn(
                f"{path} was made under other versions ({', '.join(others)}): from here on the run may differ in its "
                "last bits from one that never stopped"
            )
        self.display.note(f"resuming after iteration {done}, from {path}")
        return done

    def restore_newest(self, run: RunDir) -> int:
        """Bring the state back to the newest whole checkpoint of `run`; return the number of iterations done, or 0.

        Damaged checkpoints are passed over with a warning. Raises `UserError` where all of them are damaged.
        """
        checkpoints = list_checkpoints(run.checkpoints)
        if not checkpoints:
            self.display.note(f"{run.path} has no checkpoint yet: starting from the first iteration")
            return 0
        for path in reversed(checkpoints):
            try:
                return self.restore(path)
            except CorruptCheckpointError as error:
                self.display.warn(f"{error}: passed over")
        raise UserError(
            f"{run.path}: none of its {len(checkpoints)} checkpoints is whole, so there is nothing to go on from; "
            "restore one, or start again with --overwrite"
        )


def delete_after(checkpoint: Path, iteration: int, run: RunDir, saver: CheckpointSaver) -> None:
    """Remove the checkpoints of `run` after the one of `iteration`, from which the run goes on.

    A `checkpoint` that lies elsewhere is saved in the run first: a run is never without one. Raises `UserError` where
    the log ends before `iteration`, as then the checkpoint is of another run.
    """
    logged = max((row["iteration"] for row in read_rows(run.metrics)), default=0)
    if logged < iteration:
        raise UserError(
            f"--resume_from: {checkpoint} is of iteration {iteration}, but the log in {run.path} ends at {logged}; "
            "name the --output of the run that made it"
        )
    if checkpoint.resolve().parent != run.checkpoints.resolve():
        saver.saved = 0
        saver.save()
    for later in list_checkpoints(run.checkpoints):
        if int(later.name) > iteration:
            remove_checkpoint(later)


def truncate_logs(run: RunDir, done: int, config: Config) -> None:
    """Leave in the logs what a run that never stopped would have there after `done` iterations.

    Rows after the checkpoint go, and so do validations made only because a shorter run ended there.
    """
    for log in (run.metrics, run.evaluations):
        kept = []
        for row in read_rows(log) if done else []:
            iteration = row["iteration"]
            validation = log == run.evaluations
            if validation and iteration % config.evaluation.every != 0 and done < config.iterations:
                run.gallery(iteration).unlink(missing_ok=True)
            elif iteration <= done:
                kept.append(json.dumps(row) + "\n")
        write_whole(log, "".join(kept))


def check_equal_weights(state: State, iteration: int, group: DistributedGroup, remedy: str) -> None:
    """Raise `WeightsDivergedError` where the processes differ in weights or iterations."""
    if group.world_size == 1:
        return
    sums = [_checksum(parameter.detach()) for _, parameter in state.parameters]
    unlike = group.mismatched_ranks(torch.tensor([iteration, *sums]))
    if unlike:
        raise WeightsDivergedError(f"the weights of process {unlike[0]} are not those of process 0; {remedy}")


def _checksum(tensor: torch.Tensor) -> int:
    """Sum the bits of an fp32 tensor, weighted by place: integers wrap around, so any order gives the same sum."""
    bits = tensor.contiguous().view(torch.int32).flatten().long()
    return int((bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum())
