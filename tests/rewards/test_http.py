"""Deadlines, Retry-After, and errors in every dress, on real servers on real ports."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_grpo.errors import UserError
from customized_grpo.rewards.answers import Answer, Failure, content_of
from customized_grpo.rewards.http import Refused, Transport, Unavailable

Start = Callable[[Callable[[dict[str, Any], int], tuple[Any, ...]]], Any]
FINE = {"fine": True}


def transport(url: str, deadline: float = 10.0, **more: Any) -> Transport:
    return Transport("rewards.remote.prompt_url", url, deadline, longest_wait=0.05, **more)


def failure(status: int, body: bytes = b"{}", **headers: str) -> Failure:
    with pytest.raises(Failure) as raised:
        content_of(Answer(status, body, {name.replace("_", "-"): text for name, text in headers.items()}), str)
    return raised.value


# deadlines


def test_after_one_deadline_of_silence_nothing_more_is_asked(server: Start) -> None:
    go = threading.Event()
    running = server(lambda question, number: (200, FINE) if go.wait(60) else (500, {}))
    link = transport(running.url, deadline=0.5)
    scoring = link.scoring()
    with pytest.raises(Unavailable, match=r"gave no answer within 0\.5 s"):
        link.post("/score", {}, scoring)
    for _ in range(5):
        with pytest.raises(Unavailable, match="was not asked any more in this scoring"):
            link.post("/score", {}, scoring)
    go.set()
    assert link.post("/score", {}, link.scoring()) == FINE  # another scoring asks again
    assert len(running.asked) == 2


def test_a_server_that_refuses_connections_is_dead_too() -> None:
    """The last try ends a little before the deadline."""
    link = transport("http://127.0.0.1:9", deadline=0.3)
    scoring = link.scoring()
    with pytest.raises(Unavailable):
        link.post("/score", {}, scoring)
    assert scoring.is_over()


def test_a_server_that_dies_halfway_costs_one_deadline(server: Start) -> None:
    go = threading.Event()
    running = server(lambda question, number: (200, FINE) if number < 5 or go.wait(60) else (500, {}))
    link = transport(running.url, deadline=1.0)
    scoring = link.scoring()

    def ask(number: int) -> bool:
        try:
            return bool(link.post("/score", {}, scoring) == FINE)
        except Unavailable:
            return False

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(ask, range(60)))
    go.set()
    assert sum(found) == 5 and len(running.asked) <= 5 + 2 * 3


def test_a_slow_server_that_answers_is_never_given_up(server: Start) -> None:
    """All together take longer than the deadline, which each keeps to."""

    def reply(question: dict[str, Any], number: int) -> tuple[Any, ...]:
        time.sleep(0.25)
        return 200, FINE

    link = transport(server(reply).url, deadline=1.5)
    scoring = link.scoring()
    assert [link.post("/score", {}, scoring) for _ in range(7)] == [FINE] * 7


def test_time_between_questions_is_not_the_servers_silence(server: Start) -> None:
    link = transport(server(lambda question, number: (200, FINE)).url, deadline=0.3)
    scoring = link.scoring()
    for _ in range(2):
        assert link.post("/score", {}, scoring) == FINE
        time.sleep(0.4)  # pictures are made ready


# Retry-After


@pytest.mark.parametrize(
    ("status", "form"), [(429, "0.3"), (408, "0.3"), (425, "0.3"), (503, "0.3"), (429, "1"), (429, "date")]
)
def test_retry_after_is_kept_to_where_the_deadline_allows(status: int, form: str, server: Start) -> None:
    """Longer than the longest pause of our own."""
    times: list[float] = []

    def reply(question: dict[str, Any], number: int) -> tuple[Any, ...]:
        times.append(time.monotonic())
        after = formatdate(time.time() + 2, usegmt=True) if form == "date" else form
        return (status, {}, {"Retry-After": after}) if number == 0 else (200, FINE)

    assert transport(server(reply).url).post("/score", {}) == FINE
    assert len(times) == 2 and times[1] - times[0] >= (1.0 if form == "date" else float(form))


def test_retry_after_beyond_the_deadline_is_not_waited_for(server: Start) -> None:
    running = server(lambda question, number: (429, {"error": "quota"}, {"Retry-After": "3600"}))
    with pytest.raises(Unavailable, match=r"within 30 s \(status 429: quota; asks to wait 3600 s\)"):
        transport(running.url, deadline=30.0).post("/score", {})
    assert len(running.asked) == 1


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(-(10**5), 10**5))
def test_a_date_is_read_by_the_servers_own_clock(after: int, wrong: int) -> None:
    now = time.time() + wrong
    headers = {"retry_after": formatdate(now + after, usegmt=True), "date": formatdate(now, usegmt=True)}
    assert failure(503, **headers).after == pytest.approx(after, abs=1)


@pytest.mark.parametrize(
    "text", ["", "soon", "-3", "nan", "inf", "1e999", "Mon, 99 Foo 2026", "Mon, 01 Jan 99999 00:00:00 GMT"]
)
def test_a_retry_after_that_means_nothing(text: str) -> None:
    assert failure(429, retry_after=text).after is None


def test_a_date_that_has_passed_is_no_wait() -> None:
    assert failure(429, retry_after="Thu, 01 Jan 2015 00:00:00 GMT").after == 0


# errors


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": 429, "message": "slow down"}},
        {"error": {"code": "429", "message": "slow down"}},
        {"error": {"code": "rate_limit_exceeded", "message": "slow down"}},
        {"error": {"message": "slow down"}},
        {"error": "slow down"},
        {"object": "error", "message": "slow down", "code": 503},
        {"choices": [{"error": {"code": 502, "message": "slow down"}, "finish_reason": "error"}]},
    ],
)
def test_an_error_in_a_200_is_waited_for_and_told(body: Any, server: Start) -> None:
    running = server(lambda question, number: (200, body) if number < 2 else (200, FINE))
    assert transport(running.url).post("/score", {}) == FINE and len(running.asked) == 3
    running = server(lambda question, number: (200, body))
    with pytest.raises(Unavailable, match=r"within 0\.4 s \(status 200 with an error.*: slow down"):
        transport(running.url, deadline=0.4).post("/score", {})


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"error": {"code": 400, "message": "bad picture"}}, Refused),
        ({"error": {"code": "content_policy_violation", "message": "bad picture"}}, Refused),
        ({"error": {"type": "invalid_request_error", "code": None, "message": "bad picture"}}, Refused),
        ({"error": {"code": 401, "message": "bad picture"}}, UserError),
        ({"error": {"code": "invalid_api_key", "type": "invalid_request_error", "message": "bad picture"}}, UserError),
    ],
)
def test_an_error_in_a_200_that_no_wait_mends_is_told_at_once(body: Any, kind: type, server: Start) -> None:
    running = server(lambda question, number: (200, body))
    with pytest.raises(kind, match=r"refused the request with status 200 with an error of code 40\d: bad picture"):
        transport(running.url).post("/score", {})
    assert len(running.asked) == 1


@pytest.mark.parametrize("status", [400, 413, 415, 422, 451])
def test_what_may_be_the_fault_of_the_request_is_refused(status: int, server: Start) -> None:
    running = server(lambda question, number: (status, {"error": {"message": "no faces"}}))
    with pytest.raises(Refused, match=rf"prompt_url: .*/score refused the request with status {status}: no faces"):
        transport(running.url).post("/score", {})
    assert len(running.asked) == 1


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 410])
def test_what_another_picture_does_not_mend_ends_the_run(status: int, server: Start) -> None:
    running = server(lambda question, number: (status, b"<html>\n  no\n</html>"))
    with pytest.raises(UserError, match=rf"with status {status}: <html> no </html>"):
        transport(running.url).post("/score", {})
    assert len(running.asked) == 1


def test_a_server_that_sends_askers_elsewhere_is_told(server: Start) -> None:
    running = server(lambda question, number: (307, {}, {"Location": "https://other/v1"}))
    with pytest.raises(UserError, match=r"status 307: https://other/v1; .* name that one"):
        transport(running.url).post("/score", {})


def test_the_servers_words_are_told_without_the_token(server: Start) -> None:
    for status, body in ((200, {"error": {"code": 429, "message": "x" * 290 + "sk-secret"}}), (500, b"for sk-secret")):
        running = server(lambda question, number, answer=(status, body): answer)
        with pytest.raises(Unavailable) as raised:
            transport(running.url, deadline=0.2, token="sk-secret").post("/score", {})
        assert "sk-" not in str(raised.value)


def test_what_is_no_error() -> None:
    for body in (b'{"error": null, "values": 1}', b'{"choices": [7]}', b'{"choices": {}}', b"[]", b"null", b"7"):
        content_of(Answer(200, body, {}), str)


def test_a_key_that_is_not_taken_is_told_as_that(server: Start) -> None:
    running = server(lambda question, number: (200, {}))
    for status, said in ((401, "check its key or token"), (403, "check its key"), (500, "start the server")):
        running.about = status, {"error": "no"}
        with pytest.raises(UserError, match=rf"does not answer \(status {status}: no\); {said}"):
            transport(running.url).get("/health")
    running.about = 404, {}
    assert transport(running.url).get("/models", optional=True) is None


def test_an_error_of_our_own_is_raised_where_the_answer_is_waited_for(
    server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = transport(server(lambda question, number: (200, FINE)).url)

    def fail(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(link.client, "stream", fail)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        link.post("/score", {})
