"""The command line: in this process where torch is not the point, and end to end in processes of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from customized_grpo import __version__
from customized_grpo.benchmark.config import BenchmarkConfig
from customized_grpo.cli import main as cli
from customized_grpo.cli.parser import build_parser
from customized_grpo.config.run import Config
from customized_grpo.toybox.language import VOCABULARY
from customized_grpo.training.run_dir import LOGS
from customized_grpo.training.trainer import Trainer, TrainingError

Refused = Callable[..., str]
Settings = Callable[..., dict[str, Any]]
STATUS = {"usage": 2, "failure": 1, "interrupted": 130}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """The one message of a command that ends with `status`, and leaves everything under `tmp_path` as it was."""

    def run(*arguments: object, status: int = 2) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as caught:
            cli.main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        assert caught.value.code == status and out == ""
        assert err.startswith("customized-grpo: error: ") and err.count("error: ") == 1 and "Traceback" not in err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return err

    return run


@pytest.fixture
def settings_file(tmp_path: Path, make_settings: Settings) -> Callable[..., Path]:
    """A YAML file with the settings of a small run, changed."""

    def write(changes: dict[str, Any] | None = None) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(make_settings(changes)))
        return path

    return write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of one sample, to be spoilt."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (40, 30), (200, 100, 0)).save(folder / "a.png")
    write_lines(folder, sample())
    return folder


def sample(name: str = "one", prompt: str = "a star on the beach", reference: str = "a.png") -> dict[str, Any]:
    return {"id": name, "prompt": prompt, "references": [reference]}


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of the settings in a tree."""
    return [
        leaf
        for name, value in tree.items()
        for leaf in (leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name])
    ]


def write_lines(folder: Path, *rows: dict[str, Any] | str) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


# settings


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"rollout.group_sise": 4}, ["rollout.group_sise", "Did you mean 'rollout.group_size'?"]),
        ({"itterations": 4}, ["itterations", "Did you mean 'iterations'?"]),
        ({"group_size": 4}, ["group_size", "Did you mean 'rollout.group_size'?"]),
        ({"rollout.group_size": "many"}, ["rollout", "group_size", "many"]),
        ({"rollout.group_size": 1}, ["rollout", "group_size", "greater than or equal to 2"]),
        ({"policy.adapter": "lorra"}, ["policy", "adapter", "lora", "full"]),
        ({"rollout.steps": "window", "rollout.window_size": 4}, ["window", "does not fit", "num_steps=4"]),
        ({"advantages.weights": "table"}, ["advantages.table has 0 rows"]),
    ],
)
def test_a_wrong_setting_in_the_file_is_named(
    refused: Refused, settings_file: Callable[..., Path], changes: dict[str, Any], messages: list[str]
) -> None:
    error = refused("train", "--config", settings_file(changes))
    assert all(message in error for message in messages), error
    assert "[type=" not in error and "pydantic" not in error


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--rollout.group_sise", "4"], ["rollout.group_sise", "Did you mean 'rollout.group_size'?"]),
        (["--optimiser.learning_rate", "1"], ["optimiser", "optimizer.learning_rate"]),
        (["--iterations", "soon"], ["iterations", "soon"]),
        (["--iterations", "0"], ["iterations", "0"]),
        (["--rollout.group_size", "1"], ["group_size", "2"]),
        (["--rollout.steps", "window", "--rollout.window_start", "9"], ["window", "does not fit"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--resume", "--overwrite"], ["--resume and --resume_from continue a run and --overwrite deletes it"]),
        (["--resume_from", "nowhere", "--output", "no/where"], ["nowhere/manifest.json: damaged or missing"]),
    ],
)
def test_a_wrong_option_is_named(refused: Refused, arguments: list[str], messages: list[str]) -> None:
    error = refused("train", *arguments)
    assert all(message in error for message in messages), error


