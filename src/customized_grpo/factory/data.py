"""Datasets of a run: opened, checked against the generator, and encoded before training."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from customized_grpo.config.rewards import wants_masks
from customized_grpo.config.run import Config
from customized_grpo.data import Sample, SubjectDataset, batch_indices
from customized_grpo.distributed.env import local_rank, local_world
from customized_grpo.errors import UserError, truncated
from customized_grpo.policies.policy import Policy, PromptRow
from customized_grpo.rewards.reward import Reward
from customized_grpo.tracking.console import Display, StageProgress


def read_dataset(path: Path, config: Config) -> SubjectDataset:
    """Open the dataset in the folder `path`, with the masks that the rewards want.

    Its pictures are decoded and checked by one process of a machine for all; within `DistributedGroup.synchronized`,
    all hear what is
    wrong. Raises `UserError` listing that.
    """
    dataset = SubjectDataset.open(path, max_pixels=config.data.max_pixels, decode=local_rank() == 0)
    if field := wants_masks(config.scores):
        kind = config.scores[field].kind
        remedy = f"but {field}.{kind}.reference is 'segmented'; add masks or set it to 'whole'"
        raise_problems(
            path, "samples", [f"sample '{each.id}': has no mask, {remedy}" for each in dataset if not each.masks]
        )
    return dataset


class PromptLike(Protocol):
    """What a policy is asked for: a prompt and its references, under a name."""

    @property
    def id(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def references(self) -> Sequence[Path]: ...


def check_prompts(source: Path, samples: Iterable[PromptLike], policy: Policy[Any]) -> None:
    """Refuse, before any work, samples of `source` that the policy cannot take. Raises `UserError` listing them."""
    problems = []
    for sample in samples:
        try:
            policy.check(sample.prompt, len(sample.references))
        except UserError as error:
            problems.append(f"sample '{sample.id}': {error}")
    raise_problems(source, "samples", problems)


def warn_truncated_prompts(
    config: Config,
    policy: Policy[Any],
    rewards: Mapping[str, Reward],
    used: Mapping[SubjectDataset, Sequence[Sample]],
    display: Display,
) -> None:
    """Warn about used prompts longer than the generator's or a reward's token limit."""
    readers = {
        "policy.kind": (config.policy.kind, policy.prompt_lengths),
        **{f"rewards.{name}": (config.rewards[name].kind, reward.prompt_lengths) for name, reward in rewards.items()},
    }
    for field, (name, prompt_lengths) in readers.items():
        for dataset, samples in used.items():
            prompts = [sample.prompt for sample in samples]
            lengths = prompt_lengths(prompts)
            if lengths is None:
                continue
            long = [s.id for s, tokens in zip(samples, lengths.num_tokens, strict=True) if tokens > lengths.max_tokens]
            if long:
                are = "is" if len(long) == 1 else "are"
                display.warn(
                    f"{field}: {len(long)} of {len(prompts)} prompts used of {dataset.folder} {are} longer than the "
                    f"{lengths.max_tokens} tokens that {name} reads; the rest is not read (first: '{long[0]}')"
                )


def load_dataset(path: Path, config: Config, policy: Policy[Any]) -> SubjectDataset:
    """Return the dataset in the folder `path`, checked completely."""
    dataset = read_dataset(path, config)
    check_prompts(path, dataset, policy)
    return dataset


def raise_problems(source: Path, what: str, problems: Sequence[str]) -> None:
    """Raise `UserError` if the things in `source` have problems: list the first ten, and the number of the others."""
    if problems:
        raise UserError(f"{source}: {len(problems)} unusable {what}:\n  {truncated(problems, most=10)}")


def read_samples(
    config: Config, datasets: Mapping[str, SubjectDataset], first: int = 0
) -> dict[SubjectDataset, Sequence[Sample]]:
    """Return the samples that a run of `config` reads from iteration `first` (0 is the very first) on.

    They are listed for each of the `datasets` by its name: path, validation and test.
    """
    training, evaluation = datasets["path"], config.evaluation
    each = config.rollout.prompts_per_iteration
    read = set(batch_indices(len(training), config.iterations * each, config.seed, 0)[first * each :])
    shown = max(evaluation.num_samples, evaluation.gallery)
    if "validation" not in datasets:
        read |= set(range(min(shown, len(training))))
    used: dict[SubjectDataset, Sequence[Sample]] = {training: [training[index] for index in sorted(read)]}
    for name, count in (("validation", shown), ("test", evaluation.num_test_samples)):
        if name in datasets:
            used[datasets[name]] = datasets[name].samples[:count]
    return used


def encode_ahead(policy: Policy[Any], used: Mapping[SubjectDataset, Sequence[Sample]], stages: StageProgress) -> None:
    """Precompute with a policy whose encoders are large: encode the samples of each dataset that are used.

    Raises `UserError`, before any sample is encoded, if the cache has no room.
    """
    rows = [(dataset, sample) for dataset, samples in used.items() for sample in samples]
    encode_rows(
        policy,
        [sample for _, sample in rows],
        lambda index: rows[index][0].references([rows[index][1]], policy.prepare_reference)[0],
        stages,
    )


def encode_rows(
    policy: Policy[Any],
    rows: Sequence[PromptRow],
    references: Callable[[int], Sequence[Tensor]],
    stages: StageProgress,
    mine: Sequence[int] | None = None,
) -> None:
    """Precompute `rows` with the policy; `references` returns a row's prepared references by its number.

    This process encodes the rows with the numbers `mine`; None: its share among the processes of this machine.
    """
    # The disk of a machine need not be that of other machines. Where nothing says how many processes there are, each
    # encodes all.
    share = range(len(rows))[local_rank() % local_world() :: local_world()] if mine is None else mine
    policy.precompute(
        rows, references, share, lambda done: stages.update("encoding prompts and references", done, len(share))
    )
