"""docs/paper_index.md: each block is a configuration, and each of its lines names its source."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from customized_grpo.config.recipes import find_recipe
from customized_grpo.config.run import Config

PAGE = Path(__file__).parents[1] / "docs" / "paper_index.md"
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
SOURCE = re.compile(r"(?:\S+\.(?:sh|py|yaml|md): |paper: |ours[:;] )\S")


def over(settings: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """Return `settings` with those of `block` laid over them; rewards that `block` does not name go."""
    merged = dict(settings)
    if "rewards" in block and "rewards" in settings:
        merged["rewards"] = {name: settings["rewards"].get(name, {}) for name in block["rewards"]}
    for key, value in block.items():
        merged[key] = over(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def test_all_papers_have_a_block() -> None:
    assert len(BLOCKS) == 7


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_a_configuration(block: str) -> None:
    settings = yaml.safe_load(block)
    Config.model_validate(settings)
    recipe = "uno" if settings.get("policy", {}).get("kind") == "uno" else "flux1-kontext"
    Config.model_validate(over(yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8")), settings))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_line_with_a_value_names_its_source(block: str) -> None:
    values = [line for line in block.splitlines() if not line.endswith(":")]
    assert values and [line for line in values if not SOURCE.match(line.partition(" # ")[2])] == []
