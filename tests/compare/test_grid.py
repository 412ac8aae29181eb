import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from customized_grpo.compare.config import CompareConfig, run_settings
from customized_grpo.compare.grid import cells_of, check_grid
from customized_grpo.compare.presets import PRESETS
from customized_grpo.config import Config
from customized_grpo.errors import UserError

Make = Callable[..., CompareConfig]
TABLE = [[0.6, 0.4]] * 4


@pytest.fixture
def make_tree(make_settings: Callable[..., dict[str, Any]], tmp_path: Path, toybox_data: Path) -> Callable[..., Any]:
    """The settings of a small grid as a tree, changed by top-level names."""

    def make(**changes: Any) -> dict[str, Any]:
        train = make_settings({"data.test": toybox_data / "test"})
        presets = {"base": 2, "naive-1:1": 2, "customized": 2}
        return {"output": str(tmp_path / "grid"), "presets": presets, "train": train, "jobs": 2} | changes

    return make


@pytest.fixture
def make(make_tree: Callable[..., Any]) -> Make:
    return lambda **changes: CompareConfig.model_validate(make_tree(**changes))


def advantages(config: CompareConfig, preset: str) -> dict[str, Any]:
    found: dict[str, Any] = run_settings(config, "", preset, 0, TABLE)["advantages"]
    return found


def test_every_preset_makes_a_valid_run_that_differs_in_its_advantages_alone(make: Make) -> None:
    config = make(presets=dict.fromkeys(PRESETS, 2), hinge_thresholds=(None, 0.4))
    runs = {name: run_settings(config, "", name, 1, TABLE) for name in PRESETS}
    rests = [{key: value for key, value in run.items() if key != "advantages"} for run in runs.values()]
    assert all(rest == rests[0] for rest in rests) and rests[0]["seed"] == 1
    assert len({str(run["advantages"]) for run in runs.values()}) == len(PRESETS), "no two presets are the same"
    for run in runs.values():
        Config.model_validate(run)


def test_the_presets_are_what_their_names_say(make: Make) -> None:
    config = make(hinge_thresholds=(None, 0.4))
    naive = advantages(config, "naive-1:1")
    assert (naive["shape"], naive["weights"], naive["constant"]) == ("none", "constant", [0.5, 0.5])
    prompt, identity = advantages(config, "naive-1:1.5")["constant"]
    assert identity / prompt == pytest.approx(1.5) and prompt + identity == pytest.approx(1)
    both = advantages(config, "customized")
    assert (both["shape"], both["weights"], both["lookup"]) == ("sars", "tdw", "step")
    assert advantages(config, "customized-published") == both | {"lookup": "counter"}
    assert advantages(config, "sars") == naive | {"shape": "sars"}
    assert advantages(config, "tdw") == both | {"shape": "none"}
    assert advantages(config, "hinge") == naive | {"thresholds": [None, 0.4]}
    assert advantages(config, "gdpo") == naive | {"normalise": "group_then_batch"}
    assert advantages(config, "customized-calibrated")["table"] == TABLE


def test_settings_change_the_runs_they_name(make: Make) -> None:
    config = make(settings={"blind": {"rewards": {"identity_leak": "low"}}, "leaky": {}})
    assert run_settings(config, "blind", "sars", 0)["rewards"]["identity_leak"] == "low"
    assert run_settings(config, "leaky", "sars", 0)["rewards"]["identity_leak"] == "high"
    labels = [(cell.setting, cell.preset, cell.seed) for cell in cells_of(config)]
    assert len(set(labels)) == 8 == len({cell.folder for cell in cells_of(config)})
    assert {seed for _, _, seed in labels[:4]} == {0}, "seed by seed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presets": {"naive": 3}}, "unknown preset 'naive'; choose among base, naive-1:1, naive-1:1.5, sars"),
        ({"presets": {"sars": 1}}, "'sars' has 1 seed, and an interval over seeds takes at least 2"),
        ({"presets": {"sars": 0}}, "'sars' has 0 seeds; expected 1 or more"),
        ({"presets": {"base": 3}}, "nothing to train"),
        ({"presets": {"hinge": 2}}, "hinge_thresholds: preset 'hinge' needs them"),
        ({"settings": {}}, "settings: empty"),
    ],
)
def test_a_bad_grid_is_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_one_seed_is_enough_without_intervals(make: Make) -> None:
    assert len(cells_of(make(presets={"sars": 1}, intervals=False))) == 1


