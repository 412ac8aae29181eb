"""docs/glossary.md names settings that exist."""

import re
from pathlib import Path

from customized_grpo.config.messages import field_names
from customized_grpo.config.run import Config


def test_the_settings_of_the_glossary_are_fields(repository: Path) -> None:
    settings = (repository / "docs" / "glossary.md").read_text(encoding="utf-8").partition("## Settings")[2]
    own = [name for line in settings.splitlines() if line.startswith("| `") for name in _names(line.split("|")[1])]
    assert len(own) > 40 and set(own) <= set(field_names(Config))


def _names(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)
