"""From a configuration to the parts of a run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from customized_grpo.config.run import Config, PolicyConfig
from customized_grpo.data import Sample, SubjectDataset, batch_indices
from customized_grpo.errors import UserError, shortened
from customized_grpo.factory.rewards import load_rewards
from customized_grpo.policies.lora_files import adapter_file
from customized_grpo.policies.policy import EncodesAhead, Policy, ReadsPrompts, RowAsked
from customized_grpo.rewards.reward import Reward
from customized_grpo.runtime.device import (
    CPU,
    check_precision,
    keep_freed_memory,
    local_rank,
    local_world,
    processes_here,
    resolve_device,
    resolve_precision,
)
from customized_grpo.runtime.libraries import quiet
from customized_grpo.toybox.oracle import Judge
from customized_grpo.toybox.policy import ADAPTER_FILE, ToyBoxPolicy, save_weights
from customized_grpo.tracking.console import Display, Stages
from customized_grpo.training.estimate import Estimate, Subject, estimate


def resolved(config: Config) -> Config:
    """`config` with the precisions written down that this machine runs it in: they decide the result.

    That of the rewards stays "auto" where this stands for two: HPSv3 in bf16, on CUDA, beside an encoder in fp32.
    """
    rewards = config.rewards
    if rewards.reads("precision") and rewards.precision == "auto":
        two = rewards.prompt == "hpsv3" and _reward_device(config).type == "cuda"
        rewards = rewards.model_copy(update={"precision": "auto" if two else "fp32"})
    return config.model_copy(update={"policy": resolved_policy(config.policy), "rewards": rewards})


def resolved_policy(config: PolicyConfig) -> PolicyConfig:
    """The same of a generator alone."""
    return config.model_copy(update={"precision": resolve_precision(config.precision, _device(config))})


def build_policy(config: PolicyConfig, seed: int) -> Policy[Any]:
    """The generator, ready to be tuned; `seed` draws the LoRA factors."""
    device = _device(config)
    precision = resolve_precision(config.precision, device)
    if config.kind != "toybox":
        check_precision(precision, device)
        quiet()
        from customized_grpo.factory.policy import load_policy

        return load_policy(config, seed, device, bf16=precision == "bf16")
    return _toybox(config, precision, seed)


def build_start(config: PolicyConfig, seed: int) -> Policy[Any]:
    """Build the generator as training starts from it: its trained values are those of `policy.init_from`, if given.

    Raises `UserError`, before the generator is loaded where it can, for an adapter that is missing or does not fit.
    """
    adapter = init_adapter(config)
    policy = build_policy(config, seed)
    if adapter is not None:
        try:
            policy.load_adapter(adapter)
        except UserError as error:
            raise UserError(f"policy.init_from: {error}") from error
    return policy


def init_adapter(config: PolicyConfig) -> Path | None:
    """Return the file that `policy.init_from` names, downloaded where need be; None where it names none."""
    if config.init_from is None:
        return None
    if config.kind != "toybox":
        quiet()
        from customized_grpo.policies.base_adapter import locate_adapter

        return locate_adapter(config.init_from, "policy.init_from")
    try:
        return adapter_file(Path(config.init_from), [ADAPTER_FILE])
    except UserError as error:
        raise UserError(f"policy.init_from: {error}") from error


def save_adapter(config: PolicyConfig, parameters: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write trained `parameters` of the generator of `config`, by name, as it would itself; it is not loaded."""
    if config.kind == "toybox":
        lora = (config.lora_rank, config.lora_alpha) if config.adapter == "lora" else None
        save_weights(parameters, folder, lora)
        return
    quiet()
    from customized_grpo.factory.policy import FAMILIES
    from customized_grpo.policies.lora import lora_config, save_lora

    family = FAMILIES[config.kind]
    save_lora(
        family.pipeline, lora_config(family.lora_targets, config.lora_rank, config.lora_alpha), parameters, folder
    )


def check_shares(config: Config, world: int) -> None:
    """Raise `UserError` where `world` processes cannot share an iteration of `config`, or the generator's weights."""
    prompts = config.rollout.prompts_per_iteration
    if prompts < world:
        raise UserError(
            f"rollout.prompts_per_iteration: {prompts} groups cannot be shared among {world} processes, each of which "
            "takes whole groups; ask for more, or start fewer processes"
        )
    check_shard(config.policy, world)


def check_shard(config: PolicyConfig, world: int) -> None:
    """Raise `UserError` where `world` processes are asked to spread the generator's weights, and cannot."""
    if not config.shard:
        return
    if world == 1:
        raise UserError(
            "policy.shard: a single process has no other to share the frozen weights with; start several "
            "(--num_processes, torchrun), or leave it out"
        )
    device = _device(config)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"policy.shard: weights are gathered on cuda or cpu, and the device is {device}; leave it out")


