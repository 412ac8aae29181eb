"""docs/metrics.md explains every key of a run's logs, and no other."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from customized_grpo.config.run import Config
from customized_grpo.io.jsonl import read_lines
from customized_grpo.tracking.console import Display
from customized_grpo.tracking.metric_info import METRIC_INFOS
from customized_grpo.training.run import train

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def documented(log: str) -> set[str]:
    """Return the keys in the first column of the table under the heading of a log."""
    table = PAGE.read_text(encoding="utf-8").split(f"## {log}")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def test_every_key_of_a_log_is_explained(
    make_config: Callable[..., Config], display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("customized_grpo.training.trainer.peak_memory", lambda device: 1 << 30)  # as on a GPU
    config = make_config({"rewards.rough": {"kind": "texture", "role": "constraint", "at_most": 50.0}})
    train(config, display)
    for log, more in (("metrics.jsonl", set[str]()), ("evaluations.jsonl", documented("Held-out metrics"))):
        keys = read_lines(config.output / log)[0].keys()
        found = {re.sub("/(prompt|identity|rough)(?=/|$)", "/<name>", key) for key in keys}
        assert documented(log) <= found <= documented(log) | more


def test_every_row_of_the_table_of_metrics_is_explained() -> None:
    known = documented("evaluations.jsonl") | documented("Held-out metrics") | documented("metrics.jsonl")
    rows = {re.sub("^reward/.+", "reward/<name>", name) for name in METRIC_INFOS}
    assert rows - known == {"seconds"}, "a column of comparisons only"


@pytest.mark.parametrize("page", sorted(PAGE.parent.glob("*.md")), ids=lambda page: page.name)
def test_links_of_documents_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