def test_the_file_among_several_is_named(refused: Refused, settings_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("rollout: {eta: -1}\n")
    for files in (("settings", "more"), ("more", "settings")):
        arguments = [word for name in files for word in ("--config", settings_file().with_name(f"{name}.yaml"))]
        error = refused("train", *arguments)
        assert f"{tmp_path / 'more.yaml'}: rollout.eta: Input should be greater than 0 (found -1)" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--overwrit"], "unknown option or configuration field 'overwrit'. Did you mean 'overwrite'?"),
        (["train", "--over"], "unknown option or configuration field 'over'."),
        (["train", "--data", "here"], "data: a section; give its fields, as --data.path VALUE"),
        (["train", "--advantages.weights", "constant", "--advantages.constant", "[1,2,3]"], "at most 2 items"),
        (["train", "--rewards.identity", "dinoo"], "rewards.identity: expected one of toybox, dino, clip_i,"),
        (["generate", "--reference", "a", "--run", "b"], "missing: --prompt\nSee customized-grpo generate --help"),
        (["generate", "--sed", "1"], "Did you mean 'seed'?"),
        (["generate", "--run", "a", "--seed", "x"], "seed: expected a whole number (found 'x')"),
        (["prepare"], "missing: SRC\nSee customized-grpo prepare --help"),
        (["prepare", "a", "b", "--max-bda", "2"], "Did you mean 'max_bad'?"),
        (["toybox", "export"], "missing: FOLDER\nSee customized-grpo toybox export --help"),
        (["toybox", "export", "a", "--cuont", "2"], "Did you mean 'count'?"),
        (["diagnose", "--prompts", "few"], "prompts: expected a whole number (found 'few')"),
    ],
)
def test_messages_are_of_the_command(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_a_dry_run_of_several_processes_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "--dry-run", "--num-processes", "5"])
    said = capsys.readouterr().out
    assert said.count("one iteration, and what it needs of each of 5 processes") == 1
    with pytest.raises(SystemExit):
        cli.main(["train", "--dry-run", "--num-processes", "6"])
    assert "5 groups cannot be shared among 6 processes" in capsys.readouterr().err


