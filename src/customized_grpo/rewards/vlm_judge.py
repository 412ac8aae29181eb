"""A vision-language model as the judge of both rewards, on any server that speaks OpenAI's chat protocol.

One question an image: the references, the picture and the prompt go in, two integers from 0 to 4 come out. An answer
that holds no such two is asked for again; after that, and when a server stays away, the image has no score.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customized_grpo.rewards import Scores, Task
from customized_grpo.rewards.remote import REFERENCE_SIDE, encoded
from customized_grpo.rewards.transport import Transport, Unavailable

KEY = "OPENAI_API_KEY"
"""Environment variable of the server's key; local servers want none."""
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
_OBJECT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Asked:
    """The last images that were rated, and their ratings: two rewards share one round of questions."""

    images: Tensor
    prompts: tuple[str, ...]
    ratings: Tensor


class VlmJudge:
    """Rates images; a `JudgeReward` is one of its two scores."""

    def __init__(self, transport: Transport, model: str, *, concurrency: int, attempts: int, reasoning: bool) -> None:
        """`concurrency`: questions under way at once. `attempts`: how often an image is asked about whose answers hold
        no scores."""
        self._transport, self._model = transport, model
        self._concurrency, self._attempts, self._reasoning = concurrency, attempts, reasoning
        self._last: Asked | None = None
        self.last_failure: str | None = None
        """See `TellsFailure`."""

    def rate(self, images: Tensor, task: Task) -> Tensor:
        """Ratings [P, G, 2] (prompt, subject) of `images` [P, G, 3, H, W], 0 to 4; NaN where there is none."""
        last = self._last
        if last is not None and last.images is images and last.prompts == tuple(task.prompts):
            return last.ratings
        places = [(p, g) for p in range(images.shape[0]) for g in range(images.shape[1])]
        references = [[encoded(picture, REFERENCE_SIDE) for picture in row] for row in task.references]
        self.last_failure = None
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            found = list(
                pool.map(lambda place: self._ask(images[place], references[place[0]], task.prompts[place[0]]), places)
            )
        except BaseException:  # a signal's as well: nothing waits for answers that nobody wants any more
            self._transport.give_up()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        ratings = torch.tensor(found).unflatten(0, images.shape[:2])
        self._last = Asked(images, tuple(task.prompts), ratings)
        return ratings

    def _ask(self, image: Tensor, references: list[str], prompt: str) -> tuple[float, float]:
        payload: dict[str, Any] = {
            "model": self._model,
            "messages": self._messages(encoded(image), references, prompt),
            "temperature": 0.0,
            "max_tokens": 400 if self._reasoning else 60,
        }
        for attempt in range(self._attempts):
            try:
                answer = self._transport.post("/chat/completions", payload | {"seed": attempt})
            except Unavailable as error:
                self.last_failure = str(error)
                break
            ratings = parse(answer)
            if ratings is not None:
                return ratings
        else:
            self.last_failure = (
                f"{self._transport.field_name}: {self._model} gave {self._attempts} answers without two whole numbers "
                f"from 0 to {BEST}"
            )
        return float("nan"), float("nan")

    def _messages(self, image: str, references: list[str], prompt: str) -> list[dict[str, Any]]:
        def picture(data: str) -> dict[str, Any]:
            return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

        def text(words: str) -> dict[str, Any]:
            return {"type": "text", "text": words}

        content = [text("Reference pictures of the subject:"), *map(picture, references)]
        content += [text("The generated picture:"), picture(image), text(f"The prompt: {prompt}")]
        rules = INSTRUCTIONS + (REASONED if self._reasoning else PLAIN)
        return [{"role": "system", "content": rules}, {"role": "user", "content": content}]


class JudgeReward:
    """One of a judge's two scores as a `Reward`, 0 to 4, higher is better; a `TellsFailure`."""

    def __init__(self, judge: VlmJudge, question: str) -> None:
        """`question`: one of QUESTIONS."""
        self._judge, self._column = judge, QUESTIONS.index(question)

    @property
    def last_failure(self) -> str | None:
        """See `TellsFailure`."""
        return self._judge.last_failure

    def score(self, images: Tensor, task: Task) -> Scores:
        """See `Reward.score`."""
        values = self._judge.rate(images, task)[..., self._column]
        return Scores(values.nan_to_num(0.0), values.isfinite())


def parse(answer: Any) -> tuple[float, float] | None:
    """(prompt, subject) of a chat completion: the last JSON object in its text that has both as whole numbers from 0 to
    4; None where there is none."""
    try:
        words = answer["choices"][0]["message"]["content"]
        objects = _OBJECT.findall(words)
    except (KeyError, IndexError, TypeError):
        return None
    for text in reversed(objects):
        try:
            found = [json.loads(text)[question] for question in QUESTIONS]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= BEST for value in found):
            return float(found[0]), float(found[1])
    return None
