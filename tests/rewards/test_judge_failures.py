"""A judge that is dead, that refuses pictures, that cannot be read, and the settings for what servers differ in."""

import json
import re
import threading
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
import torch
from named_rewards import load_named
from pydantic import ValidationError
from torch import Tensor

from customized_grpo.cli.main import main
from customized_grpo.config.rewards import VlmJudgeConfig
from customized_grpo.config.run import Config
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.evaluation.metrics import ScoreMetric, measure
from customized_grpo.rewards.http import Transport
from customized_grpo.rewards.vlm_judge import TRIAL_PROMPT, JudgeReward, VlmJudge
from customized_grpo.training.trainer import Trainer
from customized_grpo.types import PromptBatch

Start = Callable[[Callable[[dict[str, Any], int], tuple[Any, ...]]], Any]
CPU = torch.device("cpu")


def completion(text: Any, finished: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": finished}]}


GOOD = 200, completion('{"subject": 3, "prompt": 2}')
REFUSED = 400, {"error": {"message": "content policy"}}


def judge(url: str, deadline: float = 10.0, **settings: Any) -> VlmJudge:
    usual = {"url": url, "model": "judge-7b", "concurrency": 4}
    transport = Transport("rewards.vlm_judge.url", url, deadline, longest_wait=0.02)
    return VlmJudge(transport, VlmJudgeConfig.model_validate(usual | settings))


def loaded(url: str, deadline: float = 10.0, **settings: Any) -> Any:
    judged = {"url": url, "model": "judge-7b", "timeout": deadline} | settings
    config = {"prompt": "vlm_prompt", "identity": "vlm_identity", "vlm_judge": judged}
    return tuple(load_named(config).values())


def make_batch(groups: int = 2, size: int = 3) -> tuple[Tensor, PromptBatch]:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(groups, size, 3, 6, 6, generator=draw)
    return images, PromptBatch(
        [f"prompt {p}" for p in range(groups)], torch.rand(groups, 1, 3, 5, 5, generator=draw), None
    )


def prompt_of(question: dict[str, Any]) -> str:
    texts = [part["text"] for part in question["messages"][1]["content"] if part["type"] == "text"]
    return next(text.removeprefix("The prompt: ") for text in texts if text.startswith("The prompt: "))


# a judge that is dead


def test_a_dead_judge_is_asked_as_many_as_go_at_once_and_no_more(server: Start) -> None:
    go = threading.Event()
    running = server(lambda question, number: GOOD if go.wait(60) else (500, {}))
    reward = JudgeReward(judge(running.url, deadline=0.5), "prompt")
    images, batch = make_batch(6, 6)
    found = reward.score(images, batch)
    assert not found.valid.any() and len(running.asked) <= 8
    assert re.search(r"gave no answer within 0\.5 s", found.reason or "")
    go.set()
    found = reward.score(images.clone(), batch)
    assert found.valid.all() and found.reason is None


def test_one_picture_that_hangs_costs_its_own_score_alone(server: Start) -> None:
    go = threading.Event()

    def reply(question: dict[str, Any], number: int) -> tuple[Any, ...]:
        if number == 1:
            go.wait(60)
        return GOOD

    found = JudgeReward(judge(server(reply).url, deadline=1.0, concurrency=2), "prompt").score(*make_batch(4, 4))
    go.set()
    assert int(found.valid.sum()) == 15


def test_a_validation_asks_once_for_both_rewards(server: Start) -> None:
    running = server(lambda question, number: GOOD)
    both = judge(running.url)
    images, batch = make_batch(5, 1)
    rewards = ScoreMetric.of_rewards({"prompt": JudgeReward(both, "prompt"), "identity": JudgeReward(both, "subject")})
    found = measure([rewards], images[:, 0], batch)
    assert len(running.asked) == 5
    assert rewards.reasons == [None, None]
    assert found["reward/prompt"].tolist() == [2.0] * 5 and found["reward/identity"].tolist() == [3.0] * 5


def test_the_same_images_are_asked_about_again_for_another_task(server: Start) -> None:
    running = server(lambda question, number: GOOD)
    both = judge(running.url)
    images, batch = make_batch(1, 2)
    other = PromptBatch(batch.prompts, [[torch.zeros(3, 5, 5)]], None)
    both.rate(images, batch)
    both.rate(images, other)
    assert len(running.asked) == 4


# a server that refuses


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_picture_is_invalid_alone_with_its_reason(status: int, server: Start) -> None:
    def reply(question: dict[str, Any], number: int) -> tuple[Any, ...]:
        return (status, REFUSED[1]) if prompt_of(question) == "prompt 1" else GOOD

    running = server(reply)
    reward = JudgeReward(judge(running.url), "prompt")
    found = reward.score(*make_batch())
    assert found.valid.tolist() == [[True] * 3, [False] * 3]
    assert re.search(rf"refused the request with status {status}: content policy$", found.reason or "")
    assert [prompt_of(question) for question in running.asked].count(TRIAL_PROMPT) == 1


def test_a_server_that_refuses_every_picture_ends_the_run_at_once(server: Start) -> None:
    running = server(lambda question, number: REFUSED)
    with pytest.raises(UserError, match="status 400: content policy; a trial question was refused too") as raised:
        judge(running.url).rate(*make_batch(10, 10))
    assert len(running.asked) < 50 and "max_tokens_field" in str(raised.value)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_key_or_model_that_is_not_taken_ends_the_run_at_once(status: int, server: Start) -> None:
    running = server(lambda question, number: (status, {"error": "no"}))
    with pytest.raises(UserError, match=f"refused the request with status {status}: no"):
        judge(running.url).rate(*make_batch(10, 10))
    assert len(running.asked) < 20


def test_a_run_goes_on_under_max_invalid_share_and_ends_above_it(
    server: Start, make_trainer: Callable[..., Trainer[Any]]
) -> None:
    refused = {1}

    def reply(question: dict[str, Any], number: int) -> tuple[Any, ...]:
        return REFUSED if number in refused or (not refused and prompt_of(question) != TRIAL_PROMPT) else GOOD

    both = judge(server(reply).url)
    trainer = make_trainer({}, [JudgeReward(both, "prompt"), JudgeReward(both, "subject")])
    assert trainer.train_step()["invalid_share"] == pytest.approx(1 / 8)
    refused.clear()
    with pytest.raises(TrainingError, match=r"100% of the prompt rewards .*status 400: content policy"):
        trainer.train_step()


# answers that cannot be read


def test_a_second_try_differs_from_the_first_and_shows_the_bad_answer(server: Start) -> None:
    running = server(lambda question, number: (200, completion('I like "it".')) if number < 2 else GOOD)
    assert judge(running.url, reasoning=True).rate(*make_batch(1, 1)).values.tolist() == [[[2.0, 3.0]]]
    first, second, _ = running.asked
    assert first["temperature"] == 0 and second["temperature"] == pytest.approx(0.7)
    assert r'It began: "I like \"it\"."' in second["messages"][1]["content"][-1]["text"]
    assert "Do not explain" in second["messages"][1]["content"][-1]["text"]


def test_an_answer_that_was_cut_off_is_told_with_its_start_and_what_to_do(server: Start) -> None:
    thought = '<think>Perhaps {"subject": 1, "prompt": 1}? Let me look'
    running = server(lambda question, number: (200, completion(thought + " again" * 99, "length")))
    reward = JudgeReward(judge(running.url), "prompt")
    found = reward.score(*make_batch(1, 1))
    assert not found.valid.any()
    told = found.reason or ""
    assert "gave 3 answers without two whole numbers from 0 to 4; the last was cut off (finish_reason: length)" in told
    assert thought in told and len(told) < 700 and "raise vlm_judge.max_tokens (now 60)" in told


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, completion("A fine picture.")), r"the last holds no two whole numbers .*: 'A fine picture\.'"),
        ((200, completion("<think>Well", "length")), r"was cut off .*: '<think>Well'; raise .*max_tokens \(now 60\)"),
        ((200, {"result": 7}), r"is no chat completion: '\{\"result\": 7\}'"),
        ((400, {"error": {"message": "Unsupported parameter: 'max_tokens'"}}), r"status 400: Unsupported parameter"),
        ((503, {"error": {"message": "loading"}}), r"gave no answer within 0\.5 s \(status 503: loading"),
    ],
)
def test_a_trial_question_finds_a_judge_that_cannot_be_read_before_any_work(
    answer: tuple[int, Any], said: str, server: Start
) -> None:
    running = server(lambda question, number: answer)
    with pytest.raises(UserError, match=rf"{said}.* This was a trial question, .*max_tokens_field, .*extra_body"):
        loaded(running.url, deadline=0.5)
    assert {prompt_of(question) for question in running.asked} == {TRIAL_PROMPT}


