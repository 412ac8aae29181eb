"""A vision-language judge behind a real local server that misbehaves in every way a judge can."""

import base64
import io
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fork_server import Process
from named_rewards import load_named, named
from PIL import Image
from torch import Tensor

from customized_grpo.cli.main import main
from customized_grpo.config.rewards import VlmJudgeConfig
from customized_grpo.config.run import Config
from customized_grpo.errors import UserError
from customized_grpo.rewards.http import Transport, Unavailable, read_token
from customized_grpo.rewards.remote import TOKEN, RemoteReward
from customized_grpo.rewards.vlm_judge import KEY, JudgeReward, VlmJudge
from customized_grpo.tracking.console import Display
from customized_grpo.types import PromptBatch

CPU = torch.device("cpu")
Start = Callable[[Callable[[dict[str, Any], int], tuple[Any, ...]]], Any]
"""Starts a server, see the fixture `server`."""


def completion(text: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}]}


def judge(url: str, deadline: float = 5.0, **settings: Any) -> VlmJudge:
    usual = {"url": url, "model": "judge-7b", "concurrency": 4}
    transport = Transport("rewards.vlm_judge.url", url, deadline, longest_wait=0.02)
    return VlmJudge(transport, VlmJudgeConfig.model_validate(usual | settings))


def make_batch(groups: int = 2, size: int = 3) -> tuple[Tensor, PromptBatch]:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(groups, size, 3, 6, 6, generator=draw)
    return images, PromptBatch(
        [f"prompt {p}" for p in range(groups)], torch.rand(groups, 1, 3, 5, 5, generator=draw), None
    )


def told(question: dict[str, Any]) -> str:
    return str(question["messages"][1]["content"][-1]["text"])


