"""ToyBox English: captions from a small grammar, their tokens, and what a prompt asks for.

A prompt names the class of the subject, never its identity: "a star on the beach wearing a red hat, on the left". The
vocabulary is closed; a word outside it is an error that lists the words there are.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.toybox.world import ACCESSORIES, POSITIONS, SCENES, SHAPES, Scenes, Subjects

SCENE_WORDINGS = {
    "beach": ("on the beach", "at the beach"),
    "snow": ("in the snow", "on a snowy hill"),
    "forest": ("in the forest", "among the trees"),
    "desert": ("in the desert", "among the dunes"),
    "city": ("in the city", "in the city at night"),
    "space": ("in space", "among the stars"),
    "meadow": ("in a meadow", "on the grass"),
    "sea": ("under the sea", "deep in the sea"),
}
ACCESSORY_WORDINGS = {
    "nothing": ("",),
    "hat": ("wearing a red hat", "with a red hat"),
    "scarf": ("wearing a blue scarf", "with a blue scarf"),
    "glasses": ("wearing glasses", "with dark glasses"),
    "crown": ("wearing a crown", "with a golden crown"),
}
POSITION_WORDINGS = {
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side"),
}
TEMPLATES = (
    "a {shape} {scene} {accessory}, {position}",
    "a {shape} {accessory} {scene}, {position}",
    "{position}, a {shape} {accessory} {scene}",
    "a picture of a {shape} {scene} {accessory}, {position}",
)

KEYWORDS: dict[str, dict[str, int]] = {
    "shape": {name: index for index, name in enumerate(SHAPES)},
    "scene": {
        word: SCENES.index(name)
        for name, words in {
            "beach": ("beach",),
            "snow": ("snow", "snowy"), "forest": ("forest", "trees"), "desert": ("desert", "dunes"),
            "city": ("city",), "space": ("space", "stars"), "meadow": ("meadow", "grass"), "sea": ("sea",),
        }.items()
        for word in words
    },
    "accessory": {name: index for index, name in enumerate(ACCESSORIES) if name != "nothing"},
    "position": {"left": 0, "middle": 1, "center": 1, "right": 2},
}  # fmt: skip
"""The words that decide what a prompt asks for; every other word is filling."""


def _wordings() -> list[str]:
    tables = (SCENE_WORDINGS, ACCESSORY_WORDINGS, POSITION_WORDINGS)
    phrases = [phrase for table in tables for wordings in table.values() for phrase in wordings]
    return [*phrases, *(re.sub(r"{\w+}", "", template) for template in TEMPLATES), *SHAPES]


VOCABULARY: tuple[str, ...] = tuple(sorted({word for text in _wordings() for word in re.findall(r"[a-z]+", text)}))
MAX_WORDS = 20
PADDING = 0
_IDS = {word: index for index, word in enumerate(VOCABULARY, PADDING + 1)}


@dataclass(frozen=True)
class Request:
    """What a prompt asks for, as indices into the world's lists; None where it leaves the choice free."""

    shape: int | None
    scene: int | None
    accessory: int
    position: int | None


def words_of(prompt: str) -> list[str]:
    """Return the words of `prompt`, checked.

    Raises `UserError` for an unknown word or more than `MAX_WORDS` of them.
    """
    words = re.findall(r"[^\s,.;:!?]+", prompt.lower())
    for word in words:
        if word not in _IDS:
            nearest = difflib.get_close_matches(word, VOCABULARY, n=1)
            hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
            raise UserError(
                f"ToyBox does not know the word '{word}' in the prompt '{prompt}'.{hint} "
                f"It knows: {', '.join(VOCABULARY)}."
            )
    if not words:
        raise UserError("The prompt is empty. Write what to draw, such as 'a star on the beach, on the left'.")
    if len(words) > MAX_WORDS:
        raise UserError(f"The prompt '{prompt}' has {len(words)} words; ToyBox reads {MAX_WORDS} at most. Shorten it.")
    return words


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Return token ids [B, MAX_WORDS] int64, 0 for padding. Raises `UserError` as `words_of` does."""
    ids = torch.full((len(prompts), MAX_WORDS), PADDING)
    for row, prompt in enumerate(prompts):
        words = [_IDS[word] for word in words_of(prompt)]
        ids[row, : len(words)] = torch.tensor(words)
    return ids


def parse(prompt: str) -> Request:
    """Parse `prompt`. An accessory that is not named means none is worn; anything else not named is free."""
    words = words_of(prompt)

    def first(kind: str) -> int | None:
        return next((KEYWORDS[kind][word] for word in words if word in KEYWORDS[kind]), None)

    return Request(first("shape"), first("scene"), first("accessory") or 0, first("position"))


def caption(subjects: Subjects, scenes: Scenes, generator: torch.Generator) -> list[str]:
    """Return one prompt for each picture [B], in a wording drawn from `generator`."""
    choices = torch.randint(1 << 16, (len(subjects), 4), generator=generator).tolist()
    attributes = torch.stack([subjects.shape, scenes.scene, scenes.accessory, scenes.position], dim=1).tolist()
    captions = []
    for (shape, scene, accessory, position), (c0, c1, c2, c3) in zip(attributes, choices, strict=True):
        text = TEMPLATES[c0 % len(TEMPLATES)].format(
            shape=SHAPES[shape],
            scene=_pick(SCENE_WORDINGS[SCENES[scene]], c1),
            accessory=_pick(ACCESSORY_WORDINGS[ACCESSORIES[accessory]], c2),
            position=_pick(POSITION_WORDINGS[POSITIONS[position]], c3),
        )
        captions.append(re.sub(r"\s+", " ", text).replace(" ,", ","))
    return captions


def _pick(wordings: Sequence[str], choice: int) -> str:
    return wordings[choice % len(wordings)]
