"""Settings that bring a run under a limit of memory, the cheapest first."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from customized_grpo.config.run import Config
from customized_grpo.training.estimate import Estimate

GIB = 2.0**30
SMALLEST_RANK = 16
KEPT = (2, 4, 8)
"""What is tried of `policy.pipeline.keep_every`."""


@dataclass(frozen=True)
class Fit:
    """`changes` of settings by dotted name, and the `estimate` with them."""

    changes: dict[str, Any]
    estimate: Estimate

    @property
    def options(self) -> str:
        """The changes as options of a command."""
        given = {name: "null" if value is None else str(value).lower() for name, value in self.changes.items()}
        return " ".join(f"--{name} {value}" for name, value in given.items())


def fitted(
    config: Config,
    limit: float,
    estimate: Callable[[Config], Estimate],
    on_try: Callable[[Fit], object] = lambda fit: None,
) -> Fit | None:
    """Return the first settings, each with those before it, that bring the peak under `limit` GiB; None if none do.

    They are tried in the order of what they cost: time, then a coarser base, then a smaller adapter. `on_try` hears of
    each.
    """
    changes: dict[str, Any] = {}
    for more in _ladder(config):
        changes |= more
        try:
            changed = Config.model_validate(_changed(config.model_dump(exclude_unset=True), changes))
        except ValidationError:  # it does not go with another setting
            for name in more:
                del changes[name]
            continue
        fit = Fit(dict(changes), estimate(changed))
        on_try(fit)
        if fit.estimate.peak_bytes <= limit * GIB:
            return fit
    return None


def roomier(
    config: Config,
    limit: float,
    estimate: Callable[[Config], Estimate],
    on_try: Callable[[Fit], object] = lambda fit: None,
) -> Fit | None:
    """Return the settings that recompute the least and whose peak is under `limit` GiB; None where none do less."""
    pipeline = config.policy.pipeline
    if config.policy.kind == "toybox" or not pipeline.gradient_checkpointing or pipeline.block_offload:
        return None
    ways: list[dict[str, Any]] = [{"policy.pipeline.gradient_checkpointing": False, "policy.pipeline.keep_every": None}]
    ways += [{"policy.pipeline.keep_every": every} for every in KEPT if every < (pipeline.keep_every or math.inf)]
    for changes in ways:
        fit = Fit(changes, estimate(Config.model_validate(_changed(config.model_dump(exclude_unset=True), changes))))
        on_try(fit)
        if fit.estimate.peak_bytes <= limit * GIB:
            return fit
    return None


def _ladder(config: Config) -> Iterator[dict[str, Any]]:
    """Yield changes that lower memory, in the order of what they cost."""
    pipeline, of_pipeline = config.policy.pipeline, config.policy.kind != "toybox"
    if of_pipeline and not pipeline.gradient_checkpointing:
        yield {"policy.pipeline.gradient_checkpointing": True}
    if pipeline.keep_every is not None:
        yield {"policy.pipeline.keep_every": None}
    drawn, learned = config.rollout.micro_batch, config.optimizer.micro_batch
    largest = max(drawn, learned)
    while largest > 1:
        largest //= 2
        yield {"rollout.micro_batch": min(drawn, largest), "optimizer.micro_batch": min(learned, largest)}
    if of_pipeline and pipeline.quantization == "none" and find_spec("torchao") is not None:
        yield {"policy.pipeline.quantization": "int8"}
    if of_pipeline and not pipeline.block_offload:
        yield {"policy.pipeline.block_offload": True}
    rank = config.policy.lora_rank
    while config.policy.toybox.adapter == "lora" and rank > SMALLEST_RANK:
        rank = max(rank // 2, SMALLEST_RANK)
        alpha = max(1, config.policy.lora_alpha * rank // config.policy.lora_rank)
        yield {"policy.lora_rank": rank, "policy.lora_alpha": alpha}


def _changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        *sections, field = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[field] = value
    return tree
