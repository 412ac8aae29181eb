"""What an iteration of a large generator takes, from its configurations alone: its weights stay where they are."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler

from customized_grpo.config.policy import Quantization
from customized_grpo.config.run import Config
from customized_grpo.data import Sample, SubjectDataset
from customized_grpo.errors import UserError, first_line
from customized_grpo.factory.architectures import (
    ARCHITECTURES,
    cached_folder,
    outline_encoder,
    outline_known,
    with_parts,
)
from customized_grpo.factory.config import check_shares
from customized_grpo.factory.data import read_samples
from customized_grpo.factory.pipelines import MODELS, PIPELINES, settings_of
from customized_grpo.factory.policy import load_toybox, policy_device
from customized_grpo.factory.rewards import reward_loader
from customized_grpo.io.hub import DAMAGED
from customized_grpo.policies.block_offload import repeated_blocks
from customized_grpo.policies.checkpointing import enable_checkpointing
from customized_grpo.policies.conditions import ConditionCache, bytes_of_rows
from customized_grpo.policies.diffusers_policy import DiffusersPolicy, plan_row
from customized_grpo.policies.loading import read_index, resolve_model
from customized_grpo.policies.pipelines.encoded import EncodedBatch, EncodedPrompt
from customized_grpo.policies.pipelines.resolution import token_count
from customized_grpo.policies.pipelines.spec import PipelineSpec
from customized_grpo.policies.policy import PromptRow
from customized_grpo.policies.quantization import restored_bytes, saved_bytes
from customized_grpo.runtime.device import resolve_device, resolve_precision
from customized_grpo.runtime.libraries import silence_libraries
from customized_grpo.training.estimate import Estimate, LivePeak, ProfileTarget, estimate

META = torch.device("meta")
UNFUSED = "_native_math"
"""diffusers' attention backend that keeps the matrix of all pairs of tokens."""


def dry_run_pipeline(config: Config, processes: int = 1, rows: Sequence[PromptRow] | None = None) -> Estimate:
    """Estimate an iteration of `config` on each of its `processes`, with one square reference per prompt.

    Also estimate the disk that `rows`, all that the run reads, take once they are encoded. Raises `UserError` if the
    model cannot be loaded, or rejects a setting.
    """
    settings = config.policy
    family, model = PIPELINES[settings.kind], settings.pipeline.model or MODELS[settings.kind]
    bf16 = resolve_precision(settings.precision, resolve_device(settings.device)) == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    here = Path(model).is_dir() or cached_folder(model)
    if not here and model in ARCHITECTURES:
        pipe = outline_known(ARCHITECTURES[model], family, dtype)
        estimated = estimate_pipeline(config, family, pipe, processes, rows)
        unread = f"what differs from the known architecture of {model}: its files are not on this machine"
        return replace(estimated, not_counted=(*estimated.not_counted, unread))
    folder = here if isinstance(here, Path) else resolve_model(model, family, weights=False)
    return estimate_pipeline(config, family, outline(folder, family, dtype), processes, rows)


def estimate_pipeline(
    config: Config, family: PipelineSpec, pipe: Any, processes: int = 1, rows: Sequence[PromptRow] | None = None
) -> Estimate:
    """Estimate an iteration of `config` on each process with `pipe`, whose transformer and VAE are on the meta
    device."""
    settings, network = config.policy.pipeline, pipe.transformer
    # What recomputes or compiles on the way changes what is counted, not what is computed.
    plain = replace(
        settings_of(config.policy, META, config.seed),
        gradient_checkpointing=False,
        compile=False,
        attention_backend=None,
    )
    policy = DiffusersPolicy(family, pipe, ConditionCache(settings.cache, ""), plain)
    sizes = (family.reference_size(settings.height, settings.width, 1, settings.reference_side),)
    example = family.dummy_inputs(network.config, sizes, guided=policy.guided)
    dtype = pipe.vae.dtype
    row = EncodedPrompt({name: tensor.to(dtype) for name, tensor in example.items()}, sizes)
    tokens = token_count([policy.size, *sizes]) + len(row.tensors["text"])
    frozen = {
        module: float(sum(p.nbytes for p in module.parameters() if not p.requires_grad))
        for module in (network, pipe.vae)
    }
    frozen[network] -= saved_bytes(network, settings.quantization)
    blocks = 0.0
    if settings.fsdp:
        frozen[network] /= processes
    elif settings.block_offload:
        blocks, two = _block_bytes(network, settings.quantization)
        frozen[network] -= blocks - two
    subject = ProfileTarget(
        policy,
        network,
        lambda count: EncodedBatch((row,), torch.zeros(count, dtype=torch.long)),
        weight_bytes=float(sum(frozen.values())),
        checkpoint=partial(enable_checkpointing, network, settings.keep_every)
        if settings.gradient_checkpointing
        else None,
        restored_bytes=restored_bytes(network, settings.quantization),
        fused_tokens=0 if settings.attention_backend == UNFUSED else tokens,
    )
    estimated = estimate(config, subject, processes)
    encoding, unread = _encoding_bytes(config, family, pipe, sizes[0])
    estimated = replace(estimated, before={"encoding": encoding}, not_counted=(*estimated.not_counted, *unread))
    if blocks:
        estimated = replace(estimated, host=estimated.host | {"blocks that wait": blocks})
    if rows is None:
        return estimated
    planned = [plan_row(family, each, settings.reference_side) for each in rows]
    encoded = bytes_of_rows(family, network.config, dtype, planned, guided=policy.guided)
    return replace(estimated, disk=estimated.disk | {"encoded prompts and references": float(encoded)})


