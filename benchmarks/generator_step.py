"""What one training iteration of a large generator costs: random weights in its true shape, built on the device.

    python benchmarks/generator_step.py [--kind flux1-kontext] [--rank 512] [--micro_batch 4] [--json]
    python benchmarks/generator_step.py --quantization int8 --block_offload     # what makes room
    python benchmarks/generator_step.py --size middle --device cpu              # FLUX.1 of width 128, on a CPU
    python benchmarks/generator_step.py --size tiny --device cpu                # of any kind, tiny

Full size: one reference, 512 x 512, G = 12, T = 25, 60 % of the steps trained, 3 updates: the paper's iteration for one
prompt. Seconds are of the last iteration; the first warms up. The share of the peak is against a matrix product of the
same run.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from customized_grpo.config.run import Config
from customized_grpo.data import Sample, SubjectDataset, save_image, write_metadata
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.runtime.libraries import silence_libraries
from customized_grpo.training.trainer import Trainer
from customized_grpo.types import PromptBatch, References

silence_libraries()

import diffusers  # noqa: E402

from customized_grpo.factory.architectures import ARCHITECTURES, with_parts  # noqa: E402
from customized_grpo.factory.pipelines import MODELS, PIPELINES, QUANTIZATION, settings_of  # noqa: E402
from customized_grpo.policies.conditions import ConditionCache  # noqa: E402
from customized_grpo.policies.diffusers_policy import DiffusersPolicy  # noqa: E402
from customized_grpo.policies.pipelines.encoded import EncodedBatch, EncodedPrompt  # noqa: E402
from customized_grpo.policies.quantization import quantize  # noqa: E402
from customized_grpo.testing import tiny_pipelines as tiny  # noqa: E402
from customized_grpo.training.dry_run import estimate_pipeline  # noqa: E402
from customized_grpo.training.estimate import Estimate  # noqa: E402

GEMM_SIDE = {"cuda": 8192, "cpu": 1024}
SIDES = {"full": 512, "middle": 128, "tiny": 64}
MIDDLE = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 16, "num_attention_heads": 8,
    "joint_attention_dim": 16, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
"""Of FLUX.1's transformer: wide enough that a CPU spends its time in matrix products."""


class RandomPolicy(DiffusersPolicy):
    """Whose prompts and references are random numbers in the shapes of encoded ones."""

    row: EncodedPrompt
    dtype: torch.dtype

    def encode(self, prompts: Sequence[str], references: References) -> EncodedBatch:
        return EncodedBatch((self.row,) * len(prompts), torch.arange(len(prompts)))


class Brightness(Reward):
    """A reward that costs nothing and differs from image to image."""

    def __init__(self, channel: int) -> None:
        self.channel = channel

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        values = images[:, :, self.channel].mean((-2, -1))
        return Scores(values, torch.ones_like(values, dtype=torch.bool))


def main() -> None:
    """Measure everything and print it."""
    options = _options()
    device = torch.device(options.device)
    config = _config(options)
    policy = build_policy(options, config, device)
    expected = estimate_pipeline(
        config, PIPELINES[options.kind], build_pipeline(options, torch.device("meta"), policy.dtype)
    )
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(config, policy, _dataset(Path(folder)), expected, options.iterations)
    if options.json:
        print(json.dumps(figures))
        return
    table = Table(title=f"one iteration of {options.kind}", title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    Console().print(table)


def build_policy(options: argparse.Namespace, config: Config, device: torch.device) -> RandomPolicy:
    """Build a generator with random weights where it runs."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if config.policy.precision == "bf16" else torch.float32
    family, pipe = PIPELINES[options.kind], build_pipeline(options, device, dtype)
    quantize(pipe.transformer, config.policy.pipeline.quantization, QUANTIZATION)
    if options.block_offload:
        pipe.transformer.to("cpu")  # a policy starts there
    settings = settings_of(config.policy, device, config.seed)
    policy = RandomPolicy(family, pipe, ConditionCache(Path("unused"), ""), settings)
    size = policy.size
    example = family.dummy_inputs(pipe.transformer.config, (size,), guided=policy.guided)
    tensors = {name: torch.randn(tensor.shape, dtype=dtype) for name, tensor in example.items()}
    policy.row, policy.dtype = EncodedPrompt(tensors, (size,)), dtype
    return policy


def build_pipeline(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a pipeline without its encoders on `device`."""
    family, known = PIPELINES[options.kind], ARCHITECTURES[MODELS[options.kind]]
    torch.set_default_dtype(dtype)
    try:
        with device:
            if options.size == "full":
                transformer = family.transformer(**known.transformer)
                vae = getattr(diffusers, known.vae)(**known.vae_settings)
            else:
                small = tiny.MAKERS[options.kind]()
                transformer, vae = small.transformer.to(dtype), small.vae.to(dtype)
            if options.size == "middle":
                transformer = family.transformer(**MIDDLE)
    finally:
        torch.set_default_dtype(torch.float32)
    schedule = diffusers.FlowMatchEulerDiscreteScheduler(**known.schedule)
    return with_parts(family, {"transformer": transformer, "vae": vae, "scheduler": schedule})


def measure(
    config: Config, policy: RandomPolicy, dataset: SubjectDataset, expected: Estimate, iterations: int
) -> dict[str, Any]:
    """Return seconds by phase, operations, memory, and the ratio of the first pass; `expected`: of the dry run."""
    device = policy.device
    trainer = Trainer(config, policy, {"prompt": Brightness(0), "identity": Brightness(1)}, dataset)
    cuda = device.type == "cuda"
    runs = [trainer.train_step() for _ in range(iterations)]
    peak = max(run["peak_memory_gib"] for run in runs) if cuda else None
    flops, seconds = sum(expected.flops.values()) - expected.recomputed, runs[-1]["seconds/total"]
    gemm = _matmul_rate(device)
    single = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"micro_batch": 1})})
    rewards = trainer.rewards
    del trainer  # and the moments with it: those of two are more than a GPU may have
    alone = Trainer(single, policy, rewards, dataset, iteration=iterations).train_step()
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "parameters, B": expected.parameters / 1e9,
        "trained parameters, B": expected.trainable / 1e9,
        **{f"seconds: {phase}": runs[-1][f"seconds/{phase}"] for phase in ("rollout", "score", "update", "total")},
        "images per second": runs[-1]["samples_per_second"],
        "operations an iteration, none counted twice, PFLOP": flops / 1e15,
        "operations per second, TFLOP": flops / seconds / 1e12,
        "matrix product of the same run, TFLOP per second": gemm / 1e12,
        "share of it (model-FLOPs utilisation), %": 100 * flops / seconds / gemm,
        "peak memory, GiB": peak,
        "expected peak memory, GiB": expected.peak_bytes / 2**30,
        "first ratio - 1, equal micro-batches": _off(runs),
        "first ratio - 1, micro-batches of 1 in the update": _off([alone]),
        "clip fraction": runs[-1]["clip_fraction"],
    }


