import io

from rich.console import Console

from customized_grpo.display import Display


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
