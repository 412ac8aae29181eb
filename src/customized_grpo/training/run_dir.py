"""The folder of a run: names of its files, its lock, and what may be deleted."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from torch import Tensor

from customized_grpo.config.messages import format_validation_error, renamed_fields
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError, truncated
from customized_grpo.evaluation.selection import should_stop
from customized_grpo.io.files import LOCK, UNFINISHED, check_folder, locked, write_whole, writing
from customized_grpo.io.jsonl import read_lines
from customized_grpo.policies.policy import Policy
from customized_grpo.tracking.console import Display
from customized_grpo.tracking.services import RUN_IDS
from customized_grpo.tracking.trackers import image_path
from customized_grpo.training.checkpoint import list_checkpoints
from customized_grpo.training.ema import EMA

METRICS, EVALUATIONS, GALLERIES = "metrics", "evaluations", "galleries"
"""Names by which a run's trackers record iterations, validations and their images."""
LOGS = (f"{METRICS}.jsonl", f"{EVALUATIONS}.jsonl")
EMA_FOLDER = "ema"
"""Folder of the averaged weights in a run's folder."""
BEST, BEST_RECORD = "best", "best.json"
"""Folder of the adapter of the best validation in a run's folder, and the file in it that says which one."""
CHECKPOINTS = "checkpoints"
WRITTEN = (
    *LOGS,
    "weights.json",
    *(f"{name}{UNFINISHED}" for name in (*LOGS, "config.yaml", "weights.json")),
    "report.html",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    CHECKPOINTS,
    "diagnosis",
    EMA_FOLDER,
    BEST,
    "evaluation",
    GALLERIES,
    "tensorboard",
    "wandb",
    RUN_IDS,
    "config.yaml",
)
"""What a run writes into its folder, and all that --overwrite deletes, in this order: a folder without a config.yaml is
not taken for a run's."""
ANOTHER = "another run"


