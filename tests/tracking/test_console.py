import io
import re

import pytest
from rich.console import Console

from customized_grpo.tracking.console import Display, RunState
from customized_grpo.tracking.metric_info import METRIC_INFOS, MetricInfo


def test_the_comparison_shows_chance_and_ceiling_beside_the_figures() -> None:
    text = io.StringIO()
    side = {
        "summary": {"joint_success": {"mean": 0.33, "low": 0.3, "high": 0.36}},
        "chance": {"joint_success": 0.01},
        "ceiling": {"joint_success": 0.99},
    }
    tuned = side | {"summary": {"joint_success": {"mean": 0.6, "low": 0.55, "high": 0.65}}}
    Display(Console(file=text, width=80)).comparison({"base": side, "tuned": tuned})
    row = next(line for line in text.getvalue().splitlines() if "joint success" in line)
    assert [part in row for part in ("33.0%", "60.0% (55.0–65.0)", "1.0%", "99.0%")] == [True] * 4


def grid_text(terminal: bool) -> str:
    """What is shown of three runs of which one starts and ends well and one fails."""
    text = io.StringIO()
    states = [RunState("sars seed 0", "done", 50, 50, 0.4), *(RunState(f"tdw seed {n}", "waiting", 50) for n in (0, 1))]
    with Display(Console(file=text, width=120, force_terminal=terminal)).grid(states) as show:
        states[1].status, states[1].iteration = "running", 7
        show()
        states[1].status, states[1].iteration, states[1].joint = "done", 50, 0.456
        states[2].status, states[2].note = "failed", "no space left"
        show()
    return text.getvalue()


def test_a_grid_is_a_line_for_each_change_where_there_is_no_terminal() -> None:
    assert grid_text(terminal=False).splitlines() == [
        "[1/3] tdw seed 0: running  7/50",
        "[3/3] tdw seed 0: done  50/50  joint success 45.6% on the last validation",
        "[3/3] tdw seed 1: failed  0/50  no space left",
    ]


def test_a_grid_is_one_live_table_of_all_runs_on_a_terminal() -> None:
    text = grid_text(terminal=True)
    last = text[text.rindex("0 running, 1 failed, 2 done, 0 waiting") :]
    assert [row in last for row in ("sars seed 0", "tdw seed 0", "tdw seed 1", "45.6%", "no space left")] == [True] * 5
    assert last.index("tdw seed 1") < last.index("sars seed 0"), "what failed stands above what is done"


def shown(row: dict[str, float]) -> str:
    """What is said of a validation."""
    text = io.StringIO()
    Display(Console(file=text, width=200)).validation({"iteration": 3, "pairs": 4, **row})
    return text.getvalue().strip()


def test_a_validation_shows_metrics_in_order_and_leaves_minor_ones_out() -> None:
    row = {"copy_score": 0.1, "reward/style": 0.7, "reward/prompt": 0.81234, "copied": 0.25, "prompt_satisfied": 0.5}
    figures = "prompt satisfied 50.0%  copy-paste rate 25.0%  prompt reward 0.812  style reward 0.700"
    assert shown(row) == f"validation at iteration 3 (4 pairs): {figures}"


def test_a_new_metric_needs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown({"brightness": 0.5}).endswith(": brightness 0.500")
    monkeypatch.setitem(METRIC_INFOS, "brightness", MetricInfo("brightness", "lit pictures", unit="share"))
    assert shown({"brightness": 0.5}).endswith(": lit pictures 50.0%")
    text = io.StringIO()
    side = {"summary": {"brightness": {"mean": 0.5, "low": 0.4, "high": 0.6}}, "chance": {}, "ceiling": {}}
    Display(Console(file=text, width=80)).comparison({"base": side, "tuned": side})
    assert "50.0% (40.0–60.0)" in next(line for line in text.getvalue().splitlines() if "lit pictures" in line)


def test_an_iteration_shows_every_reward_by_name() -> None:
    text = io.StringIO()
    means = {f"reward/{name}/mean": value for name, value in (("prompt", 0.5), ("identity", 0.25), ("style", 1.0))}
    rest = {
        "conflict_rate": 0.4, "silent_groups": 0.0, "grad_norm": 1.0, "seconds/total": 2.0, "samples_per_second": 11.25,
    }  # fmt: skip
    with Display(Console(file=text, width=200)).training(9, 0) as show:
        show.iteration({"iteration": 1, "reward/prompt/std": 0.1, **means, **rest}, None)
        show.iteration({"iteration": 2, **means, **rest, "peak_memory_gib": 18.4}, 3725.0)
    first, second = text.getvalue().splitlines()
    assert first.startswith("iteration 1/9  prompt 0.500  identity 0.250  style 1.000  conflict 40%")
    assert first.endswith("2.0 s  11.2 images/s")
    assert second.endswith("2.0 s  11.2 images/s  18.4 GiB  1 h 2 min left")


def test_a_terminal_shows_what_is_left_of_the_run_and_of_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("customized_grpo.tracking.console.time.monotonic", lambda: now[0])
    text = io.StringIO()
    figures = {
        "iteration": 1, "silent_groups": 0.0, "grad_norm": 1.0, "seconds/total": 2.0, "samples_per_second": 11.25,
    }  # fmt: skip
    with Display(Console(file=text, width=200, force_terminal=True)).training(9, 0) as show:
        show.iteration(figures, 150.0)
        show.phase("rollout", 0.0)
        now[0] += 60
        show.phase("rollout", 0.25)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).splitlines()[-1]
    assert "rollout 25% 3 min 0 s left" in last and "11.2 images/s" in last and "2 min 30 s left" in last
