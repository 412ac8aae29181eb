import fcntl
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fork_server import Process

from customized_grpo.cli.main import main
from customized_grpo.compare import command as command_module
from customized_grpo.compare import grid as grid_module
from customized_grpo.compare.command import GridError, compare
from customized_grpo.compare.config import CompareConfig, run_settings
from customized_grpo.compare.grid import RECORD, _reason, _record, cells_of, check_grid, record_of, run_grid
from customized_grpo.compare.runs import Cell
from customized_grpo.compare.table import read_csv
from customized_grpo.config.presets import PRESETS
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.tracking.console import Display
from customized_grpo.training.advantages import step_weights

Make = Callable[..., CompareConfig]
TABLE = {"prompt": [0.6] * 4, "identity": [0.4] * 4}
PRETENDED = """
import json, os, shutil, sys, time
from pathlib import Path

import yaml

command, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
settings = yaml.safe_load(Path(options["--config"]).read_text())
if command == "diagnose":
    if int(options["--prompts"]) > 12:
        sys.exit(f"customized-grpo: error: --prompts: {options['--prompts']} are more than there are")
    out = Path(options["--out"])
    out.mkdir(parents=True)
    table = {"prompt": [0.6] * 4, "identity": [0.4] * 4}
    (out / "weights.yaml").write_text(yaml.safe_dump({"advantages": {"table": table}}))
    (out / "diagnosis.json").write_text(json.dumps({"settings": {"prompts": int(options["--prompts"])}}))
else:
    run = Path(settings["output"])
    if run.is_dir() and list(run.iterdir()):
        sys.exit(f"customized-grpo: error: output: {run} holds other files than a run's")
    run.mkdir(parents=True, exist_ok=True)
    while settings["iterations"] > 100:
        with (run / "metrics.jsonl").open("a") as log:
            log.write('{"iteration": 1}' + chr(10))
        time.sleep(0.01)
    shutil.copytree(os.environ["FINISHED_RUN"], run, dirs_exist_ok=True)
"""
"""Leaves at once what a command leaves that a grid starts; a long run goes on until it is stopped."""


@pytest.fixture
def make_tree(make_settings: Callable[..., dict[str, Any]], tmp_path: Path, toybox_data: Path) -> Callable[..., Any]:
    """The settings of a small grid as a tree, changed by top-level names."""

    def make(**changes: Any) -> dict[str, Any]:
        train = make_settings({"data.test": toybox_data / "test"})
        del train["output"]
        presets = {"base": 2, "naive-1:1": 2, "customized": 2}
        return {"output": str(tmp_path / "grid"), "presets": presets, "train": train, "jobs": 2} | changes

    return make


@pytest.fixture
def make(make_tree: Callable[..., Any]) -> Make:
    return lambda **changes: CompareConfig.model_validate(make_tree(**changes))


