"""Families of pipelines that a test goes through, and the libraries that some need."""

from importlib.util import find_spec

import pytest

from customized_grpo.factory.pipelines import PIPELINES

FAST = ("flux1-kontext", "qwen-image-edit-plus")
"""One family without a second pass for guidance and one with it: where a test takes long, the others are slow tests."""
EVERY_FAMILY = pytest.mark.parametrize("kind", tuple(PIPELINES))
EVERY_FAMILY_OR_FAST = pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in PIPELINES]
)
QUANTIZATION = [
    pytest.mark.quantization,
    pytest.mark.skipif(
        find_spec("torchao") is None or find_spec("bitsandbytes") is None,
        reason="torchao and bitsandbytes are not installed; make test-quantization installs them apart",
    ),
]
"""Marks of tests that quantize."""
