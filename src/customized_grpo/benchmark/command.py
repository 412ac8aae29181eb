"""`customized-grpo evaluate --benchmark`: draw a picture for every prompt, measure them, write what came of it."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.benchmark.config import PUBLISHED_GUIDANCE, BenchmarkConfig
from customized_grpo.benchmark.items import Item, pictures_made_elsewhere, read_items
from customized_grpo.benchmark.page import write_page
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.run import Config, flatten
from customized_grpo.config.training import DistributedConfig
from customized_grpo.data import load_image, save_image
from customized_grpo.distributed.group import DistributedGroup, init_distributed
from customized_grpo.distributed.termination import SignalHandler
from customized_grpo.errors import UserError, describe_changes
from customized_grpo.evaluation.copy_paste import layout
from customized_grpo.evaluation.evaluator import Sampling, draw, json_number
from customized_grpo.evaluation.metrics import Metric, measure
from customized_grpo.evaluation.statistics import bootstrap_interval
from customized_grpo.factory.data import check_prompts, encode_rows, raise_problems
from customized_grpo.factory.metrics import build_own_metrics, has_own_metrics, load_metrics
from customized_grpo.factory.policy import build_policy, check_shard, resolve_policy_config, with_guidance
from customized_grpo.io.files import check_folder, file_sha256, write_whole, writing
from customized_grpo.policies.policy import Policy
from customized_grpo.runtime.device import configure
from customized_grpo.tracking.console import Display, StageProgress
from customized_grpo.training.run_dir import adapter_folder, load_run_config
from customized_grpo.types import PromptBatch

PURPOSE = "benchmark"
SETTINGS, RESULTS, PICTURES = "settings.json", "benchmark.json", "images"
MEASURED = {"identity_to", "hpsv3_as_published", "metrics"}
"""Settings of measuring."""
UNSEEN = (
    "device",
    "init_from",
    "pipeline.text_encoders",
    "pipeline.fsdp",
    "pipeline.cache",
    "pipeline.gradient_checkpointing",
)
"""Settings of a generator that its pictures do not depend on."""


def run_benchmark(config: BenchmarkConfig, display: Display) -> Path | None:
    """Draw what is not drawn yet, measure all, write benchmark.json and the page; returns the page's path, None in
    processes other than the first.

    Several processes share out the drawing; the first measures. Raises `UserError` before anything is drawn where the
    data, the generator or a metric cannot be had.
    """
    if config.data is None:
        raise UserError("data: name the benchmark's folder with --data DIR")
    if config.ema and config.adapter is None:
        raise UserError("ema: only of a run; name it with --adapter RUN")
    run = None if config.adapter is None else load_run_config(config.adapter)
    configure(run.threads if run else None)
    with init_distributed(
        SignalHandler(), (run.distributed if run else DistributedConfig()).heartbeat_timeout
    ) as ranks:
        display = display if ranks.is_main_process else Display.silent()
        with ranks.synchronized(), display.stages() as stages:
            work = _prepared(config, run, ranks, stages)
            # Before anyone draws: all see the same pictures missing.
            left = [number for number, path in enumerate(work.paths) if not path.is_file()]
        with display.stages() as stages:
            _draw(config, work, left, ranks, stages)
        with ranks.synchronized(), display.stages() as stages:
            return _measure_and_tell(config, work, display, stages) if ranks.is_main_process else None


@dataclass(frozen=True)
class _Work:
    """What is to be drawn and measured: the items, their pictures' `paths`, the generator's settings; and in the first
    process all `settings` that the pictures depend on, and the `metrics`."""

    items: Sequence[Item]
    paths: Sequence[Path]
    policy: PolicyConfig
    settings: Mapping[str, Any]
    pictures: "_Pictures | None"
    metrics: Sequence[Metric]


def _prepared(config: BenchmarkConfig, run: Config | None, ranks: DistributedGroup, stages: StageProgress) -> _Work:
    """Prepare a benchmark; everything that can be wrong is found here, before any image is drawn."""
    assert config.data is not None
    items = read_items(config.benchmark or "dreambench", config.data)
    policy = _policy_config(config, run)
    if run is None:
        check_shard(policy, ranks.world_size)
    if config.images is not None:
        paths = pictures_made_elsewhere(config.images, items)
    else:
        paths = [config.output / PICTURES / f"{item.id}.png" for item in items]
    if not ranks.is_main_process:
        return _Work(items, paths, policy, {}, None, [])
    settings = _settings(config, policy, items)
    _check_output(config.output, settings)
    pictures = _Pictures(config.data, items, stages)
    return _Work(items, paths, policy, settings, pictures, _metrics(config, policy, run, pictures))


def _measure_and_tell(config: BenchmarkConfig, work: _Work, display: Display, stages: StageProgress) -> Path:
    records = _measured(config, work, stages)
    means, subjects = summary(records), len({item.subject for item in work.items})
    results = {
        "benchmark": config.benchmark or "dreambench",
        "settings": work.settings,
        "measured": {} if _has_own_metrics(config, work.policy) else config.model_dump(mode="json", include=MEASURED),
        "subjects": subjects,
        "summary": means,
        "records": records,
    }
    with writing(config.output):
        write_whole(config.output / RESULTS, json.dumps(results, indent=1))
        page = write_page(results, work.items, work.paths, config.output)
    display.intervals(f"{len(records)} pictures of {subjects} subjects", means)
    return page


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return the mean of each metric and its 95 % bootstrap interval over subjects."""
    subjects = [record["subject"] for record in records]
    found = {}
    for name in records[0]["metrics"]:
        values = [record["metrics"][name] for record in records]
        numbers = [float("nan") if value is None else float(value) for value in values]
        interval = bootstrap_interval(numbers, subjects)
        found[name] = {
            key: value if value == value else None for key, value in zip(("mean", "low", "high"), interval, strict=True)
        }
    return found


