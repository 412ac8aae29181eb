"""The presets of a comparison: each is a few settings over one and the same pipeline."""

from collections.abc import Mapping
from typing import Any

BASE = "base"
"""The untuned generator: evaluated by every run, trained by none."""
BASELINE = "naive-1:1"
"""What the others are compared with."""
METHOD = "customized"

Settings = Mapping[str, Any]

CALIBRATED = "customized-calibrated"
HINGE = "hinge"


def _advantages(**settings: Any) -> Settings:
    return {"advantages": settings}


def _naive(prompt: float, identity: float, **settings: Any) -> Settings:
    return _advantages(shape="none", weights="constant", constant=[prompt, identity], **settings)


def _one_signal(shape: str) -> Settings:
    return _advantages(shape=shape, weights="constant", constant=[0.5, 0.5])


PRESETS: dict[str, Settings] = {
    "naive-1:1": _naive(0.5, 0.5),
    "naive-1:1.5": _naive(0.6, 0.4),
    "naive-1.5:1": _naive(0.4, 0.6),
    "sars": _advantages(shape="sars", weights="constant", constant=[0.5, 0.5]),
    "tdw": _advantages(shape="none", weights="tdw"),
    "customized": _advantages(shape="sars", weights="tdw"),
    "customized-published": _advantages(shape="sars", weights="tdw", lookup="counter"),
    CALIBRATED: _advantages(shape="sars", weights="table"),
    "min": _one_signal("min"),
    "max": _one_signal("max"),
    "harmonic": _one_signal("harmonic"),
    "product": _one_signal("product"),
    "gdpo": _naive(0.5, 0.5, normalize="group_then_batch"),
    HINGE: _naive(0.5, 0.5),
}
"""By name, in the order of tables.

naive: a fixed weighted sum, identity:prompt 1:1, 1:1.5 (the paper's tuned one) or 1.5:1. sars, tdw, customized: one
half of the paper's method, the other, both. -published: with the published code's lookup of TDW by the loop counter.
-calibrated: with the time weights that `diagnose` measures in place of TDW's. gdpo: arXiv 2601.05242. hinge: naive 1:1,
but each reward counts only up to `hinge_thresholds`.
"""