def test_missing_test_data_are_refused(make_tree: Callable[..., Any]) -> None:
    tree = make_tree()
    del tree["train"]["data"]["test"]
    with pytest.raises(ValueError, match=r"train.data.test: presets are compared on test data"):
        CompareConfig.model_validate(tree)
    tree["train"]["data"]["test"] = "nowhere"
    config = CompareConfig.model_validate(tree)
    with pytest.raises(UserError, match=r"train.data.test: nowhere is not a data folder"):
        check_grid(config, cells_of(config))


def test_a_setting_that_makes_no_valid_run_is_named(make: Make) -> None:
    config = make(settings={"odd": {"rollout": {"group_size": 1}}})
    with pytest.raises(UserError, match=r"settings 'odd', preset 'naive-1:1': rollout.group_size: .*found 1"):
        check_grid(config, cells_of(config))


def test_a_folder_with_another_grid_is_refused(make: Make) -> None:
    config = make()
    cell = cells_of(config)[0]
    cell.folder.mkdir(parents=True)
    found = run_settings(config, "", cell.preset, cell.seed)
    found["rollout"]["eta"] = 0.3
    found["threads"] = 7
    (cell.folder / "config.yaml").write_text(yaml.safe_dump(found))
    with pytest.raises(UserError, match=r"holds a run of another grid: rollout.eta is 0.3 there and 0.8 here\. Give"):
        check_grid(config, cells_of(config))
    (cell.folder / "config.yaml").write_text(yaml.safe_dump(found | {"rollout": found["rollout"] | {"eta": 0.8}}))
    check_grid(config, cells_of(config))


def test_a_grid_runs_goes_on_after_a_failure_and_repeats_nothing(
    make_tree: Callable[..., Any], tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    tree = make_tree(presets={"base": 2, "naive-1:1": 2, "customized-calibrated": 2}, calibration_prompts=2)
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(tree))
    grid = tmp_path / "grid"
    stray = grid / "runs" / "naive-1-1-seed1" / "stray.txt"
    stray.parent.mkdir(parents=True)
    stray.touch()

    first = command("compare", "--config", path)
    assert first.returncode == 1, first.stderr
    assert "1 runs failed" in first.stderr and "naive-1:1 seed 1: output: " in first.stderr
    assert "holds other files than a run's" in first.stderr
    assert "customized-calibrated seed 1: done  2/2" in first.stdout
    page = (grid / "comparison.html").read_text()
    assert "naive-1:1 seed 1" in page and "holds other files" in page
    logs = {path: path.read_bytes() for path in grid.glob("runs/*/metrics.jsonl")}
    assert len(logs) == 3

    stray.unlink()
    second = command("compare", "--config", path)
    assert second.returncode == 0, second.stderr
    assert "naive-1:1 seed 1: done" in second.stdout and "naive-1:1 seed 0" not in second.stdout
    assert {path: path.read_bytes() for path in logs} == logs, "finished runs are not repeated"
    assert len((grid / "comparison.csv").read_text().splitlines()) == 1 + 3 * 2
    assert {path.name for path in (grid / "figures").iterdir()} >= {"plane.svg", "plane.png", "curves.svg"}

    again = command("compare", "--config", path, "--report_only", "--title", "Another title")
    assert again.returncode == 0 and "Another title" in (grid / "comparison.html").read_text()
    drawn = command("figures", "--csv", grid / "comparison.csv", "--output", tmp_path / "drawn")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "drawn" / "plane.svg").read_bytes() == (grid / "figures" / "plane.svg").read_bytes()


def test_nothing_is_orphaned_when_a_grid_is_stopped(make_tree: Callable[..., Any], tmp_path: Path) -> None:
    tree = make_tree()
    tree["train"]["iterations"] = 10_000
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(tree))
    program = [sys.executable, "-m", "customized_grpo", "compare", "--config", str(path)]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    logs = [tmp_path / "grid" / "runs" / f"{name}-seed0" / "metrics.jsonl" for name in ("naive-1-1", "customized")]
    deadline = time.monotonic() + 120
    while not all(log.is_file() and log.stat().st_size for log in logs):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    sizes = [log.stat().st_size for log in logs]
    time.sleep(1.0)
    assert [log.stat().st_size for log in logs] == sizes, "both runs have stopped"


def test_nothing_to_report_is_an_error(
    make_tree: Callable[..., Any], tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(make_tree()))
    found = command("compare", "--config", path, "--report_only")
    assert found.returncode == 2 and "is finished, so there is nothing to report" in found.stderr
