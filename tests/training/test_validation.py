"""What validations decide: which adapter is kept, when a run ends, and that a resumed run decides alike."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.evaluation.evaluator import Evaluation
from customized_grpo.generation import Options, draw
from customized_grpo.tracking.console import Display
from customized_grpo.tracking.timer import OnProgress
from customized_grpo.training.export import export
from customized_grpo.training.run import evaluate_run
from customized_grpo.training.run_dir import adapter_folder, load_run_config
from customized_grpo.training.validation import Validation

MakeConfig = Callable[..., Config]
RunTraining = Callable[..., Path]
ReadLog = Callable[[Path], list[dict[str, Any]]]
ADAPTER = "adapter_model.safetensors"
EACH = {"evaluation.every": 1, "checkpoint.every": 1, "checkpoint.keep_every": 1}
CURVE = {0: 0.0, 1: 0.2, 2: 0.5, 3: 0.1, 4: 0.5, 5: 0.6, 6: 0.1}
"""Held-out gains by iteration."""


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[int, float]], None]:
    """Have the validations of runs find held-out gains by iteration."""
    measured = Validation.evaluate

    def follow_(curve: Mapping[int, float]) -> None:
        def evaluate(self: Validation, iteration: int, on_progress: OnProgress) -> tuple[Evaluation, dict[str, Any]]:
            evaluation, row = measured(self, iteration, on_progress)
            return evaluation, row | {"held_out_gain": curve[iteration]}

        monkeypatch.setattr(Validation, "evaluate", evaluate)

    return follow_


def said(display: Display) -> str:
    return display.console.file.getvalue().replace("\n", " ")  # type: ignore[attr-defined]


def of_checkpoint(run: Path, iteration: int, out: Path) -> bytes:
    return (export(run / "checkpoints" / f"{iteration:06d}", out) / ADAPTER).read_bytes()


def test_the_adapter_of_the_best_validation_is_kept(
    follow: Callable[..., None], make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, display: Display
) -> None:
    """Of two equally good ones the earlier."""
    follow(CURVE)
    run_training(make_config(EACH | {"iterations": 4}))
    run = tmp_path / "run"
    record = json.loads((run / "best" / "best.json").read_text())
    assert (record["iteration"], record["select"], record["value"]) == (2, "held_out_gain", 0.5)
    assert (run / "best" / ADAPTER).read_bytes() == of_checkpoint(run, 2, tmp_path / "second")
    assert (run / ADAPTER).read_bytes() == of_checkpoint(run, 4, tmp_path / "fourth")
    assert "best at iteration 2: held-out gain +0.50" in said(display)
    assert "Best at iteration 2: held-out gain +0.50" in (run / "report.html").read_text()


def test_averaged_weights_are_kept_where_they_are_evaluated(
    follow: Callable[..., None], make_config: MakeConfig, run_training: RunTraining, tmp_path: Path
) -> None:
    follow({0: 0.0, 1: 0.1, 2: 0.2})
    run_training(make_config(EACH | {"iterations": 2, "ema.decay": 0.9}))
    best, ema = ((tmp_path / "run" / name / ADAPTER).read_bytes() for name in ("best", "ema"))
    assert best == ema != (tmp_path / "run" / ADAPTER).read_bytes()


def test_a_run_ends_when_no_validation_was_better_for_as_long_as_patience_says(
    follow: Callable[..., None], make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, read_log: ReadLog,
    toybox_data: Path, display: Display,
) -> None:  # fmt: skip
    follow(CURVE)
    run_training(make_config(EACH | {"iterations": 6, "evaluation.patience": 2, "data.test": toybox_data / "test"}))
    run = tmp_path / "run"
    assert [row["iteration"] for row in read_log(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert "no better one among the last 2 validations: training ends here" in said(display)
    assert adapter_folder(run, ema=False) == run, "it is a finished run"
    results = {
        name: json.loads((run / "evaluation" / f"{name}.json").read_text()) for name in ("base", "best", "tuned")
    }
    assert {name: result["iteration"] for name, result in results.items()} == {"base": 0, "best": 2, "tuned": 4}
    assert {"held_out_gain", "texture"} <= results["best"]["summary"].keys()
    report = (run / "report.html").read_text()
    assert "Best, iteration 2" in report and "Last, iteration 4" in report


@pytest.mark.parametrize("back", [1, 3])
def test_a_resumed_run_has_the_same_best_and_ends_alike(
    follow: Callable[..., None], make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, read_log: ReadLog,
    back: int,
) -> None:  # fmt: skip
    follow(CURVE)
    config = make_config(EACH | {"iterations": 6, "evaluation.patience": 2})
    run_training(config)
    run, straight = tmp_path / "run", tmp_path / "straight"
    shutil.copytree(run, straight)
    run_training(config, resume_from=run / "checkpoints" / f"{back:06d}")
    for name in ("evaluations.jsonl", ADAPTER, f"best/{ADAPTER}", "best/best.json"):
        assert (run / name).read_bytes() == (straight / name).read_bytes()
    assert len(read_log(run / "metrics.jsonl")) == 4


def test_more_patience_goes_on(
    follow: Callable[..., None], make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, read_log: ReadLog
) -> None:
    follow(CURVE)
    run_training(make_config(EACH | {"iterations": 6, "evaluation.patience": 2}))
    run_training(make_config(EACH | {"iterations": 6, "evaluation.patience": 4}), resume=True)
    run = tmp_path / "run"
    assert len(read_log(run / "metrics.jsonl")) == 6
    assert json.loads((run / "best" / "best.json").read_text())["iteration"] == 5


def test_a_best_adapter_after_the_checkpoint_is_forgotten(
    follow: Callable[..., None], make_config: MakeConfig, run_training: RunTraining, tmp_path: Path
) -> None:
    follow({0: 0.0, 1: 0.1, 2: 0.2})
    run_training(make_config(EACH | {"iterations": 2}))
    run = tmp_path / "run"
    follow({0: 0.0, 1: 0.1, 2: 0.05})
    run_training(make_config(EACH | {"iterations": 2}), resume_from=run / "checkpoints" / "000001")
    assert not (run / "best").exists(), "iteration 1 is best, and its adapter was given up for iteration 2's"


def test_a_run_whose_base_is_best_says_so(
    follow: Callable[..., None], make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, display: Display,
    toybox_data: Path,
) -> None:  # fmt: skip
    follow({0: 0.0, 1: -0.1})
    run_training(make_config(EACH | {"iterations": 1, "data.test": toybox_data / "test"}))
    assert "best at iteration 0: held-out gain +0.00; no validation was better than the base" in said(display)
    assert not (tmp_path / "run" / "evaluation" / "best.json").exists(), "it is the base"


def test_the_best_adapter_is_drawn_with_evaluated_and_exported(
    follow: Callable[..., None], make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, toybox_data: Path,
    display: Display,
) -> None:  # fmt: skip
    follow({0: 0.0, 1: 0.9, 2: 0.5})
    run_training(make_config(EACH | {"iterations": 2, "optimizer.learning_rate": 0.02}))
    run = tmp_path / "run"
    asked = {"run": run, "prompt": "a ball on the beach", "device": "cpu"}
    asked["reference"] = [toybox_data / "train" / "references" / "train-00000.png"]
    first = draw(Options(**asked, checkpoint=run / "checkpoints" / "000001"))
    assert bool((draw(Options(**asked, best=True)) == first).all())
    assert not bool((draw(Options(**asked)) == first).all())
    out = export(run, tmp_path / "out", best=True)
    assert (out / ADAPTER).read_bytes() == of_checkpoint(run, 1, tmp_path / "first")
    evaluate_run(run, toybox_data / "test", 2, display, best=True)
    result = json.loads((run / "evaluation" / "best.json").read_text())
    assert result["iteration"] == 1 and not (run / "evaluation" / "tuned.json").exists()
    for wrong, message in (
        ({"base": True}, "leave --base out"), ({"checkpoint": run / "checkpoints" / "000001"}, "two generators"),
        ({"ema": True}, "leave --ema out"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            draw(Options(**asked, best=True, **wrong))
    with pytest.raises(UserError, match="is a checkpoint; name its run"):
        export(run / "checkpoints" / "000001", tmp_path / "none", best=True)


def test_a_run_without_a_best_adapter_says_why(
    make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, display: Display
) -> None:
    run_training(make_config({"iterations": 1, "evaluation.held_out": []}))
    run = tmp_path / "run"
    assert "nothing held out is measured, so no adapter is kept as the best" in said(display)
    assert not (run / "best").exists() and load_run_config(run).select is None
    with pytest.raises(UserError, match=r"--best: .* has no best adapter"):
        adapter_folder(run, ema=False, best=True)


def test_selecting_on_training_data_is_said(
    make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, display: Display, toybox_data: Path
) -> None:
    run_training(make_config({"iterations": 1}))
    assert "the best adapter by held_out_gain is chosen on training samples" in said(display)


def test_overwriting_a_run_deletes_its_best_adapter(
    follow: Callable[..., None], make_config: MakeConfig, run_training: RunTraining, tmp_path: Path
) -> None:
    follow({0: 0.0, 1: 0.1})
    run_training(make_config(EACH | {"iterations": 1}))
    assert (tmp_path / "run" / "best").is_dir()
    follow({0: 0.1, 1: 0.0})
    run_training(make_config(EACH | {"iterations": 1, "evaluation.held_out": []}), overwrite=True)
    assert not (tmp_path / "run" / "best").exists()


def test_a_metric_that_is_a_reward_is_that_reward(
    make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, read_log: ReadLog
) -> None:
    metrics = {
        "same": {"kind": "toybox_prompt"},
        "blind": {"kind": "toybox_identity", "toybox_identity": {"leak": "low"}},
    }
    config = make_config({"iterations": 1, "evaluation.metrics": metrics})
    assert config.held_out == ("prompt_satisfied", "identity_kept", "joint_success", "blind")
    run_training(config)
    for row in read_log(tmp_path / "run" / "evaluations.jsonl"):
        assert row["same"] == row["reward/prompt"] and row["blind"] != row["reward/identity"]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (
            {"select": "nothing"},
            "evaluation.select: no metric 'nothing'; choose among held_out_gain, prompt_satisfied, ",
        ),
        ({"select": "texture"}, "evaluation.select: no metric 'texture'"),
        ({"select": "diversity", "diversity_prompts": 0}, "evaluation.select: no metric 'diversity'"),
        ({"held_out": ["clip"]}, "evaluation.held_out: no metric 'clip'; choose among prompt_satisfied, "),
        (
            {"held_out": ["same"], "metrics": {"same": {"kind": "toybox_prompt"}}},
            "evaluation.held_out: 'same' measures what the reward prompt is",
        ),
        ({"held_out": [], "patience": 2}, "evaluation.patience: nothing held out is measured"),
        ({"metrics": {"texture": {"kind": "clip_i"}}}, "'texture' is a name of what is built in"),
        ({"patience": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_selected_by_is_refused(evaluation: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({"evaluation": evaluation})


def test_a_name_of_a_metric_can_be_selected_by() -> None:
    metrics = {"fidelity": {"kind": "toybox_identity", "toybox_identity": {"leak": "low"}}}
    config = Config.model_validate({"evaluation": {"select": "fidelity", "metrics": metrics, "patience": 3}})
    assert config.select == "fidelity"