def test_a_number_of_processes_that_is_none(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE: the environment variable is 'two', expected a number of processes" in refused("train")


def test_an_unknown_command_is_refused(refused: Refused) -> None:
    assert "tain" in refused("tain")


# data


def test_a_missing_data_folder_is_named(refused: Refused, settings_file: Callable[..., Path], tmp_path: Path) -> None:
    path = settings_file({"data.path": tmp_path / "none"})
    assert f"data folder {tmp_path / 'none'} does not exist" in refused("train", "--config", path)


def test_a_broken_line_is_named_by_file_and_line(
    refused: Refused, settings_file: Callable[..., Path], data: Path
) -> None:
    write_lines(data, sample(), '{"id": "two", "prompt"')
    error = refused("train", "--config", settings_file({"data.path": data}))
    assert f"{data / 'metadata.jsonl'}:2: broken JSON" in error


def test_all_bad_images_are_listed(refused: Refused, settings_file: Callable[..., Path], data: Path) -> None:
    (data / "b.png").write_bytes((data / "a.png").read_bytes()[:60])
    Image.new("RGB", (400, 300)).save(data / "large.png")
    rows = [sample(name, reference=f"{name}.png") for name in ("a", "b", "large", "missing")]
    write_lines(data, *rows)
    error = refused("train", "--config", settings_file({"data.path": data, "data.max_pixels": 2000}))
    assert all(f"{name}.png" in error for name in ("b", "large", "missing")) and "a.png" not in error


def test_a_path_that_leaves_the_folder_is_refused(
    refused: Refused, settings_file: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    write_lines(data, sample(reference="../secret.png"))
    error = refused("train", "--config", settings_file({"data.path": data}))
    assert "'../secret.png', leaves the data folder" in error


def test_an_unknown_word_is_named_with_the_vocabulary(
    refused: Refused, settings_file: Callable[..., Path], data: Path
) -> None:
    write_lines(data, sample(prompt="a zebra on the beach"))
    error = refused("train", "--config", settings_file({"data.path": data}))
    assert "sample 'one'" in error and "'zebra'" in error and ", ".join(VOCABULARY) in error


def test_validation_and_test_data_are_checked_before_training(
    refused: Refused, settings_file: Callable[..., Path], data: Path
) -> None:
    write_lines(data, sample(prompt="a zebra on the beach"))
    for field in ("data.validation", "data.test"):
        assert "'zebra'" in refused("train", "--config", settings_file({field: data}))


def test_segmenting_needs_masks(refused: Refused, settings_file: Callable[..., Path], data: Path) -> None:
    changes = {"data.path": data, "rewards.identity_reference": "segmented"}
    assert "sample 'one': has no mask" in refused("train", "--config", settings_file(changes))


def test_missing_weights_are_named(refused: Refused, settings_file: Callable[..., Path], tmp_path: Path) -> None:
    error = refused("train", "--config", settings_file({"policy.weights": tmp_path / "none"}))
    assert "prompt_encoder.safetensors: no such weights" in error


def test_an_output_with_something_in_it_is_refused(
    refused: Refused, settings_file: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    assert "is not empty. Pass --resume" in refused("train", "--config", settings_file())


# the other commands


@pytest.mark.parametrize("command", ["evaluate", "report", "generate"])
def test_a_folder_that_is_no_run_is_refused(refused: Refused, tmp_path: Path, command: str) -> None:
    extra = ["--reference", "a.png", "--prompt", "a star"] if command == "generate" else []
    assert str(tmp_path) in refused(command, "--run", tmp_path, *extra)


def test_pictures_are_written_as_png(refused: Refused, tmp_path: Path) -> None:
    arguments = ["--reference", "a.png", "--prompt", "a star", "--out", "a.jpg"]
    assert "ends in .png, not a.jpg" in refused("generate", "--run", tmp_path, *arguments)


def test_references_are_named_together_or_one_by_one() -> None:
    arguments = ["generate", "--run", "r", "--prompt", "a star", "--reference", "a.png", "b.png", "--reference=c.png"]
    found = build_parser().parse_args(arguments).generate.reference
    assert [path.name for path in found] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("pairs", ["0", "-1", "some"])
def test_the_number_of_pairs_is_at_least_one(refused: Refused, pairs: str) -> None:
    assert re.search(rf"pairs.* '?{pairs}", refused("evaluate", "--run", "nowhere", "--pairs", pairs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "evaluate: name a run with --run DIR, or a benchmark with --benchmark dreambench"),
        (["--benchmark", "dreambench"], "data: name the benchmark's folder"),
        (["--benchmark", "dreambench", "--data", "nowhere"], "data: nowhere is no folder"),
        (["--benchmark", "dreambench", "--pairs", "3"], "--pairs: only with --run"),
        (["--run", "somewhere", "--num-steps", "3"], "num_steps belongs to --benchmark"),
        (["--benchmark", "dream"], "benchmark: Input should be 'dreambench' or 'folder' (found 'dream')"),
        (["--benchmark", "dreambench", "--guidance", "x"], "guidance: Input should be a valid number"),
        (["--benchmark", "dreambench", "--numsteps", "3"], "Did you mean 'num_steps'?"),
        (
            ["--benchmark", "dreambench", "--hpsv3-as-published", "--metrics.names", "[dino]"],
            "metrics.names has no hpsv3",
        ),
    ],
)
def test_bad_input_of_benchmarks(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused("evaluate", *arguments)


@pytest.mark.parametrize("count", ["0", "-1", "some"])
def test_the_number_of_exported_prompts_is_at_least_one(refused: Refused, count: str) -> None:
    assert re.search(rf"count.*[ ']{count}", refused("toybox", "export", "nowhere", "--count", count))


def test_an_unknown_split_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert "validation" in refused("toybox", "export", tmp_path / "made", "--split", "dev")


def test_an_export_does_not_overwrite(refused: Refused, data: Path) -> None:
    assert "is not empty" in refused("toybox", "export", data)


def test_training_that_cannot_go_on_ends_with_another_status(
    settings_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for raised, status, text in (
        (TrainingError("iteration 1: the loss is nan"), STATUS["failure"], "the loss is nan"),
        (KeyboardInterrupt(), STATUS["interrupted"], "--resume"),
    ):

        def fail(*arguments: object, error: BaseException = raised) -> None:
            raise error

        monkeypatch.setattr(Trainer, "train_step", fail)
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", "--config", str(settings_file()), "--overwrite"])
        assert caught.value.code == status and text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diagnose"], "name a trained run with --run DIR, or what to start from with --config FILE"),
        (["diagnose", "--run", "nowhere"], "nowhere is not the folder of a run"),
        (["figures", "--output", "x"], "name the table of a comparison with --csv, or a diagnosis.json with"),
        (["figures", "--output", "x", "--csv", "nowhere.csv"], "nowhere.csv"),
        (["figures", "--output", "x", "--diagnosis", "nowhere.json"], "nowhere.json"),
        (["compare", "--presets", "{naive: 3}"], "unknown preset 'naive'; choose among base, naive-1:1, naive-1:1.5"),
        (["compare", "--presets", "{sars: 1}"], "an interval over seeds takes at least 2"),
        (["compare", "--presets", "{sars: 2}"], "name its folder in train.data.test"),
        (["compare", "--jbos", "2"], "unknown option or configuration field 'jbos'. Did you mean 'jobs'?"),
        (["compare", "--train.rollout.grup_size", "4"], "Did you mean 'train.rollout.group_size'?"),
        (["diagnose", "--run", "nowhere", "--rollout.eta", "0.3"], "leave out rollout.eta, or give --config"),
        (["diagnose", "--run", "nowhere", "--output", "x"], "--output: diagnose writes to --out DIR; leave it out"),
        (["compare", "--jobs", "0"], "jobs"),
        (["compare", "--train.rollout.group_size", "1"], "group_size"),
    ],
)
def test_bad_input_of_comparisons_and_diagnoses(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_diagnose_takes_a_file_for_train_with_its_output(refused: Refused, settings_file: Callable[..., Path]) -> None:
    assert "output:" in settings_file().read_text()
    assert "--prompts: at least 2" in refused("diagnose", "--config", settings_file(), "--prompts", 1)


COMMANDS = [
    [], ["train"], ["compare"], ["diagnose"], ["figures"], ["evaluate"], ["generate"], ["report"], ["env"], ["toybox"],
    ["toybox", "export"],
    ["toybox", "pretrain"],
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, "--help"])
    assert caught.value.code == 0 and "usage:" in capsys.readouterr().out


def test_help_of_training_tells_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "FieldInfo" not in text
    missing = [name for name in leaves(Config().model_dump()) if f"--{name} " not in text]
    assert missing == []
    assert "Images per prompt, G (paper: 12)." in text and "default: 12" in text


def test_help_of_evaluation_tells_the_fields_of_a_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert [name for name in leaves(BenchmarkConfig().model_dump()) if f"--{name} " not in f"{text} "] == []


def test_dashes_are_underscores_in_the_names_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["prepare", "nowhere", "--check", "--max-bad=-1"])
    assert "--max_bad at least 0" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_has_them_spin(
    given: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP reads this when torch is loaded, which no command does before it is parsed."""
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert os.environ["OMP_WAIT_POLICY"] == found


# in a process of its own


def test_the_command_line_is_there_before_torch() -> None:
    code = (
        "import sys, customized_grpo.cli.main as cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'peft', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_installed_command_says_its_version(installed_command: Callable[..., Any]) -> None:
    done = installed_command("--version")
    assert done.returncode == 0 and __version__ in done.stdout


def test_a_refusal_is_one_message_and_status_two(
    command: Callable[..., Any], settings_file: Callable[..., Path]
) -> None:
    done = command("train", "--config", settings_file({"rollout.group_size": 1}))
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("customized-grpo: error: ") and "group_size" in done.stderr


def test_the_environment_is_described(command: Callable[..., Any]) -> None:
    done = command("env")
    assert done.returncode == 0 and "torch: " in done.stdout and f"customized-grpo: {__version__}" in done.stdout


def test_from_data_to_pictures(command: Callable[..., Any], settings_file: Callable[..., Path], tmp_path: Path) -> None:
    """Export, train, evaluate, generate: as a user does, each in a new process."""

    def done(*arguments: object) -> str:
        ended = command(*arguments)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    done("toybox", "export", "made", "--split", "test", "--count", 4)
    out = done("train", "--config", settings_file(), "--data.path", "made", "--data.test", "made", "--output", "out")
    assert "report: out/report.html" in out and "iteration 2/2" in out
    assert all((tmp_path / "out" / name).stat().st_size > 0 for name in (*LOGS, "report.html", "config.yaml"))
    assert "report: out/report.html" in done("evaluate", "--run", "out", "--data", "made", "--pairs", 2)
    picture = tmp_path / "made" / "references" / "test-00000.png"
    prompt = "a star on the beach wearing a red hat, on the left"
    for name, extra in (("tuned.png", ["--count", 3]), ("base.png", ["--base"])):
        done("generate", "--run", "out", "--reference", picture, "--prompt", prompt, "--out", name, *extra)
    assert [Image.open(tmp_path / name).size for name in ("tuned.png", "base.png")] == [(768, 256), (256, 256)]
