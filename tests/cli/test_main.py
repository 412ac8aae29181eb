"""The command line: in this process where torch is not the point, and end to end in processes of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from customized_grpo import __version__
from customized_grpo.benchmark.config import BenchmarkConfig
from customized_grpo.cli import commands
from customized_grpo.cli import main as cli
from customized_grpo.config.messages import field_names, section_at
from customized_grpo.config.run import Config
from customized_grpo.training.run_dir import LOGS
from customized_grpo.training.trainer import Trainer, TrainingError

Refused = Callable[..., str]
Settings = Callable[..., dict[str, Any]]
STATUS = {"usage": 2, "failure": 1, "interrupted": 130}


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of the settings in a tree."""
    return [
        leaf
        for name, value in tree.items()
        for leaf in (leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name])
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--overwrit"], "unknown option or configuration field 'overwrit'. Did you mean 'overwrite'?"),
        (["train", "--over"], "unknown option or configuration field 'over'."),
        (["train", "--data", "here"], "data: a section; give its fields, as --data.path VALUE"),
        (["train", "--optimizer.betas", "[1,2,3]"], "at most 2 items"),
        (
            ["train", "--rewards.identity", "dino"],
            "rewards.identity: a section; give its fields, as --rewards.identity.",
        ),
        (["train", "--rewards.identity.kind", "dinoo"], "rewards.identity.kind: Input should be 'toybox_prompt', "),
        (["train", "--rewards.identity.kid", "dino"], "'rewards.identity.kid'. Did you mean 'rewards.identity.kind'?"),
        (["train", "--rewards.mine.weight", "2"], "rewards.mine.kind: missing; give it, or check the name mine"),
        (["train", "--rewards.prompt.weight=-1"], "rewards.prompt.weight: Input should be greater than or equal to 0"),
        (["train", "--evaluation.metrics.a.dino.model"], "expected a value after it"),
        (["compare", "--train.rewards.prompt.knd", "dino"], "Did you mean 'train.rewards.prompt.kind'?"),
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


def test_an_unknown_command_is_refused(refused: Refused) -> None:
    assert "tain" in refused("tain")


@pytest.mark.parametrize("command", ["evaluate", "report", "generate"])
def test_a_folder_that_is_no_run_is_refused(refused: Refused, tmp_path: Path, command: str) -> None:
    extra = ["--reference", "a.png", "--prompt", "a star"] if command == "generate" else []
    assert str(tmp_path) in refused(command, "--run", tmp_path, *extra)


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


COMMANDS = [
    [], *([command.name] for command in cli.COMMANDS),
    *([command.name, action.name] for command in cli.COMMANDS for action in command.actions),
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, "--help"])
    assert caught.value.code == 0 and "usage:" in capsys.readouterr().out


def test_each_command_has_a_file_of_its_own() -> None:
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__"}
    assert sorted(command.name.replace("-", "_") for command in cli.COMMANDS) == sorted(files)
    assert len(COMMANDS) == 1 + len(files) + 2


def test_help_of_training_tells_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "FieldInfo" not in text
    own = [name for name in leaves(Config().model_dump()) if not name.startswith("rewards.")]
    assert [name for name in own if f"--{name} " not in text] == []
    assert "--rewards REWARDS" in text and "--evaluation.metrics METRICS" in text
    assert "Images per prompt, G (paper: 12)." in text and "default: 12" in text


@pytest.mark.parametrize("place", ["rewards", "evaluation.metrics"])
def test_help_of_sections_with_names(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", f"--{place}.help"])
    text = " ".join(capsys.readouterr().out.split())
    fields = [name for name in field_names(Config) if name.startswith(f"{place}.NAME.")]
    own = [name for name in fields if section_at(Config, name) is None]
    assert len(own) > 35 and [name for name in own if f"--{name} " not in text] == []


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
    assert "report: out/report.html" in done("evaluate", "--run", "out", "--data", "made", "--num_samples", 2)
    picture = tmp_path / "made" / "references" / "test-00000.png"
    prompt = "a star on the beach wearing a red hat, on the left"
    for name, extra in (("tuned.png", ["--count", 3]), ("base.png", ["--base"])):
        done("generate", "--run", "out", "--reference", picture, "--prompt", prompt, "--out", name, *extra)
    assert [Image.open(tmp_path / name).size for name in ("tuned.png", "base.png")] == [(768, 256), (256, 256)]
