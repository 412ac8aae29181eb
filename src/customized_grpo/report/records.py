"""Reads a run folder into arrays. What a run did not write is empty here; only metrics.jsonl must exist."""

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

from customized_grpo.config.run import flatten
from customized_grpo.errors import UserError
from customized_grpo.evaluation.selection import over_optimized
from customized_grpo.evaluation.statistics import Array, Interval, mean_interval
from customized_grpo.io.jsonl import is_number, read_lines
from customized_grpo.tracking.metric_info import (
    REWARD_PREFIX,
    MetricInfo,
    headline_first,
    in_order,
    metric_info,
    overview,
    score_infos,
)

NOT_METRICS = ("id", "prompt", "subject", "iteration", "pairs", "intervals", "gains", "over_optimized")
"""Fields of the records of an evaluation and of the rows of evaluations.jsonl that are no metrics."""


@dataclass(frozen=True)
class Columns:
    """Flat JSON lines as float columns [N]; a missing, null or non-numeric entry is NaN."""

    values: Mapping[str, Array]
    length: int

    def __getitem__(self, name: str) -> Array:
        return self.values.get(name, np.full(self.length, np.nan))

    def has(self, name: str) -> bool:
        return bool(np.isfinite(self[name]).any())

    def reward_names(self) -> list[str]:
        """Return the names of the rewards with a column `reward/NAME/mean`, in the order of METRIC_INFOS."""
        found = (re.fullmatch("(reward/.+)/mean", name) for name in self.values)
        infos = in_order(match[1] for match in found if match)
        return [info.name.removeprefix("reward/") for info in infos]


@dataclass(frozen=True)
class Evaluation:
    """One final evaluation: `records` by id, and what is known of the metrics on all of them. `iteration`: after which
    the weights were so, where the file says it."""

    iteration: int | None
    split: str
    seed: int | None
    records: Mapping[str, Mapping[str, Any]]
    intervals: Mapping[str, Interval]
    chance: Mapping[str, float]
    ceiling: Mapping[str, float]


@dataclass(frozen=True)
class Weights:
    """Weights [T, R] of the rewards `names`, the sigmas [T + 1], and the steps that were trained."""

    names: tuple[str, ...]
    sigmas: Array
    weights: Array
    trained_steps: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    folder: Path
    config: Mapping[str, Any]
    config_text: str
    metrics: Columns
    validations: Sequence[Mapping[str, Any]]
    evaluations: Columns
    final: Mapping[str, Evaluation]
    weights: Weights | None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return the settings of the run by dotted name."""
        return flatten(dict(self.config))

    @property
    def kept(self) -> str | None:
        """Return the name of the final evaluation of the adapter to keep: the best validation's, else the last one."""
        return next((name for name in ("best", "tuned") if name in self.final), None)

    @property
    def sides(self) -> dict[str, Evaluation]:
        """Return the final evaluations to show, the base first; the last adapter is left out where it is the best."""
        best, tuned = self.final.get("best"), self.final.get("tuned")
        same = best and tuned and best.iteration == tuned.iteration
        return {name: side for name, side in self.final.items() if not (same and name == "tuned")}

    @property
    def over_optimized(self) -> list[tuple[int, int]]:
        """Return the stretches of iterations in which rewards rose and the held-out gain had fallen.

        A stretch begins at the validation before the first that shows it.
        """
        before = {row["iteration"]: earlier["iteration"] for earlier, row in pairwise(self.validations)}
        return [(before.get(first, first), last) for first, last in over_optimized(self.validations)]

    @property
    def objectives(self) -> list[str]:
        """Return the rewards that training follows; all that were logged, where weights.json is missing."""
        if self.weights:
            return list(self.weights.names)
        return self.metrics.reward_names()

    @cached_property
    def infos(self) -> dict[str, MetricInfo]:
        """Return what is shown of the run's rewards and metrics, by figure."""
        kinds: dict[str, str] = {}
        for prefix, field in ((REWARD_PREFIX, "rewards"), ("", "evaluation.metrics")):
            found = (re.fullmatch(rf"{field}\.(\w+)\.kind", name) for name in self.settings)
            kinds |= {prefix + match[1]: str(self.settings[match[0]]) for match in found if match}
        return score_infos(kinds)

    def info(self, name: str) -> MetricInfo:
        """Return what is shown of the metric `name`."""
        return metric_info(name, self.infos)

    def metrics_in(self, names: Iterable[str]) -> list[MetricInfo]:
        """Return the metrics among the fields of records or rows, in the order in which a report shows them."""
        return headline_first(overview((name for name in names if name not in NOT_METRICS), self.infos))


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError where metrics.jsonl is missing or empty, or a file is broken."""
    lines = read_lines(folder / "metrics.jsonl")
    if not lines:
        raise UserError(
            f"{folder / 'metrics.jsonl'}: no training iteration in it, so there is nothing to report. "
            "Expected one JSON object an iteration, as `customized-grpo train` writes: is it a run folder?"
        )
    config_text = (folder / "config.yaml").read_text(encoding="utf-8") if (folder / "config.yaml").is_file() else ""
    try:
        config = yaml.safe_load(config_text) if config_text else {}
    except yaml.YAMLError as error:
        raise UserError(f"{folder / 'config.yaml'}: not readable as YAML ({error}); restore the file") from error
    validations = read_lines(folder / "evaluations.jsonl")
    final = {
        name: _evaluation(folder / "evaluation" / f"{name}.json")
        for name in ("base", "best", "tuned")
        if (folder / "evaluation" / f"{name}.json").is_file()
    }
    return Run(
        folder=folder,
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        metrics=to_columns(lines),
        validations=validations,
        evaluations=to_columns(validations),
        final=final,
        weights=_weights(folder / "weights.json", lines),
    )


def to_columns(rows: list[dict[str, Any]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)  # in the order of the log, not of a set
    return Columns({name: np.array([_as_float(row.get(name)) for row in rows]) for name in names}, len(rows))


def data_uri(path: Path, inside: Path, limit: int = 256) -> str:
    """Return a picture as a PNG data URI, at most `limit` pixels a side; "" if absent, broken or not in `inside`."""
    if not path.resolve().is_relative_to(inside.resolve()) or not path.is_file():
        return ""
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.format != "PNG" or max(picture.size) > limit:
                picture.thumbnail((limit, limit))
                return as_data_uri(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError):
        return ""
    return _png_uri(content)


def as_data_uri(picture: Image.Image) -> str:
    """Return a picture as a PNG data URI."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return _png_uri(content.getvalue())


