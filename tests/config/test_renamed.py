"""An old name of a field is an error that says the new one, wherever the old name stands."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from customized_grpo.benchmark.config import BenchmarkConfig
from customized_grpo.cli.main import main
from customized_grpo.compare.config import CompareConfig, run_settings
from customized_grpo.config.files import check_file
from customized_grpo.config.messages import field_names, format_validation_error
from customized_grpo.config.renamed import REMOVED, RENAMED, new_name
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.training.run_dir import load_run_config

OF_EVALUATE = ("pairs", "guidance", "metrics.hpsv3_weights")
OF_TRAIN = [name for name in RENAMED if name not in OF_EVALUATE]


def tree_of(name: str, value: Any = 1) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    tree: dict[str, Any] = value
    return tree


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_name_is_no_fields_and_the_new_one_is(name: str) -> None:
    known = {*field_names(Config), *field_names(BenchmarkConfig), "num_samples"}
    assert name not in known and new_name(name) in known


@pytest.mark.parametrize("name", OF_TRAIN)
def test_in_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"seed": 0} | tree_of(name)))
    with pytest.raises(UserError) as refused:
        check_file(path, Config)
    told = name if "." not in name or not name.startswith("ranks.") else "ranks"
    assert f"{told} is now {RENAMED[told]}; use the new name" in str(refused.value)


@pytest.mark.parametrize("name", REMOVED)
def test_what_is_gone_is_told(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree_of(name, "none")))
    with pytest.raises(UserError, match=rf"{re.escape(name)} is gone: .*; leave it out"):
        check_file(path, Config)
    with pytest.raises(SystemExit):
        main(["train", f"--{name}=none"])
    assert f"error: {name} is gone: {REMOVED[name]}; leave it out" in capsys.readouterr().err


def test_a_reward_that_was_named_by_its_kind_is_told_to_be_a_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rewards: {prompt: hpsv3}\n")
    with pytest.raises(UserError, match=r"rewards\.prompt: expected its fields below it, of kind, hpsv3"):
        check_file(path, Config)
    with pytest.raises(SystemExit):
        main(["train", "--rewards.prompt=hpsv3"])
    assert "rewards.prompt: a section; give its fields, as --rewards.prompt.kind VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("name", OF_TRAIN)
def test_as_an_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", f"--{name}=1"])
    assert ended.value.code == 2
    assert f"error: {name} is now {RENAMED[name]}; use the new name" in capsys.readouterr().err


@pytest.mark.parametrize("name", OF_EVALUATE)
def test_as_an_option_of_evaluate(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", f"--{name}=1"])
    assert ended.value.code == 2
    assert f"error: {name} is now {RENAMED[name]}; use the new name" in capsys.readouterr().err


def test_an_option_of_another_command_is_just_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--pairs=1"])
    assert "unknown option or configuration field 'pairs'" in capsys.readouterr().err


def test_in_python() -> None:
    with pytest.raises(ValidationError) as refused:
        Config.model_validate({"rollout": {"subset_share": 0.5}})
    told = format_validation_error(refused.value)
    assert told == "rollout.subset_share is now rollout.subset.timestep_fraction; use the new name"


def test_in_the_file_of_a_comparison(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("train:\n  advantages: {clamp: 4}\n")
    with pytest.raises(UserError, match=r":2: train\.advantages\.clamp is now train\.advantages\.clip; use the new"):
        check_file(path, CompareConfig)
    settings = {"blind": {"rewards": {"identity_leak": "low"}}}
    config = CompareConfig.model_validate({"settings": settings, "train": {"data": {"test": "data"}}})
    with pytest.raises(UserError, match=r"rewards\.identity_leak is now rewards\.NAME\.toybox_identity\.leak"):
        run_settings(config, "blind", "sars", 0)


def test_the_run_of_an_earlier_version_is_refused_with_words(
    make_settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = make_settings()
    settings["rollout"] |= {"steps": "subset", "subset_share": 0.6, "initial_noise": "shared", "window_size": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError) as refused:
        load_run_config(tmp_path)
    told = str(refused.value)
    assert told.startswith(f"{tmp_path / 'config.yaml'}: written by an earlier version, before fields were renamed (")
    assert "rollout.steps is now rollout.trained_steps; " in told and "and 1 more" in told
    assert told.endswith("go on with the version that wrote it, or start a new --output")