@dataclass(frozen=True)
class RunDir:
    """Name and write the files of a run in the folder `path`."""

    path: Path

    @property
    def metrics(self) -> Path:
        """Return the path of the log of iterations."""
        return self.path / LOGS[0]

    @property
    def evaluations(self) -> Path:
        """Return the path of the log of validations."""
        return self.path / LOGS[1]

    @property
    def checkpoints(self) -> Path:
        """Return the folder of checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def evaluation(self) -> Path:
        """Return the folder of the final evaluation."""
        return self.path / "evaluation"

    def gallery(self, iteration: int) -> Path:
        """Return the path of the gallery that is drawn by the validation after `iteration`."""
        return image_path(self.path, GALLERIES, iteration)

    def make(self) -> None:
        """Make the folder where it is missing."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def write_config(self, config: Config) -> None:
        """Write config.yaml, whole or not at all."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_whole(self.path / "config.yaml", text)

    def write_weights(self, names: Iterable[str], sigmas: Tensor, weights: Tensor) -> None:
        """Write weights.json: the noise levels, and the weights of the rewards `names` at each step."""
        content = {"names": list(names), "sigmas": sigmas.tolist(), "weights": weights.tolist()}
        write_whole(self.path / "weights.json", json.dumps(content))

    def write_adapters(self, policy: Policy[Any], average: EMA | None) -> None:
        """Write the adapter of the trained weights, and the adapter of the averaged weights if they are kept."""
        with writing(self.path):
            policy.save_adapter(self.path)
        if average is not None:
            with average.swapped(), writing(self.path):
                policy.save_adapter(self.path / EMA_FOLDER)


def adapter_folder(run: Path, *, ema: bool, best: bool = False) -> Path:
    """Return the folder of the run's adapter, of its averaged weights, or of the adapter of the `best` validation.

    Raises `UserError` if there is none, or only the adapter of an earlier end, from which the run went on.
    """
    if best:
        return _best_folder(run, ema=ema)
    config = load_run_config(run)
    rows, last = read_lines(run / LOGS[0]), config.iterations
    if rows and rows[-1]["iteration"] < last and not _stopped_early(run, config):
        raise UserError(
            f"{run} is at iteration {rows[-1]['iteration']} of {last}, and its adapter is written in the end; go on "
            "with train --resume, or take a checkpoint with customized-grpo export"
        )
    if not ema:
        return run
    if not (run / EMA_FOLDER).is_dir():
        raise UserError(
            f"--ema: {run} holds no averaged weights (no folder {EMA_FOLDER}): train keeps them where ema.decay is "
            "set, and writes them when it ends. Leave --ema out for the trained ones"
        )
    return run / EMA_FOLDER


def _best_folder(run: Path, *, ema: bool) -> Path:
    if ema:
        raise UserError(
            "--best: it has the weights that were validated, averaged if ema.decay is set; leave --ema out, or --best"
        )
    load_run_config(run)
    if not (run / BEST / BEST_RECORD).is_file():
        raise UserError(
            f"--best: {run} has no best adapter (no folder {BEST}): train keeps it where evaluation.metrics has a "
            "metric that is no reward, or evaluation.select names one. Leave --best out for the last one"
        )
    return run / BEST


def best_iteration(run: Path) -> int | None:
    """Return the iteration whose adapter is kept as the best one; None if no adapter is."""
    record = run / BEST / BEST_RECORD
    return int(json.loads(record.read_text(encoding="utf-8"))["iteration"]) if record.is_file() else None


def _stopped_early(run: Path, config: Config) -> bool:
    """Return whether the run ended before its last iteration, as no validation was better for so long."""
    return config.select is not None and should_stop(
        read_lines(run / LOGS[1]), config.select, config.evaluation.patience
    )


def finished_adapter(run: Path, option: str, instead: str, *, ema: bool, best: bool = False) -> Path:
    """Return the folder of a finished run's adapter, of its averaged weights, or of the `best` validation's adapter.

    Raises `UserError` if the run is not finished; the message names the `option` that named the run, and what to do
    `instead` with its newest checkpoint. A best adapter is there before the end.
    """
    if best:
        return adapter_folder(run, ema=ema, best=True)
    checkpoints = list_checkpoints(run / CHECKPOINTS)
    if checkpoints and not any(run.glob("*.safetensors")):
        raise UserError(f"{option}: {run} is not finished, and has no adapter yet; {instead} {checkpoints[-1]}")
    return adapter_folder(run, ema=ema)


def load_run_config(run: Path) -> Config:
    """Return the configuration of the run in the folder `run`.

    Raises `UserError` if it is missing or damaged.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{run} is not the folder of a run: it has no config.yaml; name the --output of a train command"
        )
    try:
        return Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        if old := renamed_fields(error):
            raise UserError(
                f"{path}: written by an earlier version, before fields were renamed ({truncated(old, '; ', most=3)}); "
                "go on with the version that wrote it, or start a new --output"
            ) from error
        raise UserError(
            f"{path}: not the configuration that train wrote ({format_validation_error(error)}); restore it"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not the configuration that train wrote ({error}); restore it") from error


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise UserError("--resume and --resume_from continue a run and --overwrite deletes it; pass one of them")
    passing = (LOCK, f"config.yaml{UNFINISHED}")
    check_folder(output, "output")
    if not output.exists() or not any(path.name not in passing for path in output.iterdir()):
        return
    if not (resume or overwrite):
        raise UserError(
            f"output: the folder {output} is not empty. Pass --resume to go on with the run in it, --overwrite to "
            "delete it and start again, or another --output"
        )
    if not (output / "config.yaml").is_file():
        raise UserError(f"output: {output} holds other files than a run's (no config.yaml); name another folder")
    load_run_config(output)


def check_start(config: Config, *, overwrite: bool) -> None:
    """Raise `UserError` where the run starts from one that is not finished, or from what --overwrite would delete."""
    start = config.policy.init_from
    if start is not None and (Path(start) / "config.yaml").is_file():
        adapter_folder(Path(start), ema=False)
    output = config.output.resolve()
    policy = config.policy
    named_by: dict[str, str | Path | None] = {
        "init_from": policy.init_from,
        "pipeline.base_adapter": policy.pipeline.base_adapter,
        "pipeline.model": policy.pipeline.model,
        "toybox.weights": policy.toybox.weights,
    }
    for field, named in named_by.items() if overwrite else ():
        if named is not None and Path(named).exists() and Path(named).resolve().is_relative_to(output):
            raise UserError(
                f"policy.{field}: {named} lies in {config.output}, which --overwrite deletes; name another --output, "
                "or copy it elsewhere"
            )


@contextmanager
def own(output: Path, display: Display) -> Iterator[None]:
    """Hold the lock of `output`, which is made if needed, so that no other run writes into it."""
    with ExitStack() as stack:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(locked(output, ANOTHER))
        if lock is None:
            display.warn(f"output: the disk of {output} has no locks: see that no other run writes into it")
        yield


def delete_run(output: Path) -> None:
    """Delete what a run wrote into `output`, and nothing else."""
    with writing(output):
        for path in (output / name for name in WRITTEN):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
