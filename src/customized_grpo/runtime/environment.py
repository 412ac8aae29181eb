"""What a bug report should say of the machine."""

import os
import platform
from functools import cache
from importlib import metadata

import torch

from customized_grpo import __version__

PACKAGES = ("torch", "peft", "safetensors", "pydantic", "jsonargparse", "numpy", "pillow")
DECISIVE = ("torch", "peft", "diffusers", "transformers", "numpy", "pillow")
"""Libraries that decide the result of a run to the bit."""


def describe() -> dict[str, str]:
    """Return names and values: versions, processor, accelerators."""
    facts = {
        "customized-grpo": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: metadata.version(name) for name in PACKAGES},
        "cpu cores": str(os.cpu_count()),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }
    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts | {"accelerators": ", ".join(accelerators) or "none"}


@cache
def library_versions() -> dict[str, str]:
    """Return versions of the package and of the libraries that decide the result of a run."""
    return {"customized-grpo": __version__, **{name: metadata.version(name) for name in DECISIVE}}
