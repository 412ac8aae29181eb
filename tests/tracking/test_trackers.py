"""Where measurements go: the same calls for JSON lines and for TensorBoard."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from customized_grpo.config.run import Config
from customized_grpo.config.training import LogConfig
from customized_grpo.data import load_image
from customized_grpo.errors import UserError
from customized_grpo.io.files import StorageError
from customized_grpo.io.jsonl import read_rows
from customized_grpo.tracking.registry import load_trackers
from customized_grpo.tracking.trackers import (
    JsonlTracker,
    TensorBoardTracker,
    Tracker,
    image_path,
    load_summary_writer,
)

OpenTracker = Callable[[Path], Tracker]
ROW = {"iteration": 3, "loss": 0.5, "kl": float("nan"), "steps": [0, 2]}
GRID = torch.linspace(0, 1, 3 * 8 * 12).view(3, 8, 12)


def jsonl(folder: Path) -> Tracker:
    return JsonlTracker(folder)


def tensorboard(folder: Path) -> Tracker:
    return TensorBoardTracker(load_summary_writer(), folder, 1)


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


@pytest.mark.parametrize("open_tracker", [jsonl, tensorboard])
def test_rows_and_images_are_on_the_disk_once_a_tracker_is_closed(open_tracker: OpenTracker, tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path)
    tracker.log("metrics", ROW, 3)
    tracker.log_images("galleries", GRID, 3)
    tracker.close()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) > 150


def test_json_lines_hold_all_of_a_row_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    for step in (3, 4):
        tracker.log("metrics", ROW | {"iteration": step}, step)
    tracker.log("evaluations", {"iteration": 4, "pairs": 2}, 4)
    assert read_rows(tmp_path / "metrics.jsonl") == [ROW | {"iteration": step, "kl": None} for step in (3, 4)]
    assert json.loads((tmp_path / "evaluations.jsonl").read_text()) == {"iteration": 4, "pairs": 2}


def test_images_lie_beside_json_lines_by_step(tmp_path: Path) -> None:
    JsonlTracker(tmp_path).log_images("galleries", GRID, 3)
    path = image_path(tmp_path, "galleries", 3)
    assert path == tmp_path / "galleries" / "000003.png"
    torch.testing.assert_close(load_image(path), GRID, atol=0.5 / 255 + 1e-6, rtol=0)


def test_tensorboard_has_the_numbers_of_both_logs_and_the_images(tmp_path: Path) -> None:
    tracker = tensorboard(tmp_path)
    tracker.log("metrics", ROW, 3)
    tracker.log("evaluations", {"iteration": 3, "reward/prompt": 0.25}, 3)
    tracker.log_images("galleries", GRID, 3)
    tracker.close()
    found = events(tmp_path)
    assert set(found.Tags()["scalars"]) == {"metrics/loss", "metrics/kl", "evaluations/reward/prompt"}
    assert [(event.step, event.value) for event in found.Scalars("metrics/loss")] == [(3, 0.5)]
    assert [(event.step, event.width, event.height) for event in found.Images("galleries")] == [(3, 12, 8)]


def test_tensorboard_hides_what_an_earlier_process_wrote_from_the_first_step_on(tmp_path: Path) -> None:
    for first, steps in ((1, (1, 2, 3)), (2, (2,))):
        tracker = TensorBoardTracker(load_summary_writer(), tmp_path, first)
        for step in steps:
            tracker.log("metrics", {"loss": float(first)}, step)
        tracker.close()
    loss = [(event.step, event.value) for event in events(tmp_path).Scalars("metrics/loss")]
    assert loss == [(1, 1.0), (2, 2.0)]


class Full:
    """TensorBoard's writer on a full disk."""

    def __init__(self, *arguments: object, **settings: object) -> None:
        pass

    def fail(self, *arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    add_scalar = add_image = close = fail


@pytest.mark.parametrize("act", ["log", "log_images", "close"])
def test_a_full_disk_is_named_by_each_method_of_tensorboard(act: str, tmp_path: Path) -> None:
    tracker = TensorBoardTracker(Full, tmp_path, 1)
    arguments: dict[str, tuple[Any, ...]] = {"log": ("metrics", ROW, 3), "log_images": ("galleries", GRID, 3)}
    with pytest.raises(StorageError, match=f"^{tmp_path}: no space to write"):
        getattr(tracker, act)(*arguments.get(act, ()))


def test_a_file_in_the_way_is_named_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "galleries").write_text("")
    (tmp_path / "tensorboard").write_text("")
    tracker = JsonlTracker(tmp_path)
    with pytest.raises(StorageError, match=f"^{tmp_path}: cannot be written to"):
        tracker.log("metrics", ROW, 3)
    with pytest.raises(StorageError, match=f"^{tmp_path}: cannot be written to"):
        tracker.log_images("galleries", GRID, 3)
    with pytest.raises(StorageError, match=f"^{tmp_path}: cannot be written to"):
        tensorboard(tmp_path)


def test_trackers_are_those_of_the_configuration(tmp_path: Path) -> None:
    def opened(*report_to: str) -> list[type[Tracker]]:
        config = Config.model_validate({"log": {"report_to": report_to}})
        return [type(open_tracker(tmp_path, 1)) for open_tracker in load_trackers(config, print)]

    assert opened() == [JsonlTracker]
    assert not (tmp_path / "tensorboard").exists()
    assert opened("tensorboard") == [JsonlTracker, TensorBoardTracker]


def test_tensorboard_has_the_summary_of_a_run_as_a_table(tmp_path: Path) -> None:
    tracker = tensorboard(tmp_path)
    tracker.summarize({"iterations": 20.0, "evaluation/tuned/joint_success": 0.25})
    tracker.close()
    (text,) = events(tmp_path).Tensors("summary/text_summary")
    assert "| evaluation/tuned/joint_success | 0.25 |" in text.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize(
    ("report_to", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_library_is_an_error_before_anything_is_written(
    report_to: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    config = Config.model_validate({"log": {"report_to": [report_to]}})
    with pytest.raises(UserError, match=rf"^log\.report_to: {report_to} is not installed: pip install"):
        load_trackers(config, print)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ({"report_to": ["wandb", "wandb"]}, "named twice"),
        ({"report_to": ["tensorboard"], "project": "mine"}, "project: only for report_to wandb or trackio"),
    ],
)
def test_settings_of_trackers_that_do_nothing_are_refused(log: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LogConfig.model_validate(log)
