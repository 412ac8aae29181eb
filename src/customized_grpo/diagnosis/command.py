"""`customized-grpo diagnose`: measure, write down, say what was found."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich import box
from rich.table import Table

from customized_grpo.algorithm import schedule_weights
from customized_grpo.config.rewards import check_schedules, objectives
from customized_grpo.config.run import Config
from customized_grpo.data import batch_indices
from customized_grpo.diagnosis.figure import write_figure
from customized_grpo.diagnosis.gradients import GradientConflict, measure_conflict
from customized_grpo.diagnosis.sensitivity import Sensitivity, calibrated_weights, measure
from customized_grpo.errors import UserError
from customized_grpo.evaluation.statistics import t_interval
from customized_grpo.factory.config import resolve_config
from customized_grpo.factory.data import encode_ahead, load_dataset, warn_truncated_prompts
from customized_grpo.factory.policy import build_policy, build_start
from customized_grpo.factory.rewards import reward_loader
from customized_grpo.io.files import UNFINISHED, check_folder, write_whole, writing
from customized_grpo.runtime.device import configure
from customized_grpo.tracking.console import Display
from customized_grpo.training.advantages import step_weights
from customized_grpo.training.run_dir import load_run_config

RECORD, FIGURE, WEIGHTS = "diagnosis.json", "diagnosis", "weights.yaml"
WRITTEN = (RECORD, f"{FIGURE}.svg", f"{FIGURE}.png", WEIGHTS)
"""What the command writes into its folder, and all that it replaces."""

Record = dict[str, Any]


def diagnose(
    config: Config | None,
    output: Path,
    display: Display,
    *,
    run: Path | None = None,
    prompts: int = 24,
    group_size: int = 12,
    batches: int = 8,
) -> Path:
    """Measure conflicting gradients and temporal dynamics of a generator on the training data.

    The generator is the one that `config` starts from, or the tuned one of `run`. Writes `WRITTEN` into `output` and
    returns the path of the record. `prompts` and `group_size` are of the sensitivity, `batches` of the gradients; all
    are at least 2. Raises `UserError` on bad input, before any work, and if a reward does not vary at all;
    `TrainingError` if too many rewards failed.
    """
    config = _check(config, run, output, {"prompts": prompts, "group_size": group_size, "batches": batches})
    configure(config.threads)
    if run is None:
        policy = build_start(config.policy, config.seed)
    else:
        policy = build_policy(config.policy, config.seed)
        policy.load_adapter(run)
    dataset = load_dataset(config.data.path, config, policy)
    if prompts > len(dataset):
        raise UserError(f"--prompts: {prompts} were asked for, but {config.data.path} holds {len(dataset)}")
    loader, followed = reward_loader(config), objectives(config.rewards)
    rewards = {name: loader.load(f"rewards.{name}", reward) for name, reward in followed.items()}
    # Both measurements take the first samples of the order in which training would.
    drawn = max(prompts, batches * config.rollout.prompts_per_iteration)
    used = {dataset: [dataset[index] for index in sorted(set(batch_indices(len(dataset), drawn, config.seed, 0)))]}
    warn_truncated_prompts(config, policy, rewards, used, display)
    with display.stages() as stages:
        encode_ahead(policy, used, stages)
        sensitivity = measure(
            config, policy, rewards, dataset, prompts=prompts, group_size=group_size,
            on_progress=lambda done, of: stages.update("sensitivity", done, of),
        )  # fmt: skip
        constant = mean_weights(config)
        weights = calibrated_weights(sensitivity.shares(), constant, sensitivity.names)
        conflict = measure_conflict(
            config, policy, rewards, dataset, batches=batches,
            on_progress=lambda done, of: stages.update("gradients", done, of),
        )  # fmt: skip
    counts = {"prompts": prompts, "group_size": group_size, "batches": batches}
    record: Record = {
        "settings": _settings(config, run) | counts,
        "rewards": {name: reward.kind for name, reward in followed.items()},
        "sigmas": policy.sigmas(config.rollout.num_steps, config.rollout.shift).tolist(),
        **make_record(conflict, sensitivity),
        "weights": {"calibrated": weights.tolist(), **_weight_tables(config, constant)},
        "findings": find(conflict, sensitivity),
    }
    measured = f"{record['settings']['generator']}, {prompts} prompts of {config.data.path}, groups of {group_size}"
    with writing(output):
        write_whole(output / RECORD, json.dumps(_clean(record), indent=1) + "\n")
        write_figure(_clean(record), output / FIGURE)
        # Last: who finds it takes the diagnosis for done.
        write_whole(output / WEIGHTS, weights_yaml(weights, sensitivity.names, measured))
    _show(record, tuple(rewards), display)
    return output / RECORD


def weights_yaml(table: npt.NDArray[np.float64], names: Sequence[str], measured: str) -> str:
    """Return a configuration file that makes `train` use the time weights `table` [T, R] of the rewards `names`.

    `measured` says of what.
    """
    columns = "".join(
        f"    {name}: [{', '.join(f'{weight:.6f}' for weight in column)}]\n"
        for name, column in zip(names, table.T, strict=True)
    )
    return (
        "# Calibrated time weights: each reward is weighted at a denoising step in proportion to its share of the\n"
        "# sensitivity measured there; over the trainable steps the mean equals the constant weights.\n"
        f"# Measured on: {' '.join(measured.split())}\n"
        "# Use: customized-grpo train --config YOUR.yaml --config weights.yaml\n"
        f"# One weight a step, noisiest first: rollout.num_steps must be {len(table)}.\n"
        f"advantages:\n  weights: table\n  table:\n{columns}"
    )


def make_record(conflict: GradientConflict, sensitivity: Sensitivity) -> Record:
    """Return everything measured, as the "gradients" and "sensitivity" of the JSON record."""
    names = sensitivity.names
    means, shares = sensitivity.intervals(), sensitivity.share_intervals()
    curves: Record = {
        name: {
            "variance": [_interval(row) for row in means[:, k]],
            "std": np.sqrt(sensitivity.means()[:, k]).tolist(),
            "share": [_interval(row) for row in shares[:, k]],
            "centre": float(sensitivity.centres()[k]),
            "by_prompt": sensitivity.variances[..., k].tolist(),
        }
        for k, name in enumerate(names)
    }
    gradients = {
        "cosine": [_interval(t_interval(column)) for column in conflict.cosines.T],
        "norm": {
            name: [_interval(t_interval(column)) for column in conflict.norms[..., k].T] for k, name in enumerate(names)
        },
        "whole": {
            "cosine": _interval(t_interval(conflict.whole_cosines)),
            "norm": {name: _interval(t_interval(conflict.whole_norms[:, k])) for k, name in enumerate(names)},
        },
        "advantage_cosine": _interval(t_interval(conflict.advantage_cosines)),
        "by_batch": conflict.cosines.tolist(),
    }
    for i, j in combinations(range(len(names)), 2):
        pair = "" if len(names) == 2 else f" {names[i]}-{names[j]}"
        curves[f"centre_difference{pair}"] = _interval(sensitivity.centre_difference(i, j))
    return {"gradients": gradients, "sensitivity": curves}


def find(conflict: GradientConflict, sensitivity: Sensitivity) -> list[str]:
    """Return what the measurements say, one sentence each."""
    names = sensitivity.names
    mean, low, high = t_interval(conflict.whole_cosines)
    verdict = "the rewards pull against each other" if high < 0 else "the rewards pull together"
    if not (high < 0 or low > 0):
        verdict = "no direction is shown"
    alone = t_interval(conflict.advantage_cosines)[0]
    by_step = [t_interval(column) for column in conflict.cosines.T]
    against = [str(i) for i, (_, _, top) in enumerate(by_step) if top < 0]
    steps = sensitivity.variances.shape[1]
    halves = [int(np.searchsorted(np.cumsum(column), 0.5)) + 1 for column in sensitivity.shares().T]
    return [
        f"The gradients of the {'two ' if len(names) == 2 else ''}rewards over all steps have cosine "
        f"{_range((mean, low, high))}: {verdict}. "
        f"Their advantages alone have {_signed(alone)}.",
        f"Step by step, they oppose each other at {'step ' + ', '.join(against) if against else 'no step'} "
        f"(of {steps}; the interval lies below zero).",
        f"Half of the {names[0]} reward's sensitivity lies in the first {halves[0]} of {steps} trainable steps"
        + "".join(
            f", half of the {n} reward's in the first {half}" for n, half in zip(names[1:], halves[1:], strict=True)
        )
        + ".",
        *(_order(sensitivity, i, j) for i, j in combinations(range(len(names)), 2)),
    ]


def _order(sensitivity: Sensitivity, i: int, j: int) -> str:
    """Return a sentence that says which of two rewards is decided earlier."""
    (first, second), centres = (sensitivity.names[i], sensitivity.names[j]), sensitivity.centres()
    gap = sensitivity.centre_difference(i, j)
    order = (
        "earlier than" if gap[1] > 0 else "later than" if gap[2] < 0 else "no earlier or later, as far as shown, than"
    )
    return (
        f"The {first} reward is decided {order} the {second} reward: the centres are at step {centres[i]:.1f} and "
        f"{centres[j]:.1f}, {_range(gap, 1)} steps."
    )


def _check(config: Config | None, run: Path | None, output: Path, counts: Mapping[str, int]) -> Config:
    """Return the configuration to measure, its precision resolved.

    Raises `UserError` for what the command cannot take.
    """
    for name, count in counts.items():
        if count < 2:
            raise UserError(f"--{name}: at least 2 are needed for a variance or an interval, found {count}")
    if (config is None) == (run is None):
        raise UserError("diagnose measures a finished run (--run) or a configuration (--config): give one of the two")
    _check_output(output)
    config = config or load_run_config(run or Path())
    if len(followed := objectives(config.rewards)) < 2:
        raise UserError(
            f"diagnose: the only objective is {next(iter(followed))}, and conflict is between two; add another"
        )
    try:
        check_schedules(config.rewards)
    except ValueError as error:
        raise UserError(f"rewards: {error}; calibrated weights keep the share of each") from error
    return resolve_config(config)


def mean_weights(config: Config) -> list[float]:
    """Return the weight of each objective where early and late have equal halves of what the constants leave."""
    halves = torch.full((1,), 0.5)
    followed = objectives(config.rewards).values()
    weights: list[float] = schedule_weights(halves, [r.schedule for r in followed], [r.weight for r in followed])[
        0
    ].tolist()
    return weights


def _settings(config: Config, run: Path | None) -> Record:
    parts = config.model_dump(mode="json", include={"seed", "policy", "data", "rewards", "rollout"})
    generator = "the generator as configured" if run is None else f"the generator tuned by {run}"
    return {"generator": generator, **parts}


def _weight_tables(config: Config, constant: Sequence[float]) -> Record:
    """Return the weights that calibrated ones are compared with: TDW's, if the schedules have it, and constants."""
    schedules = config.model_copy(update={"advantages": config.advantages.model_copy(update={"weights": "schedules"})})
    varies = any(reward.schedule != "constant" for reward in objectives(config.rewards).values())
    tdw = {"tdw": step_weights(schedules).tolist()} if varies else {}
    return {**tdw, "constant": [list(constant)] * config.rollout.num_steps}


