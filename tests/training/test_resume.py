"""Runs that go on: from the newest checkpoint, from a named one, or not at all."""

import io
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from customized_grpo.config.run import Config
from customized_grpo.data import load_image, save_image
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import UserError
from customized_grpo.io.files import locked
from customized_grpo.rewards.scoring import Scorer
from customized_grpo.tracking.console import Display
from customized_grpo.tracking.trackers import JsonlTracker
from customized_grpo.training import checkpoint
from customized_grpo.training.checkpoint import list_checkpoints
from customized_grpo.training.run import train
from customized_grpo.training.trainer import Trainer, TrainingError

MakeConfig = Callable[..., Config]
RunTraining = Callable[..., Path]
ReadLog = Callable[[Path], list[dict[str, Any]]]
ADAPTER = Path("adapter_model.safetensors")
FOUR = {"iterations": 4, "checkpoint.every": 2, "optimizer.num_minibatches": 2}
MEMORY = r"out of memory while .* in iteration [24] \(CUDA out of memory\. .*micro_batch.* train --resume"


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_run(first: Path, second: Path, read_log: ReadLog) -> None:
    assert (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert read_log(first / name) == read_log(second / name)
    for name in ("weights.json", "galleries/000004.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_six_iterations_are_three_and_a_new_process_and_three(
    tmp_path: Path, make_config: MakeConfig, make_settings: Callable[..., dict[str, Any]], run_training: RunTraining,
    command: Callable[..., Any], read_log: ReadLog,
) -> None:  # fmt: skip
    """Weights, optimiser and average to the bit, with a window of steps that slides meanwhile."""
    six: dict[str, Any] = {
        "iterations": 6, "ema.decay": 0.9, "rollout.trained_steps": "window", "rollout.window.size": 2,
        "rollout.window.period": 2, "optimizer.num_minibatches": 2, "checkpoint.every": 3,
    }  # fmt: skip
    straight, stopped = tmp_path / "straight", tmp_path / "run"
    run_training(make_config(six | {"output": straight}))
    run_training(make_config(six | {"iterations": 3}))
    assert (stopped / "ema" / ADAPTER).is_file()
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(make_settings(six), sort_keys=False))
    done = command("train", "--config", settings, "--resume")
    assert done.returncode == 0 and "resuming after iteration 3" in done.stdout, done.stderr
    states = [load_file(run / "checkpoints" / "000006" / "state.safetensors") for run in (straight, stopped)]
    assert states[0].keys() == states[1].keys()
    assert {name.split("/")[0] for name in states[0]} == {"parameter", "optimizer", "average"}
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    for name in (ADAPTER, Path("ema") / ADAPTER):
        assert (straight / name).read_bytes() == (stopped / name).read_bytes()
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        assert read_log(straight / log) == read_log(stopped / log)


def test_a_run_resumed_in_a_new_process_is_the_run_that_never_stopped(
    four: Path, tmp_path: Path, make_config: MakeConfig, make_settings: Callable[..., dict[str, Any]],
    run_training: RunTraining, command: Callable[..., Any], read_log: ReadLog,
) -> None:  # fmt: skip
    run_training(make_config(FOUR | {"iterations": 2}))
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(make_settings(FOUR), sort_keys=False))
    done = command("train", "--config", settings, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming after iteration 2" in done.stdout
    same_run(tmp_path / "run", four, read_log)


def test_what_was_logged_after_the_checkpoint_is_cut_off(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, read_log: ReadLog
) -> None:
    """The run was killed in its fourth iteration: two lines more than the checkpoint knows, the last of them torn."""
    run = tmp_path / "run"
    run_training(make_config(FOUR | {"iterations": 2}))
    with (run / "metrics.jsonl").open("a") as log:
        log.write((four / "metrics.jsonl").read_text().splitlines()[2] + '\n{"iteration": 4, "ste')
    (run / "checkpoints" / ".000004.partial").mkdir()
    run_training(make_config(FOUR), resume=True)
    same_run(run, four, read_log)


def test_a_finished_run_resumed_stays_as_it_is(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, read_log: ReadLog
) -> None:
    shutil.copytree(four, tmp_path / "run")
    run_training(make_config(FOUR), resume=True)
    same_run(tmp_path / "run", four, read_log)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rollout.eta", 0.25), ("seed", 3), ("policy.lora_rank", 3), ("advantages.tdw.early", 0.6),
     ("ema.decay", 0.5)],
)  # fmt: skip
def test_a_run_is_not_resumed_as_another(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, field: str, value: object
) -> None:
    run = tmp_path / "run"
    shutil.copytree(four, run)
    before = listing(run)
    with pytest.raises(UserError, match=f"another configuration.*{field}: .* -> {value}"):
        run_training(make_config(FOUR | {field: value}), resume=True)
    assert listing(run) == before


