"""What a judge is asked in OpenAI's chat protocol, and how its answer is read."""

import json
import re
from collections.abc import Sequence
from typing import Any

BEST = 4
QUESTIONS = ("prompt", "subject")
"""Names of the two scores, in the order of the rewards (prompt, identity)."""
INSTRUCTIONS = """You grade pictures made by an image generator. You see one or more reference pictures of a subject,
then the generated picture, and you know the prompt it was made for. Give two whole numbers from 0 to 4.

"subject": is it the very same subject as in the references? Compare its shape and parts, its colours, its texture and
material, and, of a person or an animal, the face. Background, pose, lighting and style do not count.
0 another thing or absent; 1 only of the same kind; 2 alike, with clear differences; 3 the same but for details;
4 the same.

"prompt": does the picture show what the prompt says? Look at what is asked for (relevance), whether it is shown rightly
(accuracy), whether nothing is missing (completeness), and whether subject and scene fit together (context). A copy of a
reference that leaves the prompt out is a 0.
0 ignored; 1 barely; 2 in part; 3 all but details; 4 wholly.
"""
PLAIN = 'Answer with one line of JSON and nothing else: {"subject": N, "prompt": N}'
REASONED = (
    "First say in at most three sentences what speaks for and against. Then close with one line of JSON: "
    '{"subject": N, "prompt": N}'
)
AGAIN = (
    "You were asked this before, and your answer cannot be used: it {problem}. It began: {words}\n"
    "Do not explain anything this time. "
)
QUOTED = 200
"""Characters of an answer that are shown."""
CUT = ("length", "max_tokens", "model_length")
"""Reasons to finish, of answers that have no end."""
_OBJECT = re.compile(r"\{[^{}]*\}")
_THOUGHT = re.compile(r"[<\[](/?)(?:think|thinking|reasoning)[>\]]", re.IGNORECASE)


class Unreadable(Exception):
    """An answer without two scores."""

    def __init__(self, problem: str, words: str, *, cut: bool = False) -> None:
        """Describe an unreadable answer.

        `problem`: what is wrong, as the end of "the answer ...". `words`: the answer. `cut`: it has no end.
        """
        super().__init__(problem)
        self.problem, self.words, self.cut = problem, words, cut


def messages(
    image: str, references: Sequence[str], prompt: str, *, reasoning: bool, last: Unreadable | None
) -> list[dict[str, Any]]:
    """Build the question about an image, with all pictures as base64 PNGs. `last`: the answer that it had before."""

    def picture(data: str) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    def text(words: str) -> dict[str, Any]:
        return {"type": "text", "text": words}

    content = [text("Reference pictures of the subject:"), *map(picture, references)]
    content += [text("The generated picture:"), picture(image), text(f"The prompt: {prompt}")]
    if last is not None:
        words = _THOUGHT.sub("", last.words)[:QUOTED]  # the marks of a thought would mean one to the model
        content.append(text(AGAIN.format(problem=last.problem, words=json.dumps(words)) + PLAIN))
    rules = INSTRUCTIONS + (REASONED if reasoning and last is None else PLAIN)
    return [{"role": "system", "content": rules}, {"role": "user", "content": content}]


def parse(answer: Any) -> tuple[float, float]:
    """Read (prompt, subject) from a chat completion: the last JSON object with both as whole numbers from 0 to 4.

    Text in a thought is not part of the answer. Raises `Unreadable` if there is no such object, or if answer or thought
    have no end: numbers in them were only considered.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        said = _text(message.get("content")) or _text(message.get("refusal"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Unreadable("is no chat completion", json.dumps(answer)) from None
    finished = choice.get("finish_reason")
    reason = f" (finish_reason: {finished[:40]})" if isinstance(finished, str) and finished != "stop" else ""
    thought = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    if isinstance(finished, str) and finished.lower() in CUT:
        raise Unreadable(f"was cut off{reason}", said or thought, cut=True)
    marks = list(_THOUGHT.finditer(said))
    if marks and not marks[-1][1]:
        raise Unreadable(f"is a thought without an end{reason}", said, cut=True)
    objects = _OBJECT.findall(said[marks[-1].end() :] if marks else said)
    for text in reversed(objects):
        try:
            found = [json.loads(text)[question] for question in QUESTIONS]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= BEST for value in found):
            return float(found[0]), float(found[1])
    raise Unreadable(f"holds no two whole numbers from 0 to {BEST}{reason}", said or thought)


def _text(content: Any) -> str:
    """Return the text of a message, a string or a list of parts; empty if it has none."""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