def test_a_judge_sees_a_large_reference_scaled_down(server: Start) -> None:
    here = server(lambda question, number: (200, completion('{"subject": 3, "prompt": 2}')))
    images = torch.rand(1, 1, 3, 6, 6)
    judge(here.url).rate(images, PromptBatch(["a cat"], [[torch.full((3, 1200, 2048), 0.5)]], None))
    sent = [part for part in here.asked[0]["messages"][1]["content"] if part["type"] == "image_url"]
    content = base64.b64decode(sent[0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (1024, 600)


def test_both_rewards_come_of_one_round_of_questions(server: Start) -> None:
    """Each image gets the scores of its own answer, whatever the order in which questions come in."""

    def reply(question: dict[str, Any], number: int) -> tuple[int, Any]:
        first = int("prompt 1" in told(question))
        return 200, completion(json.dumps({"subject": 1 + first, "prompt": 4 - first}))

    running = server(reply)
    both = judge(running.url)
    images, batch = make_batch()
    prompt = JudgeReward(both, "prompt").score(images, batch)
    subject = JudgeReward(both, "subject").score(images, batch)
    assert len(running.asked) == 6
    assert prompt.values.tolist() == [[4.0] * 3, [3.0] * 3] and subject.values.tolist() == [[1.0] * 3, [2.0] * 3]
    assert prompt.valid.all() and subject.valid.all()
    content = running.asked[0]["messages"][1]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url", "text"]
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")
    # Other images are asked about anew.
    JudgeReward(both, "prompt").score(images.clone(), batch)
    assert len(running.asked) == 12


@pytest.mark.parametrize(
    "bad",
    [
        completion("I like it."),
        completion('{"subject": 5, "prompt": 2}'),
        completion('{"subject": 2.5, "prompt": 2}'),
        completion('{"subject": true, "prompt": 2}'),
        completion('{"subject": 2}'),
        completion(None),
        ["list"],
    ],
)
def test_an_answer_without_scores_is_asked_for_again_and_then_invalid(bad: Any, server: Start) -> None:
    good = completion('{"subject": 3, "prompt": 2}')
    running = server(lambda question, number: (200, bad if number < 2 else good))
    scores = JudgeReward(judge(running.url), "subject").score(*make_batch(1, 1))
    assert scores.valid.all() and scores.values.item() == 3 and len(running.asked) == 3
    assert len({question["seed"] for question in running.asked}) == 3
    stubborn = server(lambda question, number: (200, bad))
    scores = JudgeReward(judge(stubborn.url), "subject").score(*make_batch(1, 1))
    assert not scores.valid.any() and len(stubborn.asked) == 3
    told = r"^rewards\.vlm_judge\.url: judge-7b gave 3 answers without two whole numbers from 0 to 4; the last \w+ \w+"
    assert re.match(told, scores.reason or "")


@pytest.mark.parametrize("status", [429, 500, 502])
def test_a_busy_judge_is_asked_again(status: int, server: Start) -> None:
    running = server(lambda q, n: (status, {}) if n < 2 else (200, completion('{"subject": 3, "prompt": 2}')))
    assert JudgeReward(judge(running.url, attempts=1), "prompt").score(*make_batch(1, 1)).values.item() == 2


def test_one_failing_image_is_invalid_alone(server: Start) -> None:
    def reply(question: dict[str, Any], number: int) -> tuple[int, Any]:
        if "prompt 1" in told(question):
            return 500, {}
        return 200, completion('{"subject": 3, "prompt": 2}')

    reward = JudgeReward(judge(server(reply).url, deadline=1.0), "prompt")
    scores = reward.score(*make_batch())
    assert scores.reason is not None and "within 1 s (status 500" in scores.reason
    assert scores.valid.tolist() == [[True] * 3, [False] * 3] and scores.values.isfinite().all()


def test_a_judge_that_hangs_is_given_up(server: Start) -> None:
    go = threading.Event()

    def reply(question: dict[str, Any], number: int) -> tuple[int, Any]:
        go.wait(60)
        return 200, completion('{"subject": 3, "prompt": 2}')

    scores = JudgeReward(judge(server(reply).url, deadline=0.3), "prompt").score(*make_batch(1, 2))
    go.set()
    assert not scores.valid.any()


def test_sigterm_does_not_wait_for_a_judge_that_hangs(
    server: Start, make_settings: Callable[..., dict[str, Any]], tmp_path: Path, python: Callable[..., Process]
) -> None:
    """Neither the run nor the end of its process: both answers under way are 60 s off."""
    go = threading.Event()

    def reply(question: dict[str, Any], number: int) -> tuple[Any, ...]:
        if number > 0:  # the trial question has its answer
            go.wait(60)
        return 200, completion('{"subject": 3, "prompt": 2}')

    running = server(reply)
    rewards = judged(running.url)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(make_settings({"rewards": rewards})))
    process = python("-m", "customized_grpo", "train", "--config", tmp_path / "run.yaml")
    try:
        while len(running.asked) < 2 and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        said = process.communicate(timeout=45)
    finally:
        go.set()
    assert process.wait() == 143 and "Traceback" not in said[1], said[1]


def test_who_waits_while_it_is_given_up_hears_so(server: Start) -> None:
    go = threading.Event()
    running = server(lambda question, number: (200, completion("")) if go.wait(30) else (500, {}))
    asked = Transport("rewards.vlm_judge.url", running.url, 60.0)
    scoring = asked.scoring()
    threading.Timer(0.3, scoring.cancel).start()
    with pytest.raises(Unavailable):
        asked.post("/chat/completions", {"messages": []}, scoring)
    go.set()


def test_a_wrong_key_is_told_at_once(server: Start) -> None:
    running = server(lambda question, number: (401, {"error": "no such key"}))
    with pytest.raises(UserError, match=r"rewards\.vlm_judge\.url: .* status 401: .*no such key"):
        JudgeReward(judge(running.url), "prompt").score(*make_batch(1, 1))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_questions_under_way_are_bounded(concurrency: int, server: Start) -> None:
    def reply(question: dict[str, Any], number: int) -> tuple[int, Any]:
        time.sleep(0.05)
        return 200, completion('{"subject": 3, "prompt": 2}')

    running = server(reply)
    JudgeReward(judge(running.url, concurrency=concurrency), "prompt").score(*make_batch(3, 4))
    assert running.most <= concurrency and (concurrency == 1 or running.most > 1)


def test_reasoning_comes_first_and_scores_close(server: Start) -> None:
    running = server(
        lambda q, n: (200, completion('Shape {as "asked"}. {"subject": 0, "prompt": 1}\n{"subject": 4, "prompt": 3}'))
    )
    scores = JudgeReward(judge(running.url, reasoning=True), "subject").score(*make_batch(1, 1))
    assert scores.values.item() == 4
    assert "at most three sentences" in running.asked[0]["messages"][0]["content"]
    assert running.asked[0]["max_tokens"] > 100


def test_the_key_comes_from_the_environment_alone(server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running = server(lambda question, number: (200, completion('{"subject": 3, "prompt": 2}')))
    settings = {
        "prompt": "vlm_prompt", "identity": "vlm_identity", "vlm_judge": {"url": running.url, "model": "judge-7b"},
    }  # fmt: skip
    monkeypatch.setenv(KEY, "sk-secret")
    prompt, subject = load_named(settings).values()
    images, batch = make_batch(1, 2)
    assert prompt.score(images, batch).values.tolist() == [[2.0, 2.0]]
    assert subject.score(images, batch).values.tolist() == [[3.0, 3.0]]
    assert set(running.keys) == {"Bearer sk-secret"} and len(running.asked) == 3  # a trial question, and two images
    with pytest.raises(UserError, match=r"vlm_judge\.model: .* has no 'nobody'; it has judge-7b, other"):
        load_named(settings | {"vlm_judge": {"url": running.url, "model": "nobody"}})


def both_scored(question: dict[str, Any], number: int) -> tuple[int, Any]:
    if "messages" in question:
        return 200, completion(f'{{"subject": {number % 5}, "prompt": {number % 4}}}')
    shape = [len(question["images"]), len(question["images"][0])]
    values = [[p + g / 10 for g in range(shape[1])] for p in range(shape[0])]
    return 200, {"values": values, "valid": [[True] * shape[1]] * shape[0]}


def judged(url: str) -> dict[str, Any]:
    return named({"prompt": "vlm_prompt", "identity": "vlm_identity", "vlm_judge": {"url": url, "model": "judge-7b"}})


def both_remote(url: str) -> dict[str, Any]:
    judge = {"prompt": "vlm_prompt", "vlm_judge": {"url": url, "model": "judge-7b"}}
    return named(judge | {"identity": "remote", "remote": {"url": url}})


def test_neither_key_nor_token_is_in_what_a_run_leaves_or_says(
    server: Start, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Config],
    run_training: Callable[..., Path], display: Display, tmp_path: Path,
) -> None:  # fmt: skip
    """Both end as they do in a file that is mounted."""
    running = server(both_scored)
    monkeypatch.setenv(KEY, "sk-secret\n")
    monkeypatch.setenv(TOKEN, " tok-secret \r\n")
    run_training(make_config({"rewards": both_remote(running.url), "iterations": 1, "checkpoint.every": 1}))
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 8 and set(running.keys) == {"Bearer sk-secret", "Bearer tok-secret"}
    assert [path for path in written if b"-secret" in path.read_bytes()] == []
    assert "-secret" not in display.console.file.getvalue()  # type: ignore[attr-defined]


def test_the_command_says_neither_key_nor_token(
    server: Start, make_settings: Callable[..., dict[str, Any]],
    command: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """The reward server repeats the token while it refuses it."""

    def reply(question: dict[str, Any], number: int) -> tuple[int, Any]:
        return both_scored(question, number) if "messages" in question else (403, {"error": "no tok-secret here"})

    running = server(reply)
    monkeypatch.setenv(KEY, "sk-secret\n")
    monkeypatch.setenv(TOKEN, "tok-secret\n")
    settings = make_settings({"rewards": both_remote(running.url), "iterations": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = command("train", "--config", tmp_path / "run.yaml")
    assert done.returncode == 2 and "status 403: " in done.stderr and "no (not shown) here" in done.stderr
    assert "-secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("value", ["sk-sécret", "sk-\nsecret", "sk-\x7fsecret", "sk-\udc80secret"])
@pytest.mark.parametrize("variable", [KEY, TOKEN])
def test_a_secret_that_no_header_holds_is_refused_by_the_name_of_its_variable(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=rf"^{variable}: .* other than printable ASCII") as refused:
        read_token(variable)
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["https://user:hidden@host/v1", "https://host/v1?api_key=hidden", "http://host/#hidden"]
)
@pytest.mark.parametrize("field", ["remote.url", "vlm_judge.url"])
def test_a_url_with_a_secret_is_refused_and_not_repeated(
    field: str, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"prompt": "vlm_prompt", "vlm_judge": {"url": url, "model": "m"}}
    if field == "remote.url":
        settings = {"prompt": "remote", "remote": {"url": url}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"rewards": named(settings)}))
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(tmp_path / "run.yaml")])
    said = capsys.readouterr()
    assert ended.value.code == 2 and f"{field}: the URL has a user, a query or a fragment" in said.err
    assert "hidden" not in said.out + said.err


