"""A vision-language model as the judge of both rewards, on any server that speaks OpenAI's chat protocol.

One question an image: the references, the picture and the prompt go in, two integers from 0 to 4 come out. An answer
that holds no such two is asked for again; after that, when the server refuses the picture, and when it stays away, the
image has no score.
"""

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from customized_grpo.config.rewards import VlmJudgeConfig
from customized_grpo.errors import UserError, truncated
from customized_grpo.rewards.chat import BEST, QUESTIONS, QUOTED, Unreadable, messages, parse
from customized_grpo.rewards.http import Refused, Scoring, Transport, Unavailable
from customized_grpo.rewards.remote import REFERENCE_SIDE, encoded
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.types import PromptBatch

KEY = "OPENAI_API_KEY"
"""Environment variable of the server's key; local servers want none."""
TOKENS, TOKENS_REASONED = 60, 400
"""Tokens that an answer may take, without and with reasons."""
WARMER = 0.7
"""Temperature at which an image is asked about again: at 0 the same question has the same answer."""
TOLD = 3
"""Number of reasons that are given for the missing scores of one rating."""
NOTHING = (float("nan"), float("nan"))
ADJUST = "servers differ, see max_tokens, max_tokens_field, temperature, omit and extra_body of"
TRIAL_SIDE, TRIAL_PROMPT = 224, "a red square on a white table"


@dataclass(frozen=True)
class Ratings:
    """`values` [P, G, 2] (prompt, subject), 0 to 4, NaN if there is none, and the `reason` why some are missing."""

    values: Tensor
    reason: str | None


@dataclass(frozen=True)
class Asked:
    """The last images that were rated, and their ratings: two rewards share one round of questions."""

    images: "weakref.ref[Tensor]"
    batch: PromptBatch
    ratings: Ratings


@dataclass
class Rating:
    """One rating under way: the patience that its questions share, and why some have no answer."""

    scoring: Scoring
    probed: bool
    """Whether the trial question was asked since a picture was refused."""
    failures: dict[str, None] = field(default_factory=dict)


