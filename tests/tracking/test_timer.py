"""Phases and their progress, with a clock that ticks by one at each look."""

import itertools
import time

import pytest
import torch

from customized_grpo.tracking.timer import Timer


def test_phases_follow_one_another_and_report_their_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    heard: list[tuple[str, float]] = []
    timer = Timer(lambda phase, share: heard.append((phase, share)), torch.device("cpu"))
    with timer.phase("rollout"):
        timer.progress(0.5)
    time.perf_counter()
    with timer.phase("score"):
        timer.progress(0.0)
        timer.progress(1.0)
    # The time between two phases counts to the first of them.
    assert timer.seconds() == {"rollout": 3.0, "score": 1.0, "total": 4.0}
    assert heard == [("rollout", 0.5), ("score", 0.0), ("score", 1.0)]
