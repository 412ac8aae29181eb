"""`serve-reward`: what is wrong is said before a model is loaded."""

import socket
from contextlib import closing

import pytest

from customized_grpo.cli.main import main
from customized_grpo.rewards.remote import TOKEN


def refusal(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve-reward", *options])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", ""])
def test_other_machines_need_a_token(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told before the reward is loaded, which here cannot be."""
    options = ["python:nowhere.red", "--host", host, "--port", "0"]
    monkeypatch.delenv(TOKEN, raising=False)
    said = refusal(options, capsys)
    assert "--host: other machines reach 0.0.0.0, and no token is set; set the environment variable" in said
    assert TOKEN in said and "or serve on 127.0.0.1 alone" in said
    monkeypatch.setenv(TOKEN, "s3cret")
    assert "module 'nowhere' could not be imported" in refusal(options, capsys)


def test_a_port_that_is_taken_is_told_before_the_reward_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        said = refusal(["python:nowhere.red", "--port", str(taken.getsockname()[1])], capsys)
    assert "--host, --port: cannot listen on 127.0.0.1:" in said


@pytest.mark.parametrize("option", ["--max_images", "--max_pixels", "--max_bytes"])
def test_a_limit_below_one_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{option}: 0 takes no request; give 1 or more" in refusal(["dino", option, "0"], capsys)
