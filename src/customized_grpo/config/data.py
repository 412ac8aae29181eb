"""The datasets of a run."""

from pathlib import Path

from pydantic import Field

from customized_grpo.config.section import Section


class DataConfig(Section):
    """Folders with a metadata.jsonl each (see docs/data.md)."""

    path: Path = Path("data/toybox/train")
    """Training prompts and references."""
    validation: Path | None = None
    """Prompts and references to validate on during training; unset: the first ones of the training folder."""
    test: Path | None = None
    """Prompts and references for the before-and-after evaluation when training ends; unset: none is made."""
    max_pixels: int = Field(50_000_000, ge=1, le=178_956_970)
    """Largest image that is accepted, in pixels; Pillow opens none that is larger than the upper bound."""