class VlmJudge:
    """Rates images; a `JudgeReward` is one of its two scores."""

    def __init__(self, transport: Transport, settings: VlmJudgeConfig, field: str = "vlm_judge") -> None:
        """Wrap a server; no question is asked before `check`. Errors name settings at the configuration's `field`."""
        self._transport, self._settings, self._field = transport, settings, field
        self._last: Asked | None = None

    def check(self) -> None:
        """Ask a trial question about a drawn picture. Raises `UserError`, with what the server said, where it has no
        answer that can be read."""
        rating = Rating(self._transport.scoring(), probed=True)
        image, references = _trial()
        if self._ask(image, references, TRIAL_PROMPT, rating) is NOTHING:
            told = "; ".join(rating.failures)
            raise UserError(f"{told}. This was a trial question, before any work; {ADJUST} {self._field}")

    def rate(self, images: Tensor, batch: PromptBatch) -> Ratings:
        """Return the ratings of `images` [P, G, 3, H, W].

        Raises `UserError` where the server answers nobody, or refuses the trial picture beside one of these.
        """
        last = self._last
        if last is not None and last.images() is images and last.batch is batch:
            return last.ratings
        places = [(p, g) for p in range(images.shape[0]) for g in range(images.shape[1])]
        references = [[encoded(picture, REFERENCE_SIDE) for picture in row] for row in batch.references]
        rating = Rating(self._transport.scoring(), probed=False)
        pool = ThreadPoolExecutor(self._settings.concurrency)
        try:
            found = list(
                pool.map(
                    lambda place: self._ask(images[place], references[place[0]], batch.prompts[place[0]], rating),
                    places,
                )
            )
        except BaseException:  # a signal's as well: nothing waits for answers that nobody wants any more
            rating.scoring.cancel()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        values = torch.tensor(found).unflatten(0, images.shape[:2])
        ratings = Ratings(values, truncated(list(rating.failures), "; ", TOLD) or None)
        self._last = Asked(weakref.ref(images), batch, ratings)
        return ratings

    def _ask(self, image: Tensor, references: list[str], prompt: str, rating: Rating) -> tuple[float, float]:
        """Ask about an image: return (prompt, subject), or NOTHING with the reason in `rating`."""
        if rating.scoring.is_over():
            return NOTHING
        attempts, last = self._settings.attempts, None
        picture = encoded(image)
        for attempt in range(attempts):
            try:
                return parse(self._post(picture, references, prompt, attempt, last, rating.scoring))
            except Unreadable as error:
                last = error
            except Refused as error:
                self._probe(rating, error)
                rating.failures[str(error)] = None
                return NOTHING
            except Unavailable as error:
                rating.failures[str(error)] = None
                return NOTHING
        assert last is not None
        rating.failures[self._told(last, attempts)] = None
        return NOTHING

    def _post(
        self, image: str, references: list[str], prompt: str, attempt: int, last: Unreadable | None, scoring: Scoring
    ) -> Any:
        settings = self._settings
        fields = {
            "temperature": max(settings.temperature, WARMER) if last else settings.temperature,
            "max_tokens": self._most_tokens(),
            "seed": attempt,
        }
        kept = {name: value for name, value in fields.items() if name not in settings.omit}
        if "max_tokens" in kept:
            kept[settings.max_tokens_field] = kept.pop("max_tokens")
        question = messages(image, references, prompt, reasoning=settings.reasoning, last=last)
        payload = {"model": settings.model, "messages": question, **kept, **settings.extra_body}
        return self._transport.post("/chat/completions", payload, scoring)

    def _probe(self, rating: Rating, refusal: Refused) -> None:
        """Find out, once a rating, whether a picture is refused or every question: ask the trial question. Raises
        `UserError` where that is refused too."""
        if rating.probed:
            return
        rating.probed = True
        image, references = _trial()
        try:
            self._post(encoded(image), references, TRIAL_PROMPT, 0, None, rating.scoring)
        except Refused as error:
            raise UserError(f"{refusal}; a trial question was refused too: {error}; {ADJUST} {self._field}") from error
        except Unavailable:
            pass  # it is busy, which says nothing of the refusal

    def _most_tokens(self) -> int:
        return self._settings.max_tokens or (TOKENS_REASONED if self._settings.reasoning else TOKENS)

    def _told(self, last: Unreadable, attempts: int) -> str:
        words = " ".join(self._transport.redact(last.words).split())[:QUOTED]
        problem = self._transport.redact(last.problem)
        remedy = ""
        if last.cut:
            remedy = (
                f"; raise {self._field}.max_tokens (now {self._most_tokens()}), or have it think less by "
                f"{self._field}.extra_body"
            )
        return (
            f"{self._transport.field_name}: {self._settings.model} gave {attempts} answers without two whole numbers "
            f"from 0 to {BEST}; the last {problem}: {words!r}{remedy}"
        )


class JudgeReward(Reward):
    """One of a judge's two scores, 0 to 4, higher is better."""

    def __init__(self, judge: VlmJudge, question: str) -> None:
        """Score with `judge`; `question` is one of QUESTIONS."""
        self._judge, self._column = judge, QUESTIONS.index(question)

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        """See `Reward.score`."""
        ratings = self._judge.rate(images, batch)
        values = ratings.values[..., self._column]
        return Scores(values.nan_to_num(0.0), values.isfinite(), ratings.reason)


def _trial() -> tuple[Tensor, list[str]]:
    """Return a picture [3, H, W] of a red square, and its reference."""
    image = torch.ones(3, TRIAL_SIDE, TRIAL_SIDE)
    middle = slice(TRIAL_SIDE // 4, 3 * TRIAL_SIDE // 4)
    image[1:, middle, middle] = 0.0
    return image, [encoded(image)]
