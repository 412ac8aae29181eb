"""Settings that bring a run under a limit of memory, the cheapest first."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from customized_grpo.config.policy import PIPELINES
from customized_grpo.config.run import Config, set_dotted
from customized_grpo.training.estimate import Estimate

GIB = 2.0**30
SMALLEST_RANK = 16
MARGIN = 0.9
"""Share of the memory that may be planned: the rest is for activations of rewards, and what an allocator adds."""
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
    """Return the first settings, with those before them, that bring the peak under nine tenths of `limit` GiB, or None.

    They are tried in the order of what they cost: time, then a coarser base, then a smaller adapter. What turns out not
    to be needed is taken back. `on_try` hears of each try.
    """
    steps: list[dict[str, Any]] = []
    for step in _ladder(config):
        steps.append(step)
        fit = _attempt(config, _merged(steps), estimate, on_try)
        if not fits(fit.estimate, limit):
            continue
        for number in reversed(range(len(steps) - 1)):
            try:
                without = _attempt(config, _merged(steps[:number] + steps[number + 1 :]), estimate, on_try)
            except ValidationError:  # a later step takes this one
                continue
            if fits(without.estimate, limit):
                fit = without
                del steps[number]
        return fit
    return None


def fits(estimate: Estimate, limit: float) -> bool:
    """Return whether the peak leaves a tenth of `limit` GiB to what is not counted."""
    return estimate.peak_bytes <= MARGIN * limit * GIB


def roomier(
    config: Config,
    limit: float,
    estimate: Callable[[Config], Estimate],
    on_try: Callable[[Fit], object] = lambda fit: None,
) -> Fit | None:
    """Return the settings that recompute the least and fit into `limit` GiB; None where none do less."""
    pipeline = config.policy.pipeline
    if config.policy.kind not in PIPELINES or not pipeline.gradient_checkpointing or pipeline.block_offload:
        return None
    ways: list[dict[str, Any]] = [{"policy.pipeline.gradient_checkpointing": False, "policy.pipeline.keep_every": None}]
    ways += [{"policy.pipeline.keep_every": every} for every in KEPT if every < (pipeline.keep_every or math.inf)]
    for changes in ways:
        fit = _attempt(config, changes, estimate, on_try)
        if fits(fit.estimate, limit):
            return fit
    return None


def _ladder(config: Config) -> Iterator[dict[str, Any]]:
    """Yield changes that lower memory, in the order of what they cost."""
    pipeline, of_pipeline = config.policy.pipeline, config.policy.kind in PIPELINES
    if of_pipeline and not pipeline.gradient_checkpointing:
        yield {"policy.pipeline.gradient_checkpointing": True}
    if pipeline.keep_every is not None:
        yield {"policy.pipeline.keep_every": None}
    drawn, learned = config.rollout.micro_batch, config.optimizer.micro_batch
    largest = max(drawn, learned)
    while largest > 1:
        largest //= 2
        yield {"rollout.micro_batch": min(drawn, largest), "optimizer.micro_batch": min(learned, largest)}
    if config.optimizer.kind == "adamw" and find_spec("bitsandbytes") is not None:
        yield {"optimizer.kind": "adamw_8bit"}
    if of_pipeline and pipeline.quantization == "none" and find_spec("torchao") is not None:
        yield {"policy.pipeline.quantization": "int8"}
    if of_pipeline and pipeline.text_encoder_quantization == "none" and find_spec("torchao") is not None:
        yield {"policy.pipeline.text_encoder_quantization": "int8"}
    if of_pipeline and not pipeline.block_offload and pipeline.quantization != "nf4":
        against = {f"policy.pipeline.{name}": False for name in ("compile", "fsdp") if getattr(pipeline, name)}
        yield {"policy.pipeline.block_offload": True} | against
    rank = SMALLEST_RANK if config.policy.init_from else config.policy.lora_rank  # an adapter has its own
    while config.policy.toybox.adapter == "lora" and rank > SMALLEST_RANK:
        rank = max(rank // 2, SMALLEST_RANK)
        alpha = max(1, config.policy.lora_alpha * rank // config.policy.lora_rank)
        yield {"policy.lora_rank": rank, "policy.lora_alpha": alpha}


def _merged(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for step in steps for name, value in step.items()}


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    tree = config.model_dump(exclude_unset=True)
    for name, value in changes.items():
        set_dotted(tree, name, value)
    return Config.model_validate(tree)


def _attempt(
    config: Config, changes: dict[str, Any], estimate: Callable[[Config], Estimate], on_try: Callable[[Fit], object]
) -> Fit:
    fit = Fit(changes, estimate(_changed(config, changes)))
    on_try(fit)
    return fit