class _Pictures:
    """The subjects' pictures, checked and their layouts known; loaded again when they are compared with."""

    def __init__(self, folder: Path, items: Sequence[Item], stages: StageProgress) -> None:
        """Raise `UserError` listing the pictures of the benchmark in `folder` that cannot be read."""
        subject_of = {path: item.subject for item in items for path in item.pictures}
        layouts: dict[str, list[Tensor]] = {}
        problems = []
        for done, (path, subject) in enumerate(subject_of.items(), 1):
            try:
                layouts.setdefault(subject, []).append(layout(load_image(path)[None]))
            except UserError as error:
                problems.append(str(error))
            stages.update("reading the subjects' pictures", done, len(subject_of))
        raise_problems(folder, "pictures", problems)
        self.layouts = {subject: torch.cat(each) for subject, each in layouts.items()}
        self._last: dict[Path, Tensor] = {}

    def load(self, paths: Sequence[Path]) -> list[Tensor]:
        """Load the pictures at `paths`; the pictures of the last call are kept."""
        self._last = {path: self._last[path] if path in self._last else load_image(path) for path in paths}
        return list(self._last.values())


def _policy_config(config: BenchmarkConfig, run: Config | None) -> PolicyConfig:
    """Return the generator's settings, with the benchmark's guidance."""
    if run is None and config.policy.init_from is not None:
        raise UserError(
            "policy.init_from: is where training starts; to draw with an adapter, name its run or export with --adapter"
        )
    policy = resolve_policy_config(run.policy if run else config.policy)
    return with_guidance(policy, config.guidance_scale, PUBLISHED_GUIDANCE)


def _settings(config: BenchmarkConfig, policy: PolicyConfig, items: Sequence[Item]) -> dict[str, Any]:
    """Return every setting that the pictures depend on."""
    asked = {"data": str((config.data or Path()).resolve()), "items_sha256": _items_hash(items)}
    if config.images is not None:
        return {"images": str(config.images.resolve()), **asked}
    adapter = _adapter(config)
    drawn = config.model_dump(mode="json", include={"num_steps", "shift", "seed"})
    generator = flatten(policy.model_dump(mode="json"))
    return {
        **asked,
        "adapter": None if adapter is None else str(adapter.resolve()),
        "adapter_sha256": None if adapter is None else _adapter_hash(adapter),
        **drawn,
        **{f"policy.{name}": value for name, value in generator.items() if not name.startswith(UNSEEN)},
    }


def _items_hash(items: Sequence[Item]) -> str:
    """Return a hash of names, prompts and the bytes of the references."""
    references = {path: file_sha256(path) for path in {path for item in items for path in item.references}}
    told = [[item.id, item.prompt, *(references[path] for path in item.references)] for item in items]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _adapter(config: BenchmarkConfig) -> Path | None:
    return None if config.adapter is None else adapter_folder(config.adapter, ema=config.ema)


def _adapter_hash(folder: Path) -> str:
    """Return a hash of the adapter's bytes: a run that was trained further draws other images."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _check_output(output: Path, settings: Mapping[str, Any]) -> None:
    """Raise `UserError` where `output` cannot be written into, or has other things than what was begun there with
    `settings`."""
    check_folder(output, "output")
    path = output / SETTINGS
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); delete {output}, or use another --output") from error
        if changed := describe_changes(before, settings, {*before, *settings}):
            raise UserError(f"output: {output} was begun with other settings ({changed}); use another --output")
    elif output.exists() and any(output.iterdir()):
        raise UserError(f"output: {output} is not empty, and no benchmark; name another folder")


def _has_own_metrics(config: BenchmarkConfig, policy: PolicyConfig) -> bool:
    """Return whether the generator's own rewards and oracle measure, and not what `config.metrics` names."""
    return has_own_metrics(policy) and config.images is None