def test_a_server_that_repeats_the_key_does_not_get_it_into_a_message(server: Start) -> None:
    running = server(lambda question, number: (403, {"error": "no such key: sk-secret"}))
    transport = Transport("rewards.vlm_judge.url", running.url, token="sk-secret")
    with pytest.raises(UserError, match=r"status 403: .*no such key: \(not shown\)"):
        transport.post("/chat/completions", {"messages": [{}, {"content": [{"text": "The prompt: x"}]}]})


def test_nor_do_what_it_lists_and_what_it_says_of_itself(server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is cut out before the text is cut short: no part of it stays."""
    running = server(lambda question, number: (200, {}))
    running.about = 200, {"data": [{"id": "for sk-secret"}], "said": "x" * 50 + "sk-secret"}
    transport = Transport("rewards.remote.prompt_url", running.url, token="sk-secret")
    with pytest.raises(UserError, match="is no reward server") as refused:
        RemoteReward(transport)
    assert "sk-" not in str(refused.value)
    monkeypatch.setenv(KEY, "sk-secret")
    settings = {"prompt": "vlm_prompt", "vlm_judge": {"url": running.url, "model": "m"}}
    with pytest.raises(UserError, match=r"has no 'm'; it has for \(not shown\)"):
        load_named(settings)


def test_a_judge_that_is_down() -> None:
    settings = {"prompt": "vlm_prompt", "vlm_judge": {"url": "http://127.0.0.1:9/v1", "model": "m"}}
    with pytest.raises(UserError, match=r"rewards\.prompt\.vlm_judge\.url: http://127\.0\.0\.1:9/v1 does not answer"):
        load_named(settings)
