"""Trackers of other services: the true libraries offline, and what happens when one fails."""

import json
import struct
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from customized_grpo.config.run import Config
from customized_grpo.tracking.registry import load_trackers
from customized_grpo.tracking.services import RUN_IDS, Forgiving, load_service
from customized_grpo.tracking.trackers import JsonlTracker, Tracker

GRID = torch.linspace(0, 1, 3 * 8 * 12).view(3, 8, 12)
ROW = {"iteration": 3, "loss": 0.5, "kl": float("nan"), "steps": [0, 2]}
RunTraining = Callable[..., Path]


def installed(service: str) -> Any:
    return [
        pytest.mark.trackers,
        pytest.mark.skipif(
            find_spec(service) is None, reason=f"{service} is not installed; make test-trackers installs it apart"
        ),
    ]


BOTH = pytest.mark.parametrize(
    "service", [pytest.param("wandb", marks=installed("wandb")), pytest.param("trackio", marks=installed("trackio"))]
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path_factory.getbasetemp() / "trackio"))  # which is read once


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[str], Tracker]:
    """Opens the tracker of a service for the run in `tmp_path/run`, which warns into `tmp_path/warnings`."""

    def opened(service: str) -> Tracker:
        config = Config.model_validate({"log": {"report_to": [service], "project": tmp_path.name}})
        (tmp_path / "run").mkdir(exist_ok=True)

        def warn(text: str) -> None:
            with (tmp_path / "warnings").open("a") as file:
                file.write(text + "\n")

        return load_trackers(config, warn)[1](tmp_path / "run", 1)

    return opened


def recorded(service: str, folder: Path) -> dict[str, Any]:
    """What the service's own library reads back: rows by step, the summary or last row, runs, configuration, images."""
    return _of_wandb(folder) if service == "wandb" else _of_trackio(folder.name)


def _of_wandb(folder: Path) -> dict[str, Any]:
    from wandb.proto import wandb_internal_pb2

    rows: dict[int, dict[str, Any]] = {}
    runs, summary, images, config = set(), {}, [], {}
    for file in sorted((folder / "run" / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in _records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                runs.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.summary.update:
                summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            if values:
                images += [value for name, value in values.items() if name.endswith("/caption")]
                rows.setdefault(values["iteration"], {}).update(values)
    return {"rows": rows, "runs": runs, "summary": summary, "images": images, "config": config}


def _records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, in which a part has a header of 7 bytes."""
    block, place, parts = 1 << 15, 7, b""
    while place < len(log):
        left = block - place % block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", log[place : place + 7])
        parts += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def _of_trackio(project: str) -> dict[str, Any]:
    from trackio.sqlite_storage import SQLiteStorage

    runs = SQLiteStorage.get_runs(project)
    rows: dict[int, dict[str, Any]] = {}
    images, summary = [], {}
    for row in (row for run in runs for row in SQLiteStorage.get_logs(project, run)):
        rows.setdefault(row["step"], {}).update(row)
        images += [value["caption"] for value in row.values() if isinstance(value, dict) and "caption" in value]
        summary |= {name.removeprefix("summary/"): value for name, value in row.items() if name.startswith("summary/")}
    config = SQLiteStorage.get_run_config(project, runs[0])
    return {"rows": rows, "runs": set(runs), "summary": summary, "images": images, "config": config}


@BOTH
def test_rows_pictures_settings_and_summary_are_there(
    service: str, opened: Callable[[str], Tracker], tmp_path: Path
) -> None:
    tracker = opened(service)
    tracker.log("metrics", ROW, 3)
    tracker.log_images("galleries", GRID, 3, "references, base, tuned: a toy")
    tracker.summarize({"evaluation/tuned/joint_success": 0.25})
    tracker.close()
    found = recorded(service, tmp_path)
    assert found["rows"][3]["metrics/loss"] == 0.5 and "metrics/steps" not in found["rows"][3]
    assert found["images"] == ["references, base, tuned: a toy"]
    assert found["summary"]["evaluation/tuned/joint_success"] == 0.25
    assert found["config"]["optimizer"]["learning_rate"] == 1.5e-3
    assert not (tmp_path / "warnings").exists()


@BOTH
def test_a_resumed_run_goes_on_in_the_same_run(service: str, opened: Callable[[str], Tracker], tmp_path: Path) -> None:
    for steps in (range(1, 4), range(2, 5)):  # the second was stopped after its first checkpoint
        tracker = opened(service)
        for step in steps:
            tracker.log("metrics", {"loss": step / 2}, step)
        tracker.close(failed=True)
    found = recorded(service, tmp_path)
    assert len(found["runs"]) == 1
    assert {step: row["metrics/loss"] for step, row in found["rows"].items()} == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    assert json.loads((tmp_path / "run" / RUN_IDS).read_text()).keys() == {service}


@BOTH
def test_a_run_is_recorded_from_its_settings_to_its_evaluation(
    service: str, make_settings: Callable[..., dict[str, Any]], run_training: RunTraining, tmp_path: Path,
    toybox_data: Path,
) -> None:  # fmt: skip
    log = {"log.report_to": [service], "log.project": tmp_path.name, "data.test": toybox_data / "test"}
    tree = make_settings(log | {"iterations": 2, "evaluation.every": 2})
    run_training(Config.model_validate(tree))
    run_training(Config.model_validate(tree | {"iterations": 3}), resume=True)
    found = recorded(service, tmp_path)
    assert len(found["runs"]) == 1 and {1, 2, 3} <= found["rows"].keys()
    assert "metrics/loss" in found["rows"][3] and "evaluations/joint_success" in found["rows"][2]
    assert found["images"] and all("tuned images: " in caption for caption in found["images"])
    assert found["summary"]["iterations"] == 3 and "evaluation/tuned/joint_success" in found["summary"]


class Failing:
    """A tracker that fails from its second call on."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any, **settings: Any) -> None:
            self.calls.append(name)
            if len(self.calls) > 1:
                raise ConnectionError("the server went away\nat line 3")

        return call


def test_a_tracker_that_fails_warns_once_and_is_left_alone() -> None:
    warned: list[str] = []
    inner = Failing()
    tracker = Forgiving("wandb", lambda: inner, warned.append)  # type: ignore[arg-type,return-value]
    for step in range(3):
        tracker.log("metrics", ROW, step)
    tracker.log_images("galleries", GRID, 3)
    tracker.close()
    assert inner.calls == ["log", "log"]
    (text,) = warned
    assert text.startswith("log.report_to: wandb failed (the server went away); the run goes on without it")


def test_a_tracker_that_does_not_open_is_left_alone() -> None:
    warned: list[str] = []

    def refuse() -> JsonlTracker:
        raise RuntimeError("no key")

    tracker = Forgiving("trackio", refuse, warned.append)
    tracker.log("metrics", ROW, 1)
    tracker.summarize({})
    assert len(warned) == 1 and "trackio failed (no key)" in warned[0]


def test_what_is_no_failure_of_a_tracker_is_not_caught() -> None:
    def stop() -> JsonlTracker:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Forgiving("wandb", stop, print)


def test_a_known_service_is_imported_by_its_name() -> None:
    assert load_service("json").loads is json.loads  # type: ignore[arg-type]
