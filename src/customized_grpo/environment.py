"""What a bug report should say of the machine."""

import os
import platform
from importlib import metadata

import torch

from customized_grpo import __version__

PACKAGES = ("torch", "peft", "safetensors", "pydantic", "jsonargparse", "numpy", "pillow")


def describe() -> dict[str, str]:
    """Names and values: versions, processor, accelerators."""
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
