"""How people see a metric: label, unit, direction and color, written once for every display.

A new metric needs one row in `METRIC_INFOS`; the terminal, reports, comparisons and benchmarks read it there. A metric
without a row is shown by its own name, as a plain number.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from customized_grpo.config.rewards import kind_hue

REWARD_PREFIX = "reward/"
"""The metric `reward/NAME` is the score of the reward with that name."""
HEADLINE = "joint_success"
"""The metric that decides: pages show it first."""


Hue = Literal["prompt", "identity", "joint", "plain", "other1", "other2", "other3", "other4"]
OTHERS: tuple[Hue, ...] = ("other1", "other2", "other3", "other4")
"""Classes of color for further scores than one of the prompt and one of the identity."""


@dataclass(frozen=True)
class MetricInfo:
    """What is shown of the metric `name`."""

    name: str
    label: str
    """In running text: "prompt reward"."""
    hue: Hue = "plain"
    """Class of color."""
    unit: Literal["number", "share", "seconds"] = "number"
    """A share lies in [0, 1] and is shown in percent, its differences in percentage points."""
    higher_is_better: bool = True
    verdict: bool = False
    """Each value is 0 or 1, and false or true in the records of an evaluation."""
    minor: bool = False
    """Left out of overviews of a run."""
    digits: int | None = None
    """Decimals of a number; None: as many as its size wants."""
    signed: bool = False
    """A difference to the base, shown with its sign."""

    @property
    def heading(self) -> str:
        """The label with a capital: "Prompt reward"."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def is_share(self) -> bool:
        """Whether values are shares in [0, 1]."""
        return self.unit == "share"


METRIC_INFOS = {
    info.name: info
    for info in (
        MetricInfo("prompt_satisfied", "prompt satisfied", "prompt", "share", verdict=True),
        MetricInfo("identity_kept", "identity kept", "identity", "share", verdict=True),
        MetricInfo("joint_success", "joint success", "joint", "share", verdict=True),
        MetricInfo("copied", "copy-paste rate", "plain", "share", higher_is_better=False, verdict=True),
        MetricInfo("copy_score", "copy-paste meter", higher_is_better=False, minor=True),
        MetricInfo("held_out_gain", "held-out gain", "joint", digits=2, signed=True),
        MetricInfo("reward_gain", "reward gain", digits=2, signed=True),
        MetricInfo("reward/prompt", "prompt reward", "prompt"),
        MetricInfo("reward/identity", "identity reward", "identity"),
        MetricInfo("dino", "DINO", "identity"),
        MetricInfo("dinov2", "DINOv2", "identity"),
        MetricInfo("clip_i", "CLIP-I", "identity"),
        MetricInfo("clip_t", "CLIP-T", "prompt"),
        MetricInfo("siglip", "SigLIP", "prompt"),
        MetricInfo("hpsv3", "HPSv3", "prompt", digits=2),
        MetricInfo("hpsv2", "HPSv2", "prompt"),
        MetricInfo("pickscore", "PickScore", "prompt"),
        MetricInfo("copy", "copy-paste meter", higher_is_better=False),
        MetricInfo("texture", "texture", higher_is_better=False, digits=2),
        MetricInfo("diversity", "diversity"),
        MetricInfo("conflict_rate", "conflict rate", unit="share", higher_is_better=False),
        MetricInfo("seconds", "training time", unit="seconds", higher_is_better=False),
    )
}
"""Metrics by name, in the order in which they are shown."""


Infos = Mapping[str, MetricInfo]
NONE: Infos = MappingProxyType({})


def is_metric(name: str) -> bool:
    """Return whether `name` has a row, or is the score of a reward."""
    return name in METRIC_INFOS or name.startswith(REWARD_PREFIX)


def metric_info(name: str, known: Infos = NONE) -> MetricInfo:
    """Return what is shown of the metric `name`: `known` of a run, else its row, else its own name."""
    if name in known:
        return known[name]
    if name in METRIC_INFOS:
        return METRIC_INFOS[name]
    reward = name.removeprefix(REWARD_PREFIX)
    return MetricInfo(name, reward.replace("_", " ") + ("" if reward == name else " reward"))


def score_infos(kinds: Mapping[str, str]) -> dict[str, MetricInfo]:
    """Return what is shown of a run's scores, by figure: `kinds` are the kinds of its rewards and metrics.

    A reward (`reward/NAME`) has a color of its own: of the prompt or the identity for the first that measures it. A
    metric has the color of what its kind measures.
    """
    infos: dict[str, MetricInfo] = {}
    free = itertools.cycle(OTHERS)
    taken: set[str] = set()
    for name, kind in kinds.items():
        info = metric_info(name)
        hue: Hue = info.hue if info.hue != "plain" else kind_hue(kind)
        if name.startswith(REWARD_PREFIX) and (hue == "plain" or hue in taken):
            hue = next(free)
        taken.add(hue)
        infos[name] = replace(info, hue=hue)
    return infos


def in_order(names: Iterable[str], known: Infos = NONE) -> list[MetricInfo]:
    """Return the infos of `names` in the order of `METRIC_INFOS`; names without a row follow as they come."""
    given = dict.fromkeys(names)
    rows = [name for name in METRIC_INFOS if name in given]
    return [metric_info(name, known) for name in (*rows, *(name for name in given if name not in METRIC_INFOS))]


def overview(names: Iterable[str], known: Infos = NONE) -> list[MetricInfo]:
    """Return the infos of `names` in order, without minor metrics."""
    return [info for info in in_order(names, known) if not info.minor]


def headline_first(infos: Iterable[MetricInfo]) -> list[MetricInfo]:
    """Return `infos` with the headline metric before the others."""
    return sorted(infos, key=lambda info: info.name != HEADLINE)