def _png_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _evaluation(path: Path) -> Evaluation:
    content = _object(path)
    records = {str(record["id"]): record for record in content.get("records", []) if "id" in record}
    summary = content.get("summary", {})
    intervals = {}
    for name in dict.fromkeys([*summary, *(field for record in records.values() for field in record)]):
        if name in NOT_METRICS:
            continue
        if summary.get(name):
            mean, low, high = (_as_float(summary[name].get(key)) for key in ("mean", "low", "high"))
            interval = mean, low, high
        else:
            interval = mean_interval([_as_float(record.get(name)) for record in records.values()])
        if math.isfinite(interval[0]):
            intervals[name] = interval
    chance, ceiling = (
        {name: float(value) for name, value in (content.get(key) or {}).items() if is_number(value)}
        for key in ("chance", "ceiling")
    )
    iteration = content.get("iteration")
    return Evaluation(
        iteration if isinstance(iteration, int) else None, str(content.get("split", "test")), content.get("seed"),
        records, intervals, chance, ceiling,
    )  # fmt: skip


def _weights(path: Path, rows: list[dict[str, Any]]) -> Weights | None:
    if not path.is_file():
        return None
    content = _object(path)
    sigmas = np.asarray(content.get("sigmas"), dtype=np.float64)
    weights = np.asarray(content.get("weights"), dtype=np.float64)
    names = content.get("names", ["prompt", "identity"])
    if weights.ndim != 2 or weights.shape[1] != len(names) or sigmas.shape != (len(weights) + 1,):
        raise UserError(
            f"{path}: found weights of shape {weights.shape}, {len(names)} names and sigmas of shape {sigmas.shape}; "
            "expected weights [T, R], R names and sigmas [T + 1]"
        )
    trained = sorted({step for row in rows for step in row.get("steps") or ()})
    return Weights(tuple(map(str, names)), sigmas, weights, tuple(trained))


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: broken JSON (line {error.lineno}: {error.msg}); delete it and write it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a JSON {type(content).__name__}, expected an object")
    return content


def _as_float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
