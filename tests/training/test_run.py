import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from customized_grpo.config.run import Config
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.factory.rewards import build_rewards
from customized_grpo.io.jsonl import Metrics
from customized_grpo.report import write_report
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.tracking.console import Display
from customized_grpo.training.run import evaluate_run
from customized_grpo.training.run_dir import load_run_config
from customized_grpo.training.trainer import Trainer
from customized_grpo.types import PromptBatch

MakeConfig = Callable[..., Config]
RunTraining = Callable[..., Path]
ReadLog = Callable[[Path], list[dict[str, Any]]]
ADAPTER = Path("adapter_model.safetensors")
FOUR = {"iterations": 4, "checkpoint.every": 2, "optimizer.num_minibatches": 2}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# what a run leaves


def test_a_run_leaves_its_files(
    tmp_path: Path, toybox_data: Path, make_config: MakeConfig, run_training: RunTraining, read_log: ReadLog
) -> None:
    config = make_config({"data.test": toybox_data / "test"})
    report = run_training(config)
    run = tmp_path / "run"
    assert report == run / "report.html" and "<html" in report.read_text()
    assert load_run_config(run) == config
    assert [row["iteration"] for row in read_log(run / "metrics.jsonl")] == [1, 2]
    assert [row["iteration"] for row in read_log(run / "evaluations.jsonl")] == [0, 2]
    assert sorted(path.name for path in (run / "galleries").iterdir()) == ["000000.png", "000002.png"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["000002"]
    assert (run / ADAPTER).is_file() and not (run / "tensorboard").exists()
    weights = json.loads((run / "weights.json").read_text())
    assert len(weights["sigmas"]) == 5 and len(weights["weights"]) == 4
    for name in ("base", "tuned"):
        result = json.loads((run / "evaluation" / f"{name}.json").read_text())
        assert result["split"] == "test" and result["pairs"] == len(result["records"]) == 3
        assert set(result["chance"]) == {"prompt_satisfied", "identity_kept", "joint_success"}
        assert set(result["ceiling"]) == {*result["chance"], "copied"}
    pictures = {path.name for path in (run / "evaluation" / "images").iterdir()}
    assert pictures == {f"test-0000{i}_{kind}.png" for i in range(3) for kind in ("base", "tuned", "reference")}


def test_a_log_line_holds_every_promised_figure(four: Path) -> None:
    row = json.loads((four / "metrics.jsonl").read_text().splitlines()[0])
    rewards = {f"reward/{name}/{figure}" for name in ("prompt", "identity") for figure in ("mean", "std")}
    quadrants = {f"quadrant/{name}" for name in ("both_good", "only_prompt", "only_identity", "both_bad")}
    seconds = {f"seconds/{phase}" for phase in ("rollout", "score", "update", "total")}
    ratios = {"ratio/mean", "ratio/min", "ratio/max", "first_ratio/min", "first_ratio/max", "clip_fraction"}
    others = {
        "iteration",
        "steps",
        "conflict_rate",
        "silent_groups",
        "invalid_share",
        "loss",
        "kl",
        "grad_norm",
        "samples_per_second",
    }
    assert rewards | quadrants | seconds | ratios | others <= row.keys()


def test_the_gallery_shows_references_base_and_tuned(four: Path) -> None:
    first, last = (Image.open(four / "galleries" / f"00000{i}.png") for i in (0, 4))
    assert first.size == last.size and first.size[1] > first.size[0] and first.tobytes() != last.tobytes()


def test_a_failed_score_is_null_in_the_log(
    make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def with_nan(self: Trainer[Any], *arguments: Any) -> Metrics:
        return step(self, *arguments) | {"reward/prompt/mean": float("nan")}

    monkeypatch.setattr(Trainer, "train_step", with_nan)
    run_training(make_config({"iterations": 1}))
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["reward/prompt/mean"] is None


def test_a_ratio_away_from_one_raises_the_alarm(
    make_config: MakeConfig, run_training: RunTraining, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, *a: step(self, *a) | {"first_ratio/max": 1.00002})
    run_training(make_config({"iterations": 1}))
    assert "WARNING: iteration 1: the first-pass ratio is 2.0e-05 away from 1" in display.console.file.getvalue()


class Away(Reward):
    """A server's reward whose first `failing` scores of a group are missing."""

    def __init__(self, failing: int) -> None:
        self.failing = failing

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        valid = torch.ones(images.shape[:2], dtype=torch.bool)
        valid[:, : self.failing] = False
        return Scores(images.mean((2, 3, 4)), valid, "rewards.prompt.remote.url: http://a:1 did not answer")


@pytest.mark.parametrize("failing", [1, 4])
def test_scores_that_are_missing_are_told_with_their_reason(
    failing: int, make_config: MakeConfig, run_training: RunTraining, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = build_rewards
    monkeypatch.setattr(
        "customized_grpo.training.run.build_rewards", lambda *parts: rewards(*parts) | {"prompt": Away(failing)}
    )
    config = make_config({"iterations": 1, "rollout.group_size": 4, "rewards.prompt.max_invalid_share": 0.3})
    reason = r"(?:rewards|scores) could not be computed.* \(rewards.prompt.remote.url: http://a:1 did not answer\)"
    if failing == 4:
        with pytest.raises(TrainingError, match=f"100% of the prompt {reason}"):
            run_training(config)
    else:
        run_training(config)
        said = display.console.file.getvalue().replace("\n", " ")
        assert re.search(f"WARNING: iteration 1: 12.5% of the {reason}; they count in no", said)
        assert re.search(f"WARNING: validation after iteration 1: 14.3% of the {reason}; its means are of", said)


def test_an_iteration_that_teaches_nothing_is_told(
    make_config: MakeConfig, run_training: RunTraining, display: Display, monkeypatch: pytest.MonkeyPatch,
    reward_of: Callable[..., Any], tmp_path: Path, read_log: ReadLog,
) -> None:  # fmt: skip
    """All rewards equal: no quadrant has a share, least of all the one in which both are bad."""
    equal = reward_of(lambda images: torch.full(images.shape[:2], 0.5))
    monkeypatch.setattr(
        "customized_grpo.training.run.build_rewards", lambda *parts: {"prompt": equal, "identity": equal}
    )
    run_training(make_config({"iterations": 1}))
    row = read_log(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["silent_groups"] == 1.0 and row["grad_norm"] == 0.0
    assert row["quadrant/both_bad"] is None and row["conflict_rate"] is None
    said = display.console.file.getvalue().replace("\n", " ")
    assert "WARNING: iteration 1: no group taught anything: within each all images have equal rewards" in said
    assert "conflict -  silent groups 100%" in said
    report = (tmp_path / "run" / "report.html").read_text()
    assert "In 1 of 1 iterations no group taught anything" in report and "Silent groups" in report


def test_tensorboard_events_are_written_when_asked(
    make_config: MakeConfig, run_training: RunTraining, tmp_path: Path
) -> None:
    run_training(make_config({"iterations": 1, "log.report_to": ["tensorboard"]}))
    events = list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(events) == 1 and b"metrics/reward/prompt/mean" in events[0].read_bytes()


# the output folder


def test_a_folder_with_something_in_it_is_refused(
    tmp_path: Path, make_config: MakeConfig, run_training: RunTraining
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    for flags, message in (
        ({}, "not empty"), ({"overwrite": True}, "other files than a run's"), ({"resume": True}, "other files"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_training(make_config(), **flags)
    assert listing(tmp_path / "run") == {"precious.txt": b"mine"}


def test_a_file_is_no_folder(tmp_path: Path, make_config: MakeConfig, run_training: RunTraining) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        run_training(make_config())


def test_going_on_and_starting_anew_exclude_each_other(make_config: MakeConfig, run_training: RunTraining) -> None:
    with pytest.raises(UserError, match="--resume and --resume_from continue a run and --overwrite deletes it"):
        run_training(make_config(), resume=True, overwrite=True)


def test_overwriting_deletes_the_old_run_and_nothing_else(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, read_log: ReadLog
) -> None:
    shutil.copytree(four, tmp_path / "run")
    (tmp_path / "run" / "note.txt").write_text("old")
    run_training(make_config({"iterations": 1, "seed": 1}), overwrite=True)
    assert [row["iteration"] for row in read_log(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert (tmp_path / "run" / "note.txt").read_text() == "old"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000001"]


def test_a_folder_that_is_no_run_is_not_overwritten(
    tmp_path: Path, make_config: MakeConfig, run_training: RunTraining
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="not the configuration that train wrote"):
        run_training(make_config(), overwrite=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1"


@pytest.mark.parametrize("missing", ["data", "judge"])
def test_bad_input_deletes_nothing(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, tiny_weights: Path, missing: str
) -> None:
    shutil.copytree(four, tmp_path / "run")
    shutil.copytree(tiny_weights, tmp_path / "weights")
    (tmp_path / "weights" / "judge.safetensors").unlink()
    changes = {"data": {"data.path": tmp_path / "none"}, "judge": {"policy.toybox.weights": tmp_path / "weights"}}
    before = listing(tmp_path / "run")
    with pytest.raises(UserError, match=r"none does not exist|judge.safetensors"):
        run_training(make_config(changes[missing]), overwrite=True)
    assert listing(tmp_path / "run") == before


# afterwards


def test_a_run_is_evaluated_afterwards_on_any_data(
    four: Path, tmp_path: Path, toybox_data: Path, display: Display
) -> None:
    shutil.copytree(four, tmp_path / "run")
    report = evaluate_run(tmp_path / "run", toybox_data / "test", 2, display)
    base, tuned = (json.loads((tmp_path / "run" / "evaluation" / f"{n}.json").read_text()) for n in ("base", "tuned"))
    assert report == tmp_path / "run" / "report.html"
    assert (
        base["split"] == "test"
        and (base["iteration"], tuned["iteration"]) == (0, 4)
        and base["pairs"] == tuned["pairs"] == 2
    )
    assert base["summary"]["reward/prompt"] != tuned["summary"]["reward/prompt"]
    assert "before and after" in display.console.file.getvalue()


def test_a_run_that_goes_on_is_not_evaluated_by_its_earlier_adapter(
    four: Path, tmp_path: Path, toybox_data: Path, display: Display
) -> None:
    shutil.copytree(four, tmp_path / "run")
    config = yaml.safe_load((four / "config.yaml").read_text())
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config | {"iterations": 9}))
    with pytest.raises(UserError, match=r"is at iteration 4 of 9, .* train --resume"):
        evaluate_run(tmp_path / "run", toybox_data / "test", 2, display)


def test_averaged_weights_are_what_is_evaluated(
    tmp_path: Path, toybox_data: Path, make_config: MakeConfig, run_training: RunTraining, read_log: ReadLog,
    display: Display,
) -> None:  # fmt: skip
    """Unless `ema.evaluate` is off; training is the same with and without them."""
    changes = {"ema.decay": 0.9, "data.test": toybox_data / "test", "optimizer.learning_rate": 1e-2}
    runs = {"averaged": {}, "trained": {"ema.evaluate": False}}
    for name, more in runs.items():
        run_training(make_config(changes | more | {"output": tmp_path / name}))
    run_training(make_config(changes | {"ema.decay": None, "output": tmp_path / "none"}))
    assert not (tmp_path / "none" / "ema").exists()

    def tuned(run: str) -> Any:
        return json.loads((tmp_path / run / "evaluation" / "tuned.json").read_text())["summary"]

    def validated(run: str) -> Any:
        return read_log(tmp_path / run / "evaluations.jsonl")[-1]

    for run in ("averaged", "trained"):
        assert (tmp_path / run / ADAPTER).read_bytes() == (tmp_path / "none" / ADAPTER).read_bytes()
        assert (tmp_path / run / "ema" / ADAPTER).read_bytes() != (tmp_path / run / ADAPTER).read_bytes()
    assert tuned("trained") == tuned("none") and tuned("averaged") != tuned("none")
    assert validated("trained") == validated("none") and validated("averaged") != validated("none")
    assert read_log(tmp_path / "averaged" / "metrics.jsonl") == read_log(tmp_path / "none" / "metrics.jsonl")

    averaged = tuned("averaged")
    evaluate_run(tmp_path / "averaged", None, None, display)
    assert tuned("averaged") == tuned("none")
    evaluate_run(tmp_path / "averaged", None, None, display, ema=True)
    assert tuned("averaged") == averaged
    with pytest.raises(UserError, match=r"--ema: .* holds no averaged weights .*ema\.decay"):
        evaluate_run(tmp_path / "none", None, None, display, ema=True)


def test_a_report_is_renewed(four: Path, tmp_path: Path) -> None:
    shutil.copytree(four, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    assert write_report(tmp_path / "run").is_file()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        load_run_config(tmp_path)


@pytest.mark.parametrize("text", ["seeds: 1", "iterations: [", "just words"])
def test_a_damaged_configuration_of_a_run_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config.yaml"):
        load_run_config(tmp_path)


def test_masks_on_some_samples_only_do_not_matter_to_a_whole_reference(
    tmp_path: Path, toybox_data: Path, make_config: MakeConfig, run_training: RunTraining
) -> None:
    shutil.copytree(toybox_data / "train", tmp_path / "mixed")
    manifest = tmp_path / "mixed" / "metadata.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    del rows[0]["masks"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config({"iterations": 1, "rollout.prompts_per_iteration": len(rows), "data.path": tmp_path / "mixed"})
    assert run_training(config).is_file()


def test_an_output_below_a_file_is_refused_before_any_work(
    tmp_path: Path, make_config: MakeConfig, run_training: RunTraining
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        run_training(make_config({"output": tmp_path / "file" / "run"}))
