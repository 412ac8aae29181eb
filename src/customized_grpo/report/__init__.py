"""One self-contained HTML page about a run: what was run, what changed, how training went, pictures."""

from customized_grpo.evaluation.statistics import mean_interval, paired_difference
from customized_grpo.report.page import write_report

__all__ = ["mean_interval", "paired_difference", "write_report"]