def test_a_server_without_a_list_of_models_can_judge(server: Start) -> None:
    running = server(lambda question, number: GOOD)
    running.about = 404, {"error": "no such path"}
    prompt, _ = loaded(running.url)
    assert prompt.score(*make_batch(1, 1)).valid.all()


# settings


def sent(server: Start, **settings: Any) -> dict[str, Any]:
    running = server(lambda question, number: GOOD)
    judge(running.url, **settings).check()
    (question,) = running.asked
    return {name: value for name, value in question.items() if name != "messages"}


def test_settings_for_what_servers_differ_in(server: Start) -> None:
    usual = {"model": "judge-7b", "temperature": 0.0, "max_tokens": 60, "seed": 0}
    assert sent(server) == usual
    assert sent(server, reasoning=True) == usual | {"max_tokens": 400}
    assert sent(server, max_tokens=2000, temperature=1.0) == usual | {"max_tokens": 2000, "temperature": 1.0}
    newer = {"max_tokens_field": "max_completion_tokens", "omit": ["temperature", "seed"]}
    assert sent(server, **newer) == {"model": "judge-7b", "max_completion_tokens": 60}
    assert sent(server, omit=["max_tokens"]) == {name: usual[name] for name in ("model", "temperature", "seed")}
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "top_p": 0.9}
    assert sent(server, extra_body=extra) == usual | extra


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"omit": ["temperature"], "temperature": 0.5}, "omit: temperature is left out .* and set all the same"),
        ({"omit": ["max_tokens"], "max_tokens": 99}, "omit: max_tokens is left out"),
        ({"omit": ["model"]}, "omit"),
        ({"extra_body": {"max_completion_tokens": 9}}, "max_completion_tokens has a setting of its own"),
        ({"extra_body": {"stream": True}}, "stream is set by the judge itself"),
        ({"extra_body": {"top_p": float("nan")}}, "extra_body\n.*sent as JSON"),
        ({"extra_body": {"day": date(2026, 1, 1)}}, "extra_body\n.*sent as JSON"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        VlmJudgeConfig.model_validate(settings)


def test_the_settings_come_from_file_and_command_line_and_are_written_down(
    server: Start, make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    running = server(lambda question, number: (200, completion("no")))
    options = {"url": running.url, "model": "judge-7b", "max_tokens": 9, "omit": ["seed"], "extra_body": extra}
    config = make_config(
        {"rewards.prompt.kind": "vlm_prompt", **{f"rewards.prompt.vlm_judge.{k}": v for k, v in options.items()}}
    )
    assert Config.model_validate(json.loads(config.model_dump_json())) == config
    flat = [
        f"--data.path={config.data.path}", f"--output={config.output}", "--rewards.prompt.kind=vlm_prompt",
        *(f"--rewards.prompt.vlm_judge.{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in options.items()),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(["train", *flat])
    assert ended.value.code == 2 and "This was a trial question" in capsys.readouterr().err
    assert running.asked[0]["chat_template_kwargs"] == {"enable_thinking": False} and "seed" not in running.asked[0]
    with pytest.raises(SystemExit):
        main(["diagnose", f"--run={config.output}", "--rewards.prompt.kind=vlm_prompt", *flat[3:]])
    assert "rewards.prompt.vlm_judge.extra_body.chat_template_kwargs" in capsys.readouterr().err
