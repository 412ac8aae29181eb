"""How an answer of a judge is read, and when it is none."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_grpo.rewards.chat import Unreadable, messages, parse

SCORES = '{"subject": 3, "prompt": 2}'


def completion(text: Any, finished: Any = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text, **more}, "finish_reason": finished}]}


def test_the_last_object_with_both_scores_counts() -> None:
    assert parse(completion('{"subject": 1, "prompt": 0} then {"prompt": 4, "subject": 2}')) == (4.0, 2.0)
    assert parse(completion('```json\n{"subject": 3,\n "prompt": 2}\n```', "stop")) == (2.0, 3.0)
    assert parse(completion([{"type": "text", "text": SCORES}])) == (2.0, 3.0)


@pytest.mark.parametrize("tag", ["think", "THINK", "thinking", "reasoning"])
@pytest.mark.parametrize("opened", [True, False])
def test_a_closed_thought_is_no_part_of_the_answer(tag: str, opened: bool) -> None:
    """A template may have opened it already."""
    thought = (f"<{tag}>" if opened else "") + f'Perhaps {{"subject": 1, "prompt": 1}}?</{tag}>'
    assert parse(completion(thought + SCORES)) == (2.0, 3.0)
    with pytest.raises(Unreadable, match="^holds no two whole numbers"):
        parse(completion(thought))


@pytest.mark.parametrize("finished", ["length", "max_tokens", "MAX_TOKENS"])
def test_an_answer_that_was_cut_off_is_none(finished: str) -> None:
    with pytest.raises(Unreadable, match=rf"^was cut off \(finish_reason: {finished}\)") as error:
        parse(completion(f"Perhaps {SCORES}? Let me look", finished))
    assert error.value.cut and error.value.words.startswith("Perhaps")


@pytest.mark.parametrize("finished", [None, "stop", "length"])
def test_a_thought_that_is_open_is_no_answer(finished: str | None) -> None:
    for text in (f"<think>Perhaps {SCORES}? Let me look", f"<think>a</think> no <think>{SCORES}", f"[THINK]{SCORES}"):
        with pytest.raises(Unreadable) as error:
            parse(completion(text, finished))
        assert error.value.cut and error.value.words == text


def test_what_a_server_keeps_apart_as_a_thought_is_told_where_there_is_no_answer() -> None:
    for name in ("reasoning_content", "reasoning"):
        with pytest.raises(Unreadable) as error:
            parse(completion(None, "length", **{name: f"Perhaps {SCORES}?"}))
        assert error.value.cut and error.value.words.startswith("Perhaps")
        assert parse(completion(SCORES, "stop", **{name: "Perhaps 1?"})) == (2.0, 3.0)


def test_a_refusal_is_told() -> None:
    with pytest.raises(Unreadable) as error:
        parse(completion(None, "content_filter", refusal="I cannot help with faces."))
    assert error.value.words == "I cannot help with faces." and "content_filter" in error.value.problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        None,
        7,
        '{"subject": 5, "prompt": 2}',
        '{"subject": 2.5, "prompt": 2}',
        '{"subject": true, "prompt": 2}',
        '{"subject": ' + "[" * 10**5 + "}",
    ],
)
def test_what_holds_no_scores(text: Any) -> None:
    with pytest.raises(Unreadable, match="no two whole numbers from 0 to 4"):
        parse(completion(text))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "finish_reason", "text"]), inner, max_size=4
        )
    ),
)


@settings(deadline=None, max_examples=40)
@given(JSON)
def test_no_answer_whatever_its_form_ends_in_another_error(answer: Any) -> None:
    with pytest.raises(Unreadable):
        parse(answer)


def test_the_model_is_shown_its_bad_answer_and_asked_for_the_numbers_alone() -> None:
    last = Unreadable("was cut off", "<think>Let me look at the {cat}", cut=True)
    first, again = (messages("i", ["r"], "a cat", reasoning=True, last=bad) for bad in (None, last))
    assert "at most three sentences" in first[0]["content"] and "three sentences" not in again[0]["content"]
    added = again[1]["content"][len(first[1]["content"]) :]
    assert len(added) == 1 and 'it was cut off. It began: "Let me look at the {cat}"' in added[0]["text"]
    assert added[0]["text"].endswith('{"subject": N, "prompt": N}')