@pytest.fixture
def pretended(tmp_path: Path, small_grid: Callable[..., list[Cell]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a package of our name, which pretends, before ours for every process that a grid starts."""
    package = tmp_path / "path" / "customized_grpo"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PRETENDED)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("FINISHED_RUN", str(small_grid(("customized",), 1)[0].folder))
    monkeypatch.setattr(grid_module, "POLL_SECONDS", 0.05)


def begin(config: CompareConfig) -> None:
    """Leave in its folder what says that a grid was begun there."""
    config.output.mkdir()
    (config.output / RECORD).write_text(yaml.safe_dump(_record(config)))


def advantages(config: CompareConfig, preset: str) -> dict[str, Any]:
    found: dict[str, Any] = run_settings(config, "", preset, 0, TABLE)["advantages"]
    return found


def weighed(config: CompareConfig, preset: str) -> dict[str, tuple[str, float]]:
    rewards = run_settings(config, "", preset, 0, TABLE)["rewards"]
    return {name: (reward["schedule"], reward["weight"]) for name, reward in rewards.items()}


def test_every_preset_makes_a_valid_run_that_differs_in_how_rewards_become_advantages_alone(make: Make) -> None:
    config = make(presets=dict.fromkeys(PRESETS, 2), hinge_thresholds={"identity": 0.4})
    runs = {name: run_settings(config, "", name, 1, TABLE) for name in PRESETS}
    parts = ("advantages", "rewards")
    rests = [{key: value for key, value in run.items() if key not in parts} for run in runs.values()]
    assert all(rest == rests[0] for rest in rests) and rests[0]["seed"] == 1
    made = {str([run[part] for part in parts]) for run in runs.values()}
    assert len(made) == len(PRESETS), "no two presets are the same"
    for run in runs.values():
        Config.model_validate(run)
        for reward in run["rewards"].values():
            for name in ("schedule", "weight", "up_to"):
                del reward[name]
    assert all(run["rewards"] == runs["sars"]["rewards"] for run in runs.values())


def test_the_presets_are_what_their_names_say(make: Make) -> None:
    config = make(hinge_thresholds={"identity": 0.4})
    naive, equal = advantages(config, "naive-1:1"), dict.fromkeys(("prompt", "identity"), ("constant", 0.5))
    assert (naive["shape"], naive["weights"], weighed(config, "naive-1:1")) == ("none", "schedules", equal)
    (_, prompt), (_, identity) = weighed(config, "naive-1:1.5").values()
    assert prompt / identity == pytest.approx(1.5) and prompt + identity == pytest.approx(1)
    assert [weight for _, weight in weighed(config, "naive-1.5:1").values()] == [identity, prompt]
    both, tdw = advantages(config, "customized"), {"prompt": ("early", 1), "identity": ("late", 1)}
    assert (both["shape"], both["weights"], both["lookup"]) == ("sars", "schedules", "step")
    assert advantages(config, "customized-published") == both | {"lookup": "counter"}
    assert weighed(config, "customized") == weighed(config, "tdw") == weighed(config, "customized-published") == tdw
    assert advantages(config, "sars") == naive | {"shape": "sars"} and weighed(config, "sars") == equal
    assert advantages(config, "tdw") == both | {"shape": "none"}
    hinge = run_settings(config, "", "hinge", 0)
    assert hinge["advantages"] == naive and hinge["rewards"]["identity"]["up_to"] == 0.4
    assert hinge["rewards"]["prompt"]["up_to"] is None
    assert advantages(config, "gdpo") == naive | {"normalize": "group_then_batch"}
    assert advantages(config, "customized-calibrated")["table"] == TABLE


def test_presets_keep_the_shares_of_several_rewards(make_tree: Callable[..., Any]) -> None:
    tree = make_tree()
    kind = {"kind": "toybox_prompt"}
    tree["train"]["rewards"] = {
        "a": kind | {"schedule": "early"}, "b": kind | {"schedule": "early", "weight": 3},
        "c": kind | {"schedule": "late"}, "d": kind | {"weight": 0.2}, "watched": kind | {"weight": 0},
        "rough": {"kind": "texture", "role": "constraint", "at_most": 2.0},
    }  # fmt: skip
    config = CompareConfig.model_validate(tree)
    weights = {name: weight for name, (_, weight) in weighed(config, "naive-1:1.5").items()}
    expected = {"a": 0.12, "b": 0.36, "c": 0.32, "d": 0.2, "watched": 0, "rough": 1}
    assert weights == pytest.approx(expected)
    run = Config.model_validate(run_settings(config, "", "naive-1:1.5", 0))
    assert step_weights(run)[0].tolist() == pytest.approx([0.12, 0.36, 0.32, 0.2])
    tdw = Config.model_validate(run_settings(config, "", "tdw", 0))
    assert step_weights(tdw)[0].tolist() == pytest.approx([0.8 * 0.7 / 4, 0.8 * 0.7 * 3 / 4, 0.8 * 0.3, 0.2])


def test_presets_need_an_early_and_a_late_reward(make_tree: Callable[..., Any]) -> None:
    tree = make_tree()
    tree["train"]["rewards"] = {"a": {"kind": "toybox_prompt"}}
    with pytest.raises(UserError, match="preset 'sars'.*presets tell prompt and identity rewards by their schedules"):
        run_settings(CompareConfig.model_validate(tree), "", "sars", 0)


def test_what_all_runs_share_counts_in_those_that_read_it(make_tree: Callable[..., Any]) -> None:
    tree = make_tree()
    tree["train"]["advantages"] = {"sars": {"gamma": 0.5, "gamma_penalty": 1.0}}
    config = CompareConfig.model_validate(tree)
    customized, naive = (advantages(config, preset) for preset in ("customized", "naive-1:1"))
    assert customized["sars"] == {"gamma": 0.5, "gamma_penalty": 1.0}
    assert naive["sars"]["gamma_penalty"] is None


def test_settings_change_the_runs_they_name(make: Make) -> None:
    blind = {"rewards": {"identity": {"toybox_identity": {"leak": "low"}}}}
    config = make(settings={"blind": blind, "leaky": {}})
    assert run_settings(config, "blind", "sars", 0)["rewards"]["identity"]["toybox_identity"]["leak"] == "low"
    assert run_settings(config, "leaky", "sars", 0)["rewards"]["identity"]["toybox_identity"]["leak"] == "high"
    labels = [(cell.setting, cell.preset, cell.seed) for cell in cells_of(config)]
    assert len(set(labels)) == 8 == len({cell.folder for cell in cells_of(config)})
    assert {seed for _, _, seed in labels[:4]} == {0}, "seed by seed"


def test_a_setting_may_change_the_number_of_steps_under_calibrated_weights(make: Make) -> None:
    config = make(presets={"customized-calibrated": 2}, settings={"fine": {"rollout": {"num_steps": 6}}})
    check_grid(config, cells_of(config))
    table = run_settings(config, "fine", "customized-calibrated", 0)["advantages"]["table"]
    assert {name: len(column) for name, column in table.items()} == {"prompt": 6, "identity": 6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presets": {"naive": 3}}, "unknown preset 'naive'; choose among base, naive-1:1, naive-1:1.5, naive-1.5:1"),
        ({"presets": {"sars": 1}}, "'sars' has 1 seed, and an interval over seeds takes at least 2"),
        ({"presets": {"sars": -1}}, "'sars' has -1 seeds; expected 1 or more, or 0 to leave it out"),
        ({"presets": {"sars": 0}}, "nothing to train"),
        ({"presets": {"base": 3}}, "nothing to train"),
        ({"presets": {"hinge": 2}}, "hinge_thresholds: preset 'hinge' needs them"),
        (
            {"presets": {"hinge": 2}, "hinge_thresholds": {"style": 1}},
            "hinge_thresholds: no reward 'style' is an objective; choose among prompt, identity",
        ),
        ({"settings": {}}, "settings: empty"),
        ({"settings": {"odd": {"seed": 3}}}, "settings 'odd': seed would be overwritten"),
        ({"settings": {"odd": {"advantages": {"shape": "min"}}}}, "settings 'odd': advantages.shape would be"),
    ],
)
def test_a_bad_grid_is_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_without_presets_all_are_run_that_need_nothing_more(make_tree: Callable[..., Any]) -> None:
    tree = make_tree()
    del tree["presets"]
    assert set(CompareConfig.model_validate(tree).trained) == set(PRESETS) - {"hinge"}


def test_one_seed_is_enough_without_intervals(make: Make) -> None:
    assert len(cells_of(make(presets={"sars": 1}, intervals=False))) == 1


@pytest.mark.parametrize(("field", "value"), [("seed", 3), ("output", "elsewhere")])
def test_what_a_grid_chooses_itself_is_refused(make_tree: Callable[..., Any], field: str, value: object) -> None:
    tree = make_tree()
    tree["train"][field] = value
    with pytest.raises(ValueError, match=f"train: {field} would be overwritten"):
        CompareConfig.model_validate(tree)


def test_missing_test_data_are_refused(make_tree: Callable[..., Any]) -> None:
    tree = make_tree()
    tree["train"]["data"]["test"] = "nowhere"
    config = CompareConfig.model_validate(tree)
    with pytest.raises(UserError, match=r"train.data.test: nowhere is not a data folder"):
        check_grid(config, cells_of(config))
    check_grid(config, cells_of(config), data=False)
    for changes in ({"settings": {"odd": {"data": {"test": None}}}}, {"train": tree["train"] | {"data": {}}}):
        config = CompareConfig.model_validate(tree | changes)
        with pytest.raises(UserError, match=r"presets are compared on test data"):
            check_grid(config, cells_of(config))


def test_settings_that_would_share_a_folder_are_refused(make: Make) -> None:
    config = make(settings={"a b": {}, "a/b": {}})
    with pytest.raises(UserError, match=r"alike as names of folders \(a-b-naive-1-1-seed0\)"):
        check_grid(config, cells_of(config))


def test_a_setting_that_makes_no_valid_run_is_named(make: Make) -> None:
    config = make(settings={"odd": {"rollout": {"group_size": 1}}})
    with pytest.raises(UserError, match=r"settings 'odd', preset 'naive-1:1': rollout.group_size: .*found 1"):
        check_grid(config, cells_of(config))


def test_a_folder_with_another_grid_is_refused(make: Make) -> None:
    config = make()
    begin(config)
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


def test_a_folder_of_other_things_is_left_alone(make: Make, display: Display) -> None:
    config = make()
    config.output.mkdir()
    (config.output / ".lock").touch()
    check_grid(config, cells_of(config))
    with pytest.raises(UserError, match=r"output: .*grid holds no grid \(no grid.yaml\), so there is nothing to"):
        compare(config, display, report_only=True)
    (config.output / "thesis.txt").touch()
    with pytest.raises(
        UserError, match=r"output: .*grid is not empty and holds no grid \(no grid.yaml\); name another"
    ):
        compare(config, display)
    assert sorted(path.name for path in config.output.iterdir()) == [".lock", "thesis.txt"]
    with pytest.raises(UserError, match=r"output: .*thesis.txt is a file; name a folder elsewhere"):
        compare(config.model_copy(update={"output": config.output / "thesis.txt" / "grid"}), display)


def test_a_damaged_configuration_of_a_run_is_named(make: Make) -> None:
    config = make()
    begin(config)
    path = cells_of(config)[0].folder / "config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("rollout: {")
    with pytest.raises(UserError, match=r"config.yaml: not the configuration that train wrote"):
        check_grid(config, cells_of(config))


def test_a_folder_that_another_process_works_on_is_refused(make: Make, display: Display) -> None:
    config = make()
    config.output.mkdir()
    with (config.output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"worked on by another compare, or by processes that a killed one left"):
            run_grid(config, cells_of(config), display, (), print)
    assert sorted(path.name for path in config.output.iterdir()) == [".lock"]


def test_the_reason_of_a_failure_is_this_attempts(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("customized-grpo: error: interrupted\n")
    before = log.stat().st_size
    assert _reason(log, before, -9) == f"killed by signal 9; see {log}"
    with log.open("a") as file:
        file.write("iteration 3/50\n")
    assert _reason(log, before, 137) == f"exit status 137 after: iteration 3/50; see {log}"
    with log.open("a") as file:
        file.write("customized-grpo: error: the disk is full\nbye\n")
    assert _reason(log, before, 1) == "the disk is full"


@pytest.mark.usefixtures("pretended")
def test_a_grid_goes_on_after_a_failure_and_repeats_nothing(
    make_tree: Callable[..., Any], display: Display, tmp_path: Path
) -> None:
    """Its runs are pretended."""
    presets = {"base": 1, "naive-1:1": 2, "customized-calibrated": 1}
    tree = make_tree(presets=presets, intervals=False, calibration_prompts=13)
    config = CompareConfig.model_validate(tree)
    begin(config)
    grid = config.output
    stray = grid / "runs" / "naive-1-1-seed1" / "stray.txt"
    stray.parent.mkdir(parents=True)
    stray.touch()
    with pytest.raises(GridError, match=r"(?s)2 runs failed.*customized-calibrated seed 0: its time weights"):
        compare(config, display)
    page = (grid / "comparison.html").read_text()
    assert "naive-1:1 seed 1" in page and "holds other files" in page
    logs = [path.parent.name for path in grid.glob("runs/*/metrics.jsonl")]
    assert logs == ["naive-1-1-seed0"]
    kept = grid / "runs" / logs[0] / "metrics.jsonl"
    kept.write_text(kept.read_text() + '{"iteration": 99, "conflict_rate": 0.5}\n')
    before = kept.read_bytes()

    stray.unlink()
    config = CompareConfig.model_validate(tree | {"calibration_prompts": 2})
    assert compare(config, display) == grid / "comparison.html"
    assert kept.read_bytes() == before, "a finished run is not repeated"
    assert all(cell.finished for cell in cells_of(config))
    assert len((grid / "comparison.csv").read_text().splitlines()) == 1 + sum(presets.values())
    table = yaml.safe_load((grid / "configs" / "customized-calibrated-seed0.yaml").read_text())["advantages"]["table"]
    assert table == TABLE
    with pytest.raises(UserError, match=r"calibration_prompts: 3 are asked for, but the weights in"):
        check_grid(config.model_copy(update={"calibration_prompts": 3}), cells_of(config))


@pytest.mark.usefixtures("pretended")
def test_a_grid_goes_on_from_the_table_of_another_machine(make: Make, display: Display, tmp_path: Path) -> None:
    """Its runs are pretended."""
    table = tmp_path / "results" / "runs.csv"
    config = make(results=table, presets={"base": 2, "sars": 2})
    compare(config, display)
    assert [(row.preset, row.seed) for row in read_csv(table)] == [("base", 0), ("base", 1), ("sars", 0), ("sars", 1)]

    rows = table.read_text().replace(",sars,1,48,", ",sars,1,47,").splitlines(keepends=True)
    table.write_text("".join(row for row in rows if ",sars,0," not in row))  # as if that run was not made there
    elsewhere = config.model_copy(update={"output": tmp_path / "elsewhere"})
    page = compare(elsewhere, display)
    assert [path.name for path in (elsewhere.output / "runs").iterdir()] == ["sars-seed0"]
    assert [row.values["pairs"] for row in read_csv(table)] == [48, 48, 48, 47], "the row that was there is kept"
    assert (elsewhere.output / "comparison.csv").read_text() == table.read_text()
    assert "In progress" not in page.read_text()

    third = config.model_copy(update={"output": tmp_path / "third"})
    assert compare(third, display, report_only=True).is_file()
    assert not (third.output / "runs").exists()


@pytest.mark.usefixtures("pretended")
def test_each_run_is_in_the_table_when_it_ends(make: Make, display: Display, tmp_path: Path) -> None:
    config = make(results=tmp_path / "runs.csv", presets={"base": 2, "sars": 2}, jobs=1)
    seen = []

    def end(cell: Cell) -> None:
        command_module._add(config, [cell])
        seen.append(len(read_csv(tmp_path / "runs.csv")))

    run_grid(config, cells_of(config), display, (), end)
    assert seen == [2, 4]


def test_a_table_of_another_grid_is_refused(make: Make, tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    with pytest.raises(ValueError, match=r"results: found '.*runs\.txt', expected the name of a table"):
        make(results=table.with_suffix(".txt"))
    config = make(results=table)
    table.write_text("setting,preset,seed\n")
    with pytest.raises(UserError, match=r"results: beside .*runs\.csv there is no runs\.yaml, which says"):
        check_grid(config, cells_of(config))
    record_of(table).write_text(yaml.safe_dump(_record(config)))
    check_grid(config, cells_of(config))
    other = config.train.model_copy(update={"iterations": 99})
    with pytest.raises(UserError, match=r"runs\.csv holds another grid: train\.iterations is 2 there and 99 here"):
        check_grid(config.model_copy(update={"train": other}), cells_of(config))


@pytest.mark.slow
def test_a_grid_runs_goes_on_after_a_failure_and_repeats_nothing(
    make_tree: Callable[..., Any], tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    presets = {"base": 1, "naive-1:1": 2, "customized-calibrated": 1}
    tree = make_tree(presets=presets, intervals=False, calibration_prompts=13)
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(tree))
    grid = tmp_path / "grid"
    begin(CompareConfig.model_validate(tree))
    stray = grid / "runs" / "naive-1-1-seed1" / "stray.txt"
    stray.parent.mkdir(parents=True)
    stray.touch()

    first = command("compare", "--config", path)
    assert first.returncode == 1, first.stderr
    assert "2 runs failed" in first.stderr and "naive-1:1 seed 1: output: " in first.stderr
    assert "holds other files than a run's" in first.stderr
    assert "customized-calibrated seed 0: its time weights could not be measured: --prompts: 13" in first.stderr
    assert "naive-1:1 seed 0: done  2/2" in first.stdout
    page = (grid / "comparison.html").read_text()
    assert "naive-1:1 seed 1" in page and "holds other files" in page
    logs = {path: path.read_bytes() for path in grid.glob("runs/*/metrics.jsonl")}
    assert len(logs) == 1

    stray.unlink()
    second = command("compare", "--config", path, "--calibration_prompts", "2")
    assert second.returncode == 0, second.stderr
    assert "customized-calibrated seed 0: done  2/2" in second.stdout
    assert "naive-1:1 seed 1: done" in second.stdout and "naive-1:1 seed 0" not in second.stdout
    assert {path: path.read_bytes() for path in logs} == logs, "finished runs are not repeated"
    assert len((grid / "comparison.csv").read_text().splitlines()) == 1 + sum(presets.values())
    assert {path.name for path in (grid / "figures").iterdir()} >= {"plane.svg", "plane.png", "curves.svg"}

    path.write_text(yaml.safe_dump(tree | {"calibration_prompts": 2, "title": "Another title"}))
    main(["compare", "--config", str(path), "--report_only"])
    assert "Another title" in (grid / "comparison.html").read_text()
    for change, message in (
        (
            {"train": tree["train"] | {"rollout": {}}},
            "another grid: train.rollout.prompts_per_iteration is 2 there",
        ),
        ({"settings": {"low": {}}}, "holds another grid: settings. is '{}' there and None here"),
        ({"calibration_prompts": 3}, "calibration_prompts: 3 are asked for, but the weights in"),
    ):
        config = CompareConfig.model_validate(tree | {"calibration_prompts": 2} | change)
        with pytest.raises(UserError, match=re.escape(message)):
            check_grid(config, cells_of(config))
    main(["figures", "--csv", str(grid / "comparison.csv"), "--output", str(tmp_path / "drawn")])
    assert (tmp_path / "drawn" / "plane.svg").read_bytes() == (grid / "figures" / "plane.svg").read_bytes()


@pytest.mark.usefixtures("pretended")
def test_nothing_is_orphaned_when_a_grid_is_stopped(
    make_tree: Callable[..., Any], tmp_path: Path, python: Callable[..., Process]
) -> None:
    """Its runs are pretended."""
    check_stopped(make_tree(), tmp_path, python)


@pytest.mark.slow
def test_nothing_is_orphaned_when_a_grid_of_true_runs_is_stopped(
    make_tree: Callable[..., Any], tmp_path: Path, python: Callable[..., Process]
) -> None:
    check_stopped(make_tree(), tmp_path, python)


def check_stopped(tree: dict[str, Any], folder: Path, python: Callable[..., Process]) -> None:
    """Start a grid of two endless runs, stop the grid, and see that both runs have stopped."""
    tree["train"]["iterations"] = 10_000
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree))
    process = python("-m", "customized_grpo", "compare", "--config", path)
    logs = [folder / "grid" / "runs" / f"{name}-seed0" / "metrics.jsonl" for name in ("naive-1-1", "customized")]
    deadline = time.monotonic() + 120
    while not all(log.is_file() and log.stat().st_size for log in logs):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    sizes = [log.stat().st_size for log in logs]
    time.sleep(1.0)
    assert [log.stat().st_size for log in logs] == sizes, "both runs have stopped"


def test_nothing_to_report_is_an_error(
    make_tree: Callable[..., Any], tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(make_tree()))
    begin(CompareConfig.model_validate(make_tree()))
    found = command("compare", "--config", path, "--report_only")
    assert found.returncode == 2 and "is finished, so there is nothing to report" in found.stderr