def test_data_may_move_but_not_change(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, read_log: ReadLog
) -> None:
    run = tmp_path / "run"
    shutil.copytree(four, run)
    shutil.rmtree(run / "checkpoints" / "000004")
    moved = shutil.copytree(make_config(FOUR).data.path, tmp_path / "moved")
    changes = FOUR | {"data.path": str(moved)}
    picture = next(moved.rglob("*.png"))
    content = picture.read_bytes()
    save_image(load_image(picture).flip(-1), picture)
    with pytest.raises(UserError, match="another configuration.*data.sha256"):
        run_training(make_config(changes), resume=True)
    picture.write_bytes(content)
    run_training(make_config(changes), resume=True)
    same_run(run, four, read_log)


def test_a_folder_belongs_to_one_run_at_a_time(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining
) -> None:
    run = tmp_path / "run"
    shutil.copytree(four, run)
    before = listing(run)
    with locked(run, "a test"), pytest.raises(UserError, match=f"output: {run} is being worked on by another run"):
        run_training(make_config(FOUR), resume=True)
    assert listing(run) == before


def test_a_log_that_is_none_is_named(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining
) -> None:
    run = tmp_path / "run"
    shutil.copytree(four, run)
    (run / "metrics.jsonl").write_bytes(b"\0" * 40 + b"\n")
    with pytest.raises(UserError, match=f"{run / 'metrics.jsonl'}:1: not a row of a log"):
        run_training(make_config(FOUR), resume=True)