def _encoding_bytes(
    config: Config, family: PipelineSpec, pipe: Any, size: tuple[int, int]
) -> tuple[dict[str, float], list[str]]:
    """Return what is on the device while prompts and a reference of `size` are encoded, and what is not known of it."""
    encoders = {name: getattr(pipe, name) for name in family.text_encoders}
    kind = config.policy.pipeline.text_encoder_quantization
    found = {
        f"weights of {name}": float(sum(p.nbytes for p in encoder.parameters())) - saved_bytes(encoder, kind)
        for name, encoder in encoders.items()
        if encoder is not None
    }
    unread = [f"weights of {name}, while it encodes" for name, encoder in encoders.items() if encoder is None]
    pixels = torch.zeros(1, 3, *size, dtype=pipe.vae.dtype, device=META)
    if isinstance(pipe.vae, AutoencoderKLQwenImage):
        pixels = pixels.unsqueeze(2)  # a video of one picture
    with torch.no_grad(), LivePeak() as live:
        pipe.vae.encode(pixels)
    weights = float(sum(p.nbytes for p in pipe.vae.parameters()))
    return found | {"weights of vae": weights, "activations of a reference": float(live.peak)}, unread


def _block_bytes(network: Any, quantization: Quantization) -> tuple[float, float]:
    """Return the bytes of the blocks' frozen weights: of all, and of the two that are on the device at once."""
    sizes = [
        float(sum(p.nbytes for p in block.parameters() if not p.requires_grad)) for block in repeated_blocks(network)
    ]
    left = 1 - saved_bytes(network, quantization) / sum(sizes)
    return left * sum(sizes), left * sum(sorted(sizes)[-2:])


def outline(folder: Path, family: PipelineSpec, dtype: torch.dtype) -> Any:
    """Return the pipeline in `folder` with its transformer, VAE and text encoders on the meta device; without an
    encoder whose configuration is not there.

    Raises `UserError` where another configuration is missing, or one is damaged.
    """
    index, parts = read_index(folder), dict[str, Any]()
    plain = {name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)}
    try:
        for name, kind in (("transformer", family.transformer), ("vae", getattr(diffusers, index["vae"][1]))):
            with META:
                parts[name] = kind.from_config(kind.load_config(folder, subfolder=name)).to(dtype)
        for name in family.text_encoders:
            if (file := folder / name / "config.json").is_file():
                parts[name] = outline_encoder(index[name][1], json.loads(file.read_text(encoding="utf-8")), dtype)
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    except DAMAGED as error:
        raise UserError(f"policy.pipeline.model: {folder} could not be read: {first_line(error)}") from error
    return with_parts(family, parts, plain)


def dry_run(config: Config, processes: int = 1) -> Estimate:
    """Estimate a run of `config` on each of its `processes`.

    Raises `UserError` if the model cannot be loaded.
    """
    check_shares(config, processes)
    if config.policy.kind in PIPELINES:
        silence_libraries()
        rows, unknown = _outlined(config)
        estimated = dry_run_pipeline(config, processes, rows)
        return _with_rewards(config, replace(estimated, not_counted=(*estimated.not_counted, *unknown)))
    policy = load_toybox(config.policy, "fp32", seed=0)
    encoded = policy.encode(["a ball on the beach"], [[torch.zeros(3, *policy.size)]])
    frozen = sum(p.nbytes for module in policy.networks for p in module.parameters() if not p.requires_grad)
    subject = ProfileTarget(
        policy, policy.networks[-1], lambda count: encoded.take(torch.zeros(count, dtype=torch.long)), float(frozen)
    )
    return _with_rewards(config, estimate(config, subject, processes))


def _outlined(config: Config) -> tuple[Sequence[Sample] | None, list[str]]:
    """Return all samples that a run of `config` reads, by the lines of its data folders; None, and why, where one is
    not there."""
    paths = config.data.model_dump(include={"path", "validation", "test"}, exclude_none=True)
    absent = [f"data.{name}" for name, path in paths.items() if not path.is_dir()]
    if absent:
        return None, [f"disk of encoded prompts and references: {', '.join(absent)} is not there"]
    datasets = {name: SubjectDataset.outline(path) for name, path in paths.items()}
    return [sample for samples in read_samples(config, datasets).values() for sample in samples], []


def _with_rewards(config: Config, estimated: Estimate) -> Estimate:
    """Return `estimated`, with what the rewards and metrics keep on the generator's device."""
    from customized_grpo.factory.footprint import score_bytes

    device, loader = policy_device(config.policy), reward_loader(config)
    counted, unknown = score_bytes(config.scores, device, loader, config.policy.toybox.weights)
    unknown = [f"weights of {name}: not on this machine" for name in unknown]
    encoders = ["activations of the text encoders"] if estimated.before else []
    others = ["activations of the rewards", *encoders, "what an allocator adds"]
    return replace(
        estimated,
        scores={f"weights of {name}": size for name, size in counted.items()},
        not_counted=(*estimated.not_counted, *unknown, *others),
    )
