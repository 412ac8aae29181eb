"""Whatever a command writes, a disk that takes no more ends it with one message, and leaves nothing torn."""

import ast
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from customized_grpo.cli.main import main
from customized_grpo.compare.config import CompareConfig
from customized_grpo.compare.grid import cells_of, run_grid
from customized_grpo.compare.page import write_page
from customized_grpo.compare.results import Result
from customized_grpo.compare.table import write_csv
from customized_grpo.config.run import Config
from customized_grpo.diagnosis.command import diagnose
from customized_grpo.errors import UserError
from customized_grpo.factory.policy import build_policy
from customized_grpo.io.files import StorageError, downloading, locked, replacing, writing
from customized_grpo.io.hub import from_hub
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.toybox.weights import save_network
from customized_grpo.tracking.console import Display
from customized_grpo.training import loop

Limit = Callable[[int], AbstractContextManager[None]]
MakeConfig = Callable[..., Config]
COUNTS = {"prompts": 2, "group_size": 2, "batches": 2}
WRITES = {
    "write_text",
    "write_bytes",
    "save_file",
    "savefig",
    "save_pretrained",
    "replace",
    "rename",
    "mkdir",
    "rmdir",
    "touch",
    "rmtree",
}
"""Names of functions that change a disk."""
GUARDS = {"writing", "replacing"}


@pytest.fixture
def run(tmp_path: Path, make_config: MakeConfig) -> Path:
    """A folder with all that the other commands read of a run."""
    config, folder = make_config(), tmp_path / "run"
    build_policy(config.policy, config.seed).save_adapter(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    row = {"iteration": 2, "reward/prompt/mean": 0.5, "reward/identity/mean": 0.5, "conflict_rate": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def settings(make_settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(make_settings({"rollout.num_steps": 3, "rollout.group_size": 2})))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A comparison of two runs."""
    values = {"joint_success": 0.5, "prompt_satisfied": 0.6, "identity_kept": 0.7}
    results = [Result("", preset, 0, values, {}) for preset in ("naive-1:1", "customized")]
    write_csv(tmp_path / "comparison.csv", results)
    return tmp_path / "comparison.csv"


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMMANDS = {
    "export": "toybox export {out} --count 2",
    "prepare": "prepare {pictures} {out}",
    "report": "report --run {run}",
    "generate": "generate --run {run} --reference {pictures}/cup/a.png --prompt {prompt} --out {out}/a.png",
    "evaluate": "evaluate --run {run} --num_samples 2",
    "benchmark": "evaluate --benchmark folder --data {test} --adapter {run} --output {out} --num_steps 2",
    "diagnose": "diagnose --config {settings} --out {out} --prompts 2 --group_size 2 --batches 2",
    "figures of a table": "figures --csv {table} --output {out}",
    "train": "train --config {settings} --output {out}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_that_the_disk_is_full(
    name: str, run: Path, settings: Path, table: Path, toybox_data: Path, tmp_path: Path, files_up_to: Limit,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pictures = tmp_path / "pictures"
    (pictures / "cup").mkdir(parents=True)
    reference = next((toybox_data / "test" / "references").iterdir())
    (pictures / "cup" / "a.png").write_bytes(reference.read_bytes())
    (pictures / "cup" / "prompts.txt").write_text("a cup\n")
    prompt = json.loads((toybox_data / "test" / "metadata.jsonl").read_text().splitlines()[0])["prompt"]
    places = {
        "out": tmp_path / "out", "run": run, "settings": settings, "table": table, "pictures": pictures,
        "test": toybox_data / "test",
    }  # fmt: skip
    arguments = [prompt if word == "{prompt}" else word.format(**places) for word in COMMANDS[name].split()]
    before = files(tmp_path)
    with files_up_to(16), pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("customized-grpo: error: "), said
    assert "no space to write (" in said and "Make room, or raise the quota" in said
    assert str(run if "{out}" not in COMMANDS[name] else tmp_path) in said
    # What was there is as it was, and what is new is empty, as a lock is.
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} <= {".lock"}


def test_figures_of_a_diagnosis(
    make_config: MakeConfig, display: Display, tmp_path: Path, files_up_to: Limit, capsys: pytest.CaptureFixture[str]
) -> None:
    record = diagnose(
        make_config({"rollout.num_steps": 3, "rollout.group_size": 2}), tmp_path / "diagnosis", display, **COUNTS
    )
    with files_up_to(16), pytest.raises(SystemExit):
        main(["figures", "--diagnosis", str(record), "--output", str(tmp_path / "out")])
    assert f"error: {tmp_path / 'out'}: no space to write" in capsys.readouterr().err
    # The drawing fits, the PNG beside it does not.
    size = (tmp_path / "diagnosis" / "diagnosis.svg").stat().st_size
    assert size < (tmp_path / "diagnosis" / "diagnosis.png").stat().st_size
    with files_up_to(size), pytest.raises(SystemExit):
        main(["figures", "--diagnosis", str(record), "--output", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["diagnosis.svg"]


def test_a_grid_does_not_begin(
    make_settings: Callable[..., dict[str, Any]], display: Display, tmp_path: Path, files_up_to: Limit
) -> None:
    train = make_settings()
    del train["output"]
    config = CompareConfig.model_validate(
        {"output": tmp_path / "grid", "presets": {"naive-1:1": 2}, "train": train, "jobs": 1}
    )
    with files_up_to(16), pytest.raises(StorageError, match=f"{config.output}: no space to write"):
        run_grid(config, cells_of(config), display, (), print)
    assert [path.name for path in config.output.iterdir()] == [".lock"]
    with files_up_to(16), pytest.raises(StorageError, match=f"{config.output}: no space to write"):
        write_page([], [], config.output, title="", settings_text="", failures={})


def test_weights_of_toybox(make_policy: Callable[..., ToyBoxPolicy], tmp_path: Path, files_up_to: Limit) -> None:
    network = make_policy().networks[0]
    save_network(network, tmp_path, "context")
    before = files(tmp_path)
    with files_up_to(1000), pytest.raises(StorageError, match=f"{tmp_path}: no space to write .* MB are needed"):
        save_network(network, tmp_path, "context")
    with files_up_to(1000), pytest.raises(StorageError, match=f"{tmp_path}: no space to write"):
        make_policy().save_adapter(tmp_path)
    assert files(tmp_path) == before


def test_events_of_tensorboard(
    make_config: MakeConfig, run_training: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its thread fails when the disk is full, and every call after that raises what the thread met."""

    class Full:
        def __init__(self, *arguments: object, **settings: object) -> None:
            pass

        def add_image(self, *arguments: object) -> None:
            raise OSError(28, os.strerror(28))

        add_scalar = close = add_image

    monkeypatch.setattr("customized_grpo.tracking.registry.load_summary_writer", lambda: Full)
    with pytest.raises(StorageError, match=f"{tmp_path / 'run'}: no space to write"):
        run_training(make_config({"log.report_to": ["tensorboard"]}))


def test_the_outermost_guard_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, writing(tmp_path), writing(tmp_path / "a" / "b", 2_000_000):
        raise OSError(28, os.strerror(28))
    assert str(caught.value).startswith(f"{tmp_path}: no space to write ([Errno 28]")
    with pytest.raises(StorageError, match="one of ours"), writing(tmp_path):
        raise StorageError("one of ours")


def test_a_failed_replacement_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "new" / "a.txt"

    def tear() -> None:
        with replacing(place) as unfinished:
            unfinished.write_text("half")
            raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        tear()
    assert list(place.parent.iterdir()) == []
    with replacing(place) as unfinished:
        unfinished.write_text("whole")
    assert [path.name for path in place.parent.iterdir()] == ["a.txt"] and place.read_text() == "whole"
    with pytest.raises(StorageError, match="cannot be written to"), replacing(place / "b") as unfinished:
        pass


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written to"), locked(tmp_path / "none", "another"):
        pass


@pytest.mark.parametrize("error", [OSError(28, "No space"), RuntimeError("IO Error: No space left (os error 28)")])
def test_a_disk_that_a_download_fills(error: Exception, tmp_path: Path) -> None:
    told = r"no space to write .*, or name a folder on another disk in HF_HOME"
    with pytest.raises(StorageError, match=told), from_hub():
        raise error
    with pytest.raises(StorageError), downloading(tmp_path, "HF_HOME"):
        raise OSError("could not load") from error


@pytest.mark.parametrize("error", [OSError(13, "Permission denied"), RuntimeError("other"), UserError("mine")])
def test_other_errors_of_a_download_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[-1])), from_hub():
        raise error