def _off(runs: Sequence[dict[str, Any]]) -> float:
    return max(max(abs(run["first_ratio/min"] - 1), abs(run["first_ratio/max"] - 1)) for run in runs)


def _matmul_rate(device: torch.device) -> float:
    """Operations per second of a square bf16 matrix product."""
    side = GEMM_SIDE.get(device.type, 1024)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds[2:])


def _dataset(folder: Path) -> SubjectDataset:
    save_image(torch.rand(3, 64, 64), folder / "toy.png")
    write_metadata(folder, [Sample("toy", "a toy", (folder / "toy.png",))])
    return SubjectDataset.open(folder)


def _config(options: argparse.Namespace) -> Config:
    side = SIDES[options.size]
    how = {
        name: getattr(options, name)
        for name in ("compile", "attention_backend", "quantization", "block_offload", "keep_every")
    }
    rollout = {
        "prompts_per_iteration": options.prompts, "group_size": options.group_size, "num_steps": options.steps,
        "shift": 3.0, "sde": "dance", "eta": 0.4, "subset": {"timestep_fraction": 0.6},
        "micro_batch": options.micro_batch,
    }  # fmt: skip
    policy = {
        "kind": options.kind, "precision": options.precision, "device": options.device, "lora_rank": options.rank,
        "lora_alpha": options.rank,
        "pipeline": {
            "height": side, "width": side, "reference_side": side,
            "gradient_checkpointing": not options.no_checkpointing, **how,
        },
    }  # fmt: skip
    optimizer = {
        "kind": options.optimizer, "learning_rate": 2e-5, "num_minibatches": options.updates,
        "micro_batch": options.micro_batch,
    }  # fmt: skip
    rewards = {"prompt": {"kind": "clip_t", "schedule": "early"}, "identity": {"kind": "dino", "schedule": "late"}}
    return Config.model_validate(
        {
            "policy": policy, "rewards": rewards, "rollout": rollout, "optimizer": optimizer,
            "objective": {"old_log_probs": options.old_log_probs},
        }
    )  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of a training iteration on a large generator.")
    add = parser.add_argument
    add("--kind", default="flux1-kontext", choices=tuple(MODELS), help="family of the generator")
    add("--size", default="full", choices=tuple(SIDES), help="full: the model's own; middle: FLUX.1 of width 128")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", default="bf16", choices=("bf16", "fp32"))
    add("--rank", type=int, default=512, help="rank of the LoRA factors")
    add("--prompts", type=int, default=1, help="prompts an iteration")
    add("--updates", type=int, default=3, help="optimizer steps an iteration")
    add("--group_size", type=int, default=12, help="images of a prompt")
    add("--steps", type=int, default=25, help="denoising steps")
    add("--micro_batch", type=int, default=4, help="images at once, in rollout and update")
    add("--iterations", type=int, default=2, help="iterations, the last of which is timed")
    add("--optimizer", default="adamw", help="optimizer.kind")
    add("--quantization", default="none", help="policy.pipeline.quantization")
    add("--block_offload", action="store_true", help="blocks wait on the host")
    add("--keep_every", type=int, help="policy.pipeline.keep_every")
    add("--no_checkpointing", action="store_true", help="keep all activations")
    add("--compile", action="store_true", help="compile the repeated blocks")
    add("--old_log_probs", default="rollout", help="objective.old_log_probs")
    add("--attention_backend", help="diffusers' attention backend")
    add("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.size == "middle" and options.kind not in ("flux1-kontext", "uno"):
        parser.error("--size middle: of FLUX.1 alone (--kind flux1-kontext or uno)")
    return options


if __name__ == "__main__":
    main()