def _show(record: Mapping[str, Any], names: Sequence[str], display: Display) -> None:
    gradients, curves, weights = record["gradients"], record["sensitivity"], record["weights"]["calibrated"]
    table = Table(title="by denoising step, with 95 % intervals", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("step", "gradient cosine", *(f"{name} share" for name in names), "weights"):
        table.add_column(column, justify="right", no_wrap=True)
    for i, cosine in enumerate(gradients["cosine"]):
        shares = (_percent(curves[name]["share"][i]) for name in names)
        angle = _range((cosine["mean"], cosine["low"], cosine["high"]))
        table.add_row(str(i), angle, *shares, " ".join(f"{weight:.2f}" for weight in weights[i]))
    display.console.print(table)
    for finding in record["findings"]:
        display.note(finding)


def _check_output(output: Path) -> None:
    check_folder(output, "--out")
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    others = sorted(found - {*WRITTEN, *(f"{name}{UNFINISHED}" for name in WRITTEN)})
    if others:
        raise UserError(
            f"--out: the folder {output} holds other files than a diagnosis ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}); name another folder"
        )


def _interval(values: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float]:
    mean, low, high = (float(value) for value in values)
    return {"mean": mean, "low": low, "high": high}


def _clean(value: Any) -> Any:
    """Return `value` with None in place of numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _clean(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_clean(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _range(interval: tuple[float, float, float], digits: int = 2) -> str:
    mean, low, high = (_signed(value, digits) for value in interval)
    return f"{mean} ({low} to {high})"


def _percent(share: Mapping[str, float]) -> str:
    mean, low, high = (f"{share[key]:.0%}" for key in ("mean", "low", "high"))
    return f"{mean} ({low.rstrip('%')}–{high.rstrip('%')})"