def test_nothing_is_written_without_a_guard() -> None:
    """Every call that changes a disk stands in a `with` of one of the guards."""
    sources = sorted(Path(loop.__file__).parents[1].rglob("*.py"))
    found = [f"{path.name}, {call}" for path in sources for call in unguarded(ast.parse(path.read_text()))]
    assert len(sources) > 100 and found == []


def unguarded(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.With):
        calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        if GUARDS & {name_of(call) for call in calls}:
            return
    if isinstance(node, ast.Call):
        modes = [value for each in node.args if isinstance(value := getattr(each, "value", None), str)]
        opened = name_of(node) == "open" and any(set(mode) <= set("wabx+") for mode in modes)
        if opened or (name_of(node) in WRITES and not is_harmless(node)):
            yield f"line {node.lineno}: {ast.unparse(node)}"
    for child in ast.iter_child_nodes(node):
        yield from unguarded(child)


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def is_harmless(call: ast.Call) -> bool:
    """Whether it is a `replace` of a string or a dataclass, writes into memory, or removes what can be left."""
    told = ast.unparse(call)
    if name_of(call) == "replace":
        return not told.startswith("os.")
    return told.startswith("figure.savefig(content,") or "ignore_errors=True" in told


def test_the_guard_of_guards_sees_what_it_should() -> None:
    seen = list(unguarded(ast.parse("path.open('w')\nwith writing(a):\n    os.replace(a, b)\nos.replace(a, b)\n")))
    assert len(seen) == 2
    assert not list(unguarded(ast.parse("text.replace('a', 'b')\nreplace(settings, seed=1)\npath.open('rb')")))