def _metrics(config: BenchmarkConfig, policy: PolicyConfig, run: Config | None, pictures: _Pictures) -> list[Metric]:
    if _has_own_metrics(config, policy):
        if given := [name for name in sorted(MEASURED) if config.differs_from_default(name)]:
            raise UserError(f"{', '.join(given)}: ToyBox is measured by its own rewards and judge; leave it out")
        return build_own_metrics(policy, (run or Config()).rewards)
    return load_metrics(config.metrics, pictures.layouts, hpsv3_as_published=config.hpsv3_as_published)


def _draw(
    config: BenchmarkConfig, work: _Work, left: Sequence[int], ranks: DistributedGroup, stages: StageProgress
) -> None:
    """Draw the pictures with the numbers `left`, each process its share; nothing is written before all
    have loaded what they need."""
    mine = left[ranks.rank :: ranks.world_size]
    policy = None
    with ranks.synchronized():
        if mine or (left and work.policy.pipeline.fsdp):  # of a sharded generator all processes have a part
            policy = _load_policy(config, work)
            asked = [work.items[number] for number in left]
            share = range(len(left))[ranks.rank :: ranks.world_size]
            encode_rows(policy, asked, lambda index: _references(policy, asked[index]), stages, share)
    with ranks.synchronized(), writing(config.output):
        if ranks.is_main_process:
            config.output.mkdir(parents=True, exist_ok=True)
            write_whole(config.output / SETTINGS, json.dumps(work.settings, indent=1))
    with ranks.synchronized():
        if policy is not None:
            with policy.lockstep(ranks):
                _draw_each(config, work, policy, mine, stages)


def _load_policy(config: BenchmarkConfig, work: _Work) -> Policy[Any]:
    """Build the generator, and check it against all items."""
    policy = build_policy(work.policy, 0)
    assert config.data is not None
    check_prompts(config.data, work.items, policy)
    adapter = _adapter(config)
    if adapter is not None:
        policy.load_adapter(adapter)
    return policy


def _references(policy: Policy[Any], item: Item) -> list[Tensor]:
    return [policy.prepare_reference(load_image(path), len(item.references)) for path in item.references]


@torch.no_grad()
def _draw_each(
    config: BenchmarkConfig, work: _Work, policy: Policy[Any], mine: Sequence[int], stages: StageProgress
) -> None:
    """Draw the pictures with the numbers `mine`, a micro-batch at a time, each whole or not at all."""
    sampling = Sampling(config.num_steps, config.shift, config.seed, config.micro_batch)
    for start in range(0, len(mine), config.micro_batch):
        rows = mine[start : start + config.micro_batch]
        chosen = [work.items[number] for number in rows]
        references = [_references(policy, item) for item in chosen]
        images = draw(policy, [item.prompt for item in chosen], references, rows, sampling, PURPOSE).cpu()
        for number, image in zip(rows, images, strict=True):
            with writing(config.output):
                save_image(image, work.paths[number])
        stages.update("drawing", start + len(rows), len(mine))


@torch.no_grad()
def _measured(config: BenchmarkConfig, work: _Work, stages: StageProgress) -> list[dict[str, Any]]:
    """Return a record of each item, in their order."""
    items, pictures = work.items, work.pictures
    assert pictures is not None
    groups: dict[tuple[str, tuple[Path, ...]], list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault((item.subject, item.references), []).append(place)
    found: dict[int, dict[str, float | None]] = {}
    for (subject, drawn_from), places in groups.items():
        first = items[places[0]]
        loaded = pictures.load(list(dict.fromkeys((*drawn_from, *first.pictures))))
        references = loaded[: len(drawn_from)]
        compared = references if config.identity_to == "reference" else pictures.load(first.pictures)
        for rows in _alike(places, work.paths, config.metrics.micro_batch):
            images = torch.stack([image for _, image in rows])
            batch = PromptBatch(
                [items[place].prompt for place, _ in rows], [references] * len(rows), None,
                subjects=[subject] * len(rows), pictures=[compared] * len(rows),
            )  # fmt: skip
            values = measure(work.metrics, images, batch)
            for index, (place, _) in enumerate(rows):
                found[place] = {name: json_number(each[index]) for name, each in values.items()}
            stages.update("measuring", len(found), len(items))
    return [
        {"id": item.id, "subject": item.subject, "prompt": item.prompt, "metrics": found[place]}
        for place, item in enumerate(items)
    ]


def _alike(places: Sequence[int], paths: Sequence[Path], most: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield the pictures of the items at `places` in batches of one size, of at most `most`."""
    begun: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for place in places:
        image = load_image(paths[place])
        batch = begun.setdefault(image.shape, [])
        batch.append((place, image))
        if len(batch) == most:
            yield begun.pop(image.shape)
    yield from begun.values()