@pytest.mark.parametrize("update", [1, 2])
def test_a_gradient_that_is_not_finite_leaves_no_half_of_an_iteration(
    update: int, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third iteration, before its first update and after it: what is saved is the second."""
    step, calls = Trainer._optimizer_step, []

    def poisoned(self: Trainer[Any], measured: list[Tensor], *rest: Any) -> Any:
        calls.append(1)
        bad = len(calls) == 4 + update
        return step(self, [row * torch.nan for row in measured] if bad else measured, *rest)

    monkeypatch.setattr(Trainer, "_optimizer_step", poisoned)
    with pytest.raises(TrainingError, match="iteration 3: the loss is nan"):
        run_training(make_config(FOUR | {"checkpoint.every": 100}))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["000002"]


def test_another_table_of_time_weights_is_refused(make_config: MakeConfig, run_training: RunTraining) -> None:
    def changes(first: float) -> dict[str, Any]:
        table = {"prompt": [first, 0.5, 0.5, 0.5], "identity": [0.5] * 4}
        return {"iterations": 1, "advantages.weights": "table", "advantages.table": table}

    run_training(make_config(changes(0.5)))
    with pytest.raises(UserError, match=r"another configuration.*advantages.table.prompt: \[0.5, .* -> \[0.6, "):
        run_training(make_config(changes(0.6) | {"iterations": 2}), resume=True)


def test_resuming_under_other_libraries_is_said_and_done(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, read_log: ReadLog, display: Display,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "library_versions", lambda: {"torch": "0.1"})
        run_training(make_config(FOUR | {"iterations": 2}))
    run_training(make_config(FOUR), resume=True)
    same_run(tmp_path / "run", four, read_log)
    assert "made under other versions (" in (said := display.console.file.getvalue()) and "torch 0.1 -> " in said


def test_a_run_goes_on_from_the_checkpoint_that_is_named(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, read_log: ReadLog, display: Display
) -> None:
    """Also from a copy of it elsewhere; what the run has after it goes, and is made again."""
    run = shutil.copytree(four, tmp_path / "run")
    kept = shutil.copytree(run / "checkpoints" / "000002", tmp_path / "kept")
    run_training(make_config(FOUR), resume_from=run / "checkpoints" / "000002")
    same_run(run, four, read_log)
    shutil.rmtree(run / "checkpoints" / "000002")
    run_training(make_config(FOUR | {"iterations": 2}), resume_from=kept)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["000002"]
    assert [row["iteration"] for row in read_log(run / "metrics.jsonl")] == [1, 2]
    assert "resuming after iteration 2, from" in display.console.file.getvalue()


@pytest.mark.parametrize("how", ["torn", "no manifest", "nothing there", "another run's", "of another place"])
def test_a_bad_checkpoint_that_is_named_is_an_error(
    how: str, four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining
) -> None:
    run, changes = shutil.copytree(four, tmp_path / "run"), dict(FOUR)
    named = run / "checkpoints" / "000004"
    if how == "torn":
        (named / "state.safetensors").write_bytes(b"torn")
    elif how == "no manifest":
        (named / "manifest.json").unlink()
    elif how == "nothing there":
        named = tmp_path / "nowhere"
    elif how == "another run's":
        changes["seed"] = 3
    else:
        changes["output"] = str(tmp_path / "new")
    before = listing(run)
    said = {"another run's": "seed: 0 -> 3", "of another place": "is of iteration 4, but the log in .* ends at 0"}
    with pytest.raises(UserError, match=said.get(how, "damaged")):
        run_training(make_config(changes), resume_from=named)
    assert listing(run) == before


@pytest.mark.parametrize(
    ("name", "torn"), [("state.safetensors", True), ("state.safetensors", False), ("manifest.json", False)]
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    name: str, torn: bool, four: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    """The run goes on from the one before it, and comes to the same end."""
    run = tmp_path / "run"
    shutil.copytree(four, run)
    newest = run / "checkpoints" / "000004" / name
    if torn:
        newest.write_bytes(newest.read_bytes()[:-100])
    else:
        newest.unlink()
    display = Display(Console(width=200, file=(said := io.StringIO())))
    train(make_config(FOUR), display, resume=True)
    assert f"{name}: damaged" in said.getvalue() and "resuming after iteration 2" in said.getvalue()
    assert (run / ADAPTER).read_bytes() == (four / ADAPTER).read_bytes()


ENDS: dict[str, tuple[BaseException, type[BaseException], str]] = {
    "a refusal": (UserError("the server refused"), UserError, "the server refused"),
    "bad numbers": (TrainingError("not finite"), TrainingError, "not finite"),
    "a disk error": (OSError(5, "Input/output error"), OSError, "Input/output"),
    "a bug": (KeyError("oops"), KeyError, "oops"),
    "a lost device": (RuntimeError("CUDA error: an illegal memory access"), RuntimeError, "illegal memory access"),
    "Ctrl-C in a thread": (KeyboardInterrupt(), KeyboardInterrupt, ""),
    "device memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), TrainingError, MEMORY),
    "host memory": (MemoryError(), TrainingError, "out of memory while"),
}  # fmt: skip
"""What may end a run: what is raised, what comes of it, and its words."""


def failing_scorer(at: int, raised: BaseException, patch: pytest.MonkeyPatch) -> None:
    """Make the scoring of iteration `at` + 1 raise."""
    original, calls = Scorer.score, []

    def fail(self: Scorer, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == at + 1:
            raise raised
        return original(self, *arguments)

    patch.setattr(Scorer, "score", fail)


def failing(trainer: str, at: int, raised: BaseException, patch: pytest.MonkeyPatch) -> None:
    """Make a method of the trainer raise in iteration `at` + 1, at its second call there."""
    original, calls = getattr(Trainer, trainer), []

    def fail(self: Trainer[Any], *arguments: Any) -> Any:
        calls.append(1)
        if self.iteration == at and len(calls) % 2 == 0:
            raise raised
        return original(self, *arguments)

    patch.setattr(Trainer, trainer, fail)


@pytest.mark.parametrize("end", ENDS)
def test_whatever_ends_a_run_leaves_its_last_whole_iteration(
    end: str, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, monkeypatch: pytest.MonkeyPatch,
    display: Display,
) -> None:  # fmt: skip
    raised, error, text = ENDS[end]
    failing_scorer(1, raised, monkeypatch)
    with pytest.raises(error, match=text or "^$"):
        run_training(make_config(FOUR | {"checkpoint.every": 100}))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["000001"]
    assert "stopped after iteration 1; `train --resume` goes on" in display.console.file.getvalue()


@pytest.mark.parametrize(
    ("where", "end"), [("_backward", "device memory"), ("_optimizer_step", "a bug"), ("the log", "a disk error")]
)
def test_what_ends_a_run_in_its_updates_costs_one_iteration(
    where: str, end: str, four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the fourth iteration: in its second update, or when its weights are there but not its line in the log."""
    raised, error, text = ENDS[end]

    def fail(self: JsonlTracker, name: str, row: Any, step: int) -> None:
        if step == 4:
            raise raised

    with monkeypatch.context() as patch:
        if where == "the log":
            patch.setattr(JsonlTracker, "log", fail)
        else:
            failing(where, 3, raised, patch)
        with pytest.raises(error, match=text):
            run_training(make_config(FOUR))
    assert (tmp_path / "run" / "checkpoints" / "000003").is_dir()
    run_training(make_config(FOUR), resume=True)
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (four / ADAPTER).read_bytes()


def test_a_process_that_waits_for_a_lost_one_is_saved_by_a_thread(
    tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ended by force then: the main thread may be in a call that never ends."""
    acts: list[Callable[[], None]] = []
    monkeypatch.setattr(DistributedGroup, "before_force", lambda ranks, act: acts.append(act))
    score = Trainer.score

    def stuck(self: Trainer[Any], *arguments: Any) -> Any:
        if self.iteration == 2:
            thread = threading.Thread(target=acts[0])
            thread.start()
            thread.join(60)
            assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["000002"]
        return score(self, *arguments)

    monkeypatch.setattr(Trainer, "score", stuck)
    run_training(make_config(FOUR | {"iterations": 3, "checkpoint.every": 100}))


def test_overwriting_does_not_delete_what_the_run_starts_from(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining
) -> None:
    run = shutil.copytree(four, tmp_path / "run")
    before = listing(run)
    for start in (run, run / "adapter_model.safetensors"):
        with pytest.raises(UserError, match=r"policy\.init_from: .* lies in .*, which --overwrite deletes"):
            run_training(make_config(FOUR | {"policy.init_from": str(start)}), overwrite=True)
    assert listing(run) == before


def test_the_adapter_of_an_earlier_end_is_not_taken_for_the_runs(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run goes on, and is stopped."""
    run = shutil.copytree(four, tmp_path / "run")
    with monkeypatch.context() as patch:
        failing_scorer(0, TrainingError("stopped"), patch)
        with pytest.raises(TrainingError, match="stopped"):
            run_training(make_config(FOUR | {"iterations": 6}), resume=True)
    assert (run / ADAPTER).is_file()
    new = FOUR | {"output": tmp_path / "new", "policy.init_from": str(run)}
    with pytest.raises(UserError, match="is at iteration 4 of 6, and its adapter is written in the end"):
        run_training(make_config(new))


def test_a_run_without_a_whole_checkpoint_is_not_begun_again(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining
) -> None:
    run = tmp_path / "run"
    shutil.copytree(four, run)
    for folder in (run / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("{}")
    before = listing(run)
    with pytest.raises(UserError, match=r"none of its \d checkpoints is whole, .* start again with --overwrite"):
        run_training(make_config(FOUR), resume=True)
    assert listing(run) == before


def test_resuming_before_the_first_checkpoint_starts_at_the_beginning(
    make_config: MakeConfig, run_training: RunTraining, tmp_path: Path, display: Display, read_log: ReadLog
) -> None:
    run_training(make_config({"iterations": 1}))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run_training(make_config({"iterations": 1}), resume=True)
    assert "no checkpoint yet" in display.console.file.getvalue()
    assert [row["iteration"] for row in read_log(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_a_run_stopped_between_validations_resumes_to_the_same_log(
    tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, read_log: ReadLog
) -> None:
    run_training(make_config({"iterations": 1}))
    assert [row["iteration"] for row in read_log(tmp_path / "run" / "evaluations.jsonl")] == [0, 1]
    run_training(make_config({"iterations": 2}), resume=True)
    assert [row["iteration"] for row in read_log(tmp_path / "run" / "evaluations.jsonl")] == [0, 2]
    assert not (tmp_path / "run" / "galleries" / "000001.png").exists()


def test_resuming_to_fewer_iterations_is_refused(
    four: Path, tmp_path: Path, make_config: MakeConfig, run_training: RunTraining
) -> None:
    shutil.copytree(four, tmp_path / "run")
    with pytest.raises(UserError, match="has done 4"):
        run_training(make_config(FOUR | {"iterations": 3}), resume=True)


def test_a_run_stopped_between_validations_may_be_killed_and_resumed_again(
    tmp_path: Path, make_config: MakeConfig, run_training: RunTraining, read_log: ReadLog
) -> None:
    """The second resumption goes back to the checkpoint of a log that the first has shortened."""
    run_training(make_config({"iterations": 1}))
    checkpoint = shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "kept")
    run_training(make_config({"iterations": 2}), resume=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints")
    log = tmp_path / "run" / "evaluations.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    run_training(make_config({"iterations": 2}), resume=True)
    assert [row["iteration"] for row in read_log(log)] == [0, 2]
    assert [row["iteration"] for row in read_log(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
