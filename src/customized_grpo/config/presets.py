"""The presets of a comparison: each is a few settings over one and the same pipeline."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from customized_grpo.config.rewards import objectives
from customized_grpo.config.run import Config

BASE = "base"
"""The untuned generator: evaluated by every run, trained by none."""
BASELINE = "naive-1:1"
"""What the others are compared with."""
METHOD = "customized"
CALIBRATED = "customized-calibrated"
HINGE = "hinge"


class Preset(NamedTuple):
    """How a run makes advantages of its rewards."""

    advantages: Mapping[str, Any]
    """Fields of `advantages`."""
    constant: tuple[float, float] | None = None
    """Constant weights of the rewards with schedule early (the prompt) and late (the identity), in place of TDW."""


PRESETS: dict[str, Preset] = {
    "naive-1:1": Preset({"shape": "none"}, (0.5, 0.5)),
    "naive-1:1.5": Preset({"shape": "none"}, (0.6, 0.4)),
    "naive-1.5:1": Preset({"shape": "none"}, (0.4, 0.6)),
    "sars": Preset({"shape": "sars"}, (0.5, 0.5)),
    "tdw": Preset({"shape": "none"}),
    "customized": Preset({"shape": "sars"}),
    "customized-published": Preset({"shape": "sars", "lookup": "counter"}),
    CALIBRATED: Preset({"shape": "sars", "weights": "table"}),
    **{shape: Preset({"shape": shape}, (0.5, 0.5)) for shape in ("min", "max", "harmonic", "product")},
    "gdpo": Preset({"shape": "none", "normalize": "group_then_batch"}, (0.5, 0.5)),
    HINGE: Preset({"shape": "none"}, (0.5, 0.5)),
}
"""By name, in the order of tables.

naive: a fixed weighted sum, identity:prompt 1:1, 1:1.5 (the paper's tuned one) or 1.5:1. sars, tdw, customized: one
half of the paper's method, the other, both. -published: with the published code's lookup of TDW by the loop counter.
-calibrated: with the time weights that `diagnose` measures in place of TDW's. gdpo: arXiv 2601.05242. hinge: naive 1:1,
but each reward counts only up to `hinge_thresholds`.
"""


def preset_settings(preset: Preset, config: Config) -> dict[str, Any]:
    """Return the settings that make `preset` of `config`, as a tree of those that differ.

    Several rewards of one schedule divide its weight as they divide it in `config`; constant ones keep theirs. Raises
    ValueError where `config` has no rewards with schedule early and late.
    """
    followed = objectives(config.rewards)
    total = {
        schedule: sum(reward.weight for reward in followed.values() if reward.schedule == schedule)
        for schedule in ("constant", "early", "late")
    }
    if not (total["early"] and total["late"]):
        raise ValueError(
            "rewards: presets tell prompt and identity rewards by their schedules; give some schedule=early and some "
            "schedule=late"
        )
    tree: dict[str, Any] = {"advantages": dict(preset.advantages)}
    if preset.constant is not None:
        shares = dict(zip(("early", "late"), preset.constant, strict=True))
        tree["rewards"] = {
            name: {
                "schedule": "constant",
                "weight": (1 - total["constant"]) * shares[reward.schedule] * (reward.weight / total[reward.schedule]),
            }
            for name, reward in followed.items()
            if reward.schedule in shares
        }
    return tree
