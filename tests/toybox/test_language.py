import itertools
import re

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.toybox.language import (
    ACCESSORY_WORDINGS,
    MAX_WORDS,
    PADDING,
    POSITION_WORDINGS,
    SCENE_WORDINGS,
    TEMPLATES,
    VOCABULARY,
    Request,
    caption,
    parse,
    tokenize,
    words_of,
)
from customized_grpo.toybox.world import ACCESSORIES, POSITIONS, SCENES, SHAPES, Scenes, Subjects


def phrases(table: dict[str, tuple[str, ...]]) -> list[tuple[int, str]]:
    return [(index, wording) for index, wordings in enumerate(table.values()) for wording in wordings]


def every_prompt() -> list[tuple[str, Request]]:
    """Each template with each wording of each attribute, and what it asks for."""
    tables = (phrases(SCENE_WORDINGS), phrases(ACCESSORY_WORDINGS), phrases(POSITION_WORDINGS))
    return [
        (
            template.format(shape=name, scene=scene[1], accessory=accessory[1], position=position[1]),
            Request(shape, scene[0], accessory[0], position[0]),
        )
        for template, (shape, name), scene, accessory, position in itertools.product(
            TEMPLATES, enumerate(SHAPES), *tables
        )
    ]


def test_every_wording_of_everything_is_understood() -> None:
    wrong = [prompt for prompt, request in every_prompt() if parse(prompt) != request]
    assert wrong == []


def test_the_vocabulary_is_what_the_grammar_can_say() -> None:
    said = {word for prompt, _ in every_prompt() for word in re.findall("[a-z]+", prompt)}
    assert set(VOCABULARY) == said
    assert max(len(words_of(prompt)) for prompt, _ in every_prompt()) <= MAX_WORDS


def test_captions_say_what_the_picture_shows_in_changing_words() -> None:
    attributes = torch.cartesian_prod(*map(torch.arange, map(len, (SHAPES, SCENES, ACCESSORIES, POSITIONS))))
    shape, scene, accessory, position = attributes.unbind(1)
    count = len(shape)
    subjects = Subjects(shape, torch.zeros_like(shape), torch.zeros(count, 2))
    captions = caption(subjects, Scenes(scene, accessory, position, torch.zeros(count, 6)), torch.Generator())
    assert [parse(text) for text in captions] == [Request(*row) for row in attributes.tolist()]
    assert len({re.sub("|".join(SHAPES), "", text) for text in captions}) > 500


def test_captions_read_as_english() -> None:
    subjects = Subjects(torch.tensor([2]), torch.tensor([0]), torch.zeros(1, 2))
    scenes = Scenes(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.zeros(1, 6))
    for seed in range(20):
        text = caption(subjects, scenes, torch.Generator().manual_seed(seed))[0]
        assert "  " not in text and " ," not in text and text == text.strip()


def test_what_is_left_unsaid_is_free_and_nothing_worn() -> None:
    assert parse("a picture") == Request(None, None, 0, None)
    assert parse("A STAR, among the stars.") == Request(SHAPES.index("star"), SCENES.index("space"), 0, None)


def test_an_unknown_word_is_named_with_its_nearest_and_the_vocabulary() -> None:
    with pytest.raises(UserError) as caught:
        parse("a star on the beech")
    message = str(caught.value)
    assert "'beech'" in message and "Did you mean 'beach'?" in message
    assert all(word in message for word in VOCABULARY)


@pytest.mark.parametrize("prompt", ["", "  ,. "])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="empty"):
        tokenize([prompt])


def test_a_prompt_has_a_longest_length() -> None:
    assert len(words_of("a " * MAX_WORDS)) == MAX_WORDS
    with pytest.raises(UserError, match=f"{MAX_WORDS + 1} words; ToyBox reads {MAX_WORDS}"):
        words_of("a " * (MAX_WORDS + 1))


def test_tokens_number_the_vocabulary_and_pad() -> None:
    tokens = tokenize(["a star", "a star on the beach"])
    assert tokens.shape == (2, MAX_WORDS) and tokens.dtype == torch.int64
    assert tokens[0].tolist() == [VOCABULARY.index("a") + 1, VOCABULARY.index("star") + 1] + [PADDING] * 18
    assert (tokens[1] != PADDING).sum() == 5 and tokens.max() <= len(VOCABULARY)