def _toybox(config: PolicyConfig, precision: Literal["fp32", "bf16"], seed: int) -> ToyBoxPolicy:
    keep_freed_memory()
    return ToyBoxPolicy.load(
        config.weights,
        adapter=config.adapter,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        precision=precision,
        seed=seed,
    )


def _device(config: PolicyConfig) -> torch.device:
    if config.kind == "toybox":
        return CPU
    device = resolve_device(config.device)
    if config.device.startswith("cuda:") and processes_here() > 1:
        raise UserError(
            f"policy.device: '{config.device}' is one GPU, and each process of this machine wants its own; use cuda"
        )
    return device


def dry_run(config: Config, processes: int = 1) -> Estimate:
    """What a run of `config` takes of each of its `processes`. Raises `UserError` where the model cannot be had."""
    check_shares(config, processes)
    if config.policy.kind != "toybox":
        quiet()
        from customized_grpo.training.dry_run import dry_run as dry_run_of_pipeline

        rows, unknown = _outlined(config)
        estimated = dry_run_of_pipeline(config, processes, rows)
        return _with_rewards(config, replace(estimated, not_counted=(*estimated.not_counted, *unknown)))
    policy = _toybox(config.policy, "fp32", seed=0)
    condition = policy.encode(["a ball on the beach"], [[torch.zeros(3, *policy.size)]])
    frozen = sum(p.nbytes for module in policy.networks for p in module.parameters() if not p.requires_grad)
    subject = Subject(policy, policy.networks[-1], condition, float(frozen))
    return _with_rewards(config, estimate(config, subject, processes))


def _outlined(config: Config) -> tuple[Sequence[Sample] | None, list[str]]:
    """All samples that a run of `config` reads, by the lines of its data folders; None, and why, where one is not
    there."""
    paths = config.data.model_dump(include={"path", "validation", "test"}, exclude_none=True)
    absent = [f"data.{name}" for name, path in paths.items() if not path.is_dir()]
    if absent:
        return None, [f"disk of encoded prompts and references: {', '.join(absent)} is not there"]
    datasets = {name: SubjectDataset.outline(path) for name, path in paths.items()}
    return [sample for samples in read_samples(config, datasets).values() for sample in samples], []


def _with_rewards(config: Config, estimated: Estimate) -> Estimate:
    """`estimated`, with what the rewards keep on the generator's device."""
    device = _reward_device(config)
    if device != _device(config.policy):
        return estimated
    from customized_grpo.factory.footprint import reward_bytes

    counted, unknown = reward_bytes(config.rewards, device, config.policy.weights)
    unknown = [f"weights of {name}: not on this machine" for name in unknown]
    others = ["activations of the rewards", "what an allocator adds"]
    return replace(
        estimated,
        memory=estimated.memory | {f"weights of {name}": size for name, size in counted.items()},
        not_counted=(*estimated.not_counted, *unknown, *others),
    )


def build_rewards(config: Config) -> tuple[Reward, Reward]:
    """The (prompt, identity) rewards."""
    device = _reward_device(config)
    check_precision(config.rewards.precision, device, "rewards.")
    return load_rewards(config.rewards, device, config.policy.weights)


def _reward_device(config: Config) -> torch.device:
    name = config.rewards.device
    return _device(config.policy) if name == "auto" else resolve_device(name, "rewards.")


def build_judge(config: Config) -> Judge | None:
    """The judge, None where the configuration wants none."""
    if config.evaluation.judge == "none":
        return None
    judge = Judge(config.policy.weights)
    _ = judge.ceiling  # shown when training ends: better missed now
    return judge


def read_dataset(path: Path, config: Config) -> SubjectDataset:
    """Open the dataset in the folder `path`, with the masks that the rewards want.

    Its pictures are decoded and checked by one process of a machine for all; within `Ranks.together`, all hear what is
    wrong. Raises `UserError` listing that.
    """
    dataset = SubjectDataset.open(path, max_pixels=config.data.max_pixels, decode=local_rank() == 0)
    if config.rewards.identity_reference == "segmented":
        remedy = "but rewards.identity_reference is 'segmented'; add masks or set it to 'whole'"
        raise_listed(
            path, "samples", [f"sample '{each.id}': has no mask, {remedy}" for each in dataset if not each.masks]
        )
    return dataset


