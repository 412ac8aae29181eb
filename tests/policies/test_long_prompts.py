"""How much of a prompt a family reads is what it says, and what its pipeline does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from customized_grpo.factory.pipelines import PIPELINES
from customized_grpo.policies.diffusers_policy import DiffusersPolicy

Load = Callable[..., DiffusersPolicy]
Picture = Callable[..., Tensor]
TEMPLATE = 40
"""More tokens than any tiny template puts behind a prompt."""


def text(policy: DiffusersPolicy, prompt: str, picture: Picture) -> Tensor:
    reference = policy.prepare_reference(picture(32, 32), 1)
    return policy.encode([prompt], [[reference]]).rows[0].tensors["text"]


@pytest.mark.parametrize("kind", [kind for kind in PIPELINES if kind != "qwen-image-edit-plus"])
def test_what_comes_after_the_limit_is_not_read(kind: str, load: Load, picture: Picture) -> None:
    policy = load(kind)

    def of_length(tokens: int) -> str:
        """A prompt of so many tokens: the tiny tokenizers make one of each letter."""
        lengths = policy.prompt_lengths(["aa"])
        assert lengths is not None
        prompt = "a" * (tokens - lengths.num_tokens[0] + 2)
        found = policy.prompt_lengths(["a b", prompt])
        assert found is not None and found.num_tokens[1] == tokens and found.num_tokens[0] == lengths.num_tokens[0] + 1
        return prompt

    found = policy.prompt_lengths([""])
    assert found is not None and found.max_tokens == 512
    whole, cut = of_length(found.max_tokens), of_length(found.max_tokens + TEMPLATE)
    assert not torch.equal(text(policy, whole, picture), text(policy, whole[:-1] + "b", picture))
    assert torch.equal(text(policy, cut, picture), text(policy, cut[:-1] + "b", picture))


def test_t5_reads_all_but_the_last_token_of_a_prompt_that_is_one_too_long(load: Load, picture: Picture) -> None:
    policy = load("flux1-kontext")
    lengths = policy.prompt_lengths(["aa"])
    assert lengths is not None
    longer = "a" * (lengths.max_tokens - lengths.num_tokens[0] + 3)
    assert torch.equal(text(policy, longer, picture), text(policy, longer[:-1] + "b", picture))


def test_qwen_reads_the_whole(load: Load, picture: Picture) -> None:
    policy = load("qwen-image-edit-plus")
    prompt = "a" * 1200
    assert policy.prompt_lengths([prompt]) is None
    assert not torch.equal(text(policy, prompt, picture), text(policy, prompt[:-1] + "b", picture))
