"""What the parser takes for names of options, and what for their values."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_grpo.cli import main as cli
from customized_grpo.cli.main import build_parser

PARSER = build_parser()
TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30)


def rewritten(*arguments: str) -> list[str]:
    return PARSER.command_of(arguments)[1].normalize_flags(arguments)


def message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err.removeprefix("customized-grpo: error: ").splitlines()[0]


def test_names_of_options_take_dashes_for_underscores() -> None:
    given = ["train", "--data.max-pixels", "5", "--rollout.group-size=4", "--dry-run"]
    assert rewritten(*given) == ["train", "--data.max_pixels", "5", "--rollout.group_size=4", "--dry_run"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompt", "--half-moon a star"],
        ["generate", "--prompt", "--half-moon"],
        ["generate", "--prompt", "--half-moon a=b"],
        ["generate", "--prompt=--half-moon"],
        ["generate", "--out", "my-folder/my-picture.png"],
        ["train", "--rewards.prompt-of-mine=--max-pixels"],
        ["compare", "--presets.naive-1:1", "3"],
        ["prepare", "--max_bad", "3", "--", "--max-bad", "--max-side=3"],
    ],
)
def test_nothing_but_a_known_name_is_rewritten(arguments: list[str]) -> None:
    assert rewritten(*arguments) == arguments


@settings(deadline=None, max_examples=30)
@given(TEXT)
def test_a_prompt_given_with_an_equals_sign_arrives_as_it_is(prompt: str) -> None:
    arguments = ["generate", "--run", "r", "--reference", "a.png", f"--prompt={prompt}"]
    assert PARSER.parse_args(rewritten(*arguments)).generate.prompt == prompt


def test_a_prompt_of_several_words_may_begin_with_dashes() -> None:
    arguments = ["generate", "--run", "r", "--reference", "a.png", "--prompt", "--half-moon a star"]
    assert PARSER.parse_args(rewritten(*arguments)).generate.prompt == "--half-moon a star"


def test_paths_may_begin_with_dashes() -> None:
    options = PARSER.parse_args(rewritten("prepare", "--max-bad=2", "--", "-my-data", "--out-1")).prepare
    assert (options.src, options.out, options.max_bad) == (Path("-my-data"), Path("--out-1"), 2)
    assert PARSER.parse_args(rewritten("train", "--output=--my-run")).train.output == Path("--my-run")


def test_a_preset_with_dashes_is_named_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "an interval over seeds takes at least 2" in message(capsys, "compare", "--presets.naive-1:1", "1")


WAY_OUT = "; give one that begins with a dash as "


@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        (["generate", "--prompt", "-half a star"], f"{WAY_OUT}'--prompt=-half a star'"),
        (["generate", "--prompt", "--half-moon"], f"{WAY_OUT}--prompt=--half-moon"),
        (["generate", "--reference", "-a.png"], f"{WAY_OUT}--reference=-a.png"),
        (["train", "--output", "--my-run"], f"{WAY_OUT}--output=--my-run"),
        (["train", "--output", "--dry-run"], ""),
        (["train", "--output", "--rollout.group-size=3"], ""),
        (["train", "--output"], ""),
    ],
)
def test_a_value_taken_for_an_option_is_told_with_the_way_out(
    capsys: pytest.CaptureFixture[str], arguments: list[str], way_out: str
) -> None:
    assert message(capsys, *arguments) == f"{arguments[1]}: expected a value after it{way_out}"


def test_options_that_are_none_are_told_as_they_were_typed(capsys: pytest.CaptureFixture[str]) -> None:
    said = message(capsys, "prepare", "-my-data", "out")
    assert said == "unknown option -my-data; give a value that begins with a dash as --OPTION=VALUE, or after -- alone"
    said = message(capsys, "train", "--rollout.group-sise", "4")
    assert said.endswith("field 'rollout.group-sise'. Did you mean 'rollout.group_size'?")