class Asked(Protocol):
    """What a policy is asked for: a prompt and its references, under a name."""

    @property
    def id(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def references(self) -> Sequence[Path]: ...


def check_prompts(source: Path, samples: Iterable[Asked], policy: Policy[Any]) -> None:
    """Refuse, before any work, samples of `source` that the policy cannot take. Raises `UserError` listing them."""
    problems = []
    for sample in samples:
        try:
            policy.check(sample.prompt, len(sample.references))
        except UserError as error:
            problems.append(f"sample '{sample.id}': {error}")
    raise_listed(source, "samples", problems)


def tell_long_prompts(
    config: Config,
    policy: Policy[Any],
    rewards: Sequence[Reward],
    used: Mapping[SubjectDataset, Sequence[Sample]],
    display: Display,
) -> None:
    """Warn of prompts that the generator or the prompt reward does not read to their end, among the samples of each
    dataset that are used."""
    readers: dict[str, tuple[str, object]] = {
        "policy.kind": (config.policy.kind, policy),
        "rewards.prompt": (config.rewards.prompt, rewards[0]),
    }
    for field, (name, reader) in readers.items():
        for dataset, samples in used.items():
            prompts = [sample.prompt for sample in samples]
            lengths = reader.prompt_lengths(prompts) if isinstance(reader, ReadsPrompts) else None
            if lengths is None:
                continue
            long = [s.id for s, tokens in zip(samples, lengths.tokens, strict=True) if tokens > lengths.read]
            if long:
                are = "is" if len(long) == 1 else "are"
                display.warn(
                    f"{field}: {len(long)} of {len(prompts)} prompts used of {dataset.folder} {are} longer than the "
                    f"{lengths.read} tokens that {name} reads; what comes after is not read (first: sample '{long[0]}')"
                )


def open_dataset(path: Path, config: Config, policy: Policy[Any]) -> SubjectDataset:
    """The dataset in the folder `path`, wholly checked."""
    dataset = read_dataset(path, config)
    check_prompts(path, dataset, policy)
    return dataset


def raise_listed(source: Path, what: str, problems: Sequence[str]) -> None:
    """Raise `UserError` where there are problems with the things in `source`: the first ten, and how many more."""
    if problems:
        raise UserError(f"{source}: {len(problems)} unusable {what}:\n  {shortened(problems, most=10)}")


def read_samples(
    config: Config, datasets: Mapping[str, SubjectDataset], first: int = 0
) -> dict[SubjectDataset, Sequence[Sample]]:
    """The samples that a run of `config` reads from iteration `first` (0 is the very first) on, of each of the
    `datasets` by their names: path, validation and test."""
    training, evaluation = datasets["path"], config.evaluation
    each = config.rollout.prompts_per_iteration
    read = set(batch_indices(len(training), config.iterations * each, config.seed, 0)[first * each :])
    shown = max(evaluation.pairs, evaluation.gallery)
    if "validation" not in datasets:
        read |= set(range(min(shown, len(training))))
    used: dict[SubjectDataset, Sequence[Sample]] = {training: [training[index] for index in sorted(read)]}
    for name, count in (("validation", shown), ("test", evaluation.test_pairs)):
        if name in datasets:
            used[datasets[name]] = datasets[name].samples[:count]
    return used


def encode_ahead(policy: Policy[Any], used: Mapping[SubjectDataset, Sequence[Sample]], stages: Stages) -> None:
    """Have a policy with large encoders encode all that it will be asked for: the samples of each dataset that are
    used. Raises `UserError`, before any is encoded, where there is no room for them."""
    rows = [(dataset, sample) for dataset, samples in used.items() for sample in samples]
    encode_rows(
        policy,
        [sample for _, sample in rows],
        lambda index: rows[index][0].references([rows[index][1]], policy.prepare_reference)[0],
        stages,
    )


def encode_rows(
    policy: Policy[Any],
    rows: Sequence[RowAsked],
    references: Callable[[int], Sequence[Tensor]],
    stages: Stages,
    mine: Sequence[int] | None = None,
) -> None:
    """`encode_ahead` for `rows`, whose prepared `references` are had by index. This process encodes those with the
    numbers `mine`; None: a share of what the processes of this machine have to encode."""
    if not isinstance(policy, EncodesAhead):
        return
    policy.reserve(rows, references, check_only=local_rank() > 0)
    # The disk of a machine need not be that of other machines. Where nothing says how many processes there are, each
    # encodes all.
    numbers = range(len(rows))[local_rank() % local_world() :: local_world()] if mine is None else mine
    policy.encode_ahead(
        [rows[number].prompt for number in numbers],
        lambda index: references(numbers[index]),
        lambda done: stages.update("encoding prompts and references", done, len(numbers)),
    )
