"""What one training iteration on a full-size FLUX.1 costs: 12 billion random weights, built on the device, with LoRA.

    python benchmarks/gpu_step.py [--device cuda] [--rank 512] [--micro_batch 4] [--iterations 2] [--json]
    python benchmarks/gpu_step.py --tiny --device cpu        # the same on a tiny transformer

One reference, 512 x 512, G = 12, T = 25, 60 % of the steps trained, 3 updates: the paper's iteration for one prompt.
Seconds are of the last iteration; the first warms up. The share of the peak is against a matrix product measured in the
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

from diffusers import (  # noqa: E402
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)

from customized_grpo.factory.architectures import ARCHITECTURES  # noqa: E402
from customized_grpo.factory.pipelines import MODELS, settings_of  # noqa: E402
from customized_grpo.policies.conditions import ConditionCache  # noqa: E402
from customized_grpo.policies.diffusers_policy import DiffusersPolicy  # noqa: E402
from customized_grpo.policies.pipelines.encoded import EncodedBatch, EncodedPrompt  # noqa: E402
from customized_grpo.policies.pipelines.flux1_kontext import Flux1Kontext  # noqa: E402
from customized_grpo.testing import tiny_pipelines as tiny  # noqa: E402
from customized_grpo.training.dry_run import estimate_pipeline  # noqa: E402
from customized_grpo.training.estimate import Estimate  # noqa: E402

KONTEXT = ARCHITECTURES[MODELS["flux1-kontext"]]
GEMM_SIDE = {"cuda": 8192, "cpu": 1024}


class RandomPolicy(DiffusersPolicy):
    """Whose prompts and references are random numbers in the shapes of encoded ones."""

    row: EncodedPrompt

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
    expected = estimate_pipeline(config, Flux1Kontext(), build_pipeline(options, torch.device("meta")))
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(config, policy, _dataset(Path(folder)), expected, options.iterations)
    if options.json:
        print(json.dumps(figures))
        return
    table = Table(title="one iteration of FLUX.1", title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    Console().print(table)


def build_policy(options: argparse.Namespace, config: Config, device: torch.device) -> RandomPolicy:
    """FLUX.1 with random weights in bf16, built where it runs."""
    torch.manual_seed(0)
    family, pipe = Flux1Kontext(), build_pipeline(options, device)
    settings = settings_of(config.policy, device, config.seed)
    policy = RandomPolicy(family, pipe, ConditionCache(Path("unused"), ""), settings)
    size = policy.size
    example = family.dummy_inputs(pipe.transformer.config, (size,), guided=policy.guided)
    tensors = {name: torch.randn(tensor.shape, dtype=torch.bfloat16) for name, tensor in example.items()}
    policy.row = EncodedPrompt(tensors, (size,))
    return policy


def build_pipeline(options: argparse.Namespace, device: torch.device) -> FluxKontextPipeline:
    """FLUX.1 Kontext without its encoders, on `device`, in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            transformer = tiny.flux_transformer() if options.tiny else FluxTransformer2DModel(**KONTEXT.transformer)
            vae = tiny.flux_vae() if options.tiny else AutoencoderKL(**KONTEXT.vae_settings)
    finally:
        torch.set_default_dtype(torch.float32)
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def measure(
    config: Config, policy: RandomPolicy, dataset: SubjectDataset, expected: Estimate, iterations: int
) -> dict[str, Any]:
    """Seconds by phase, operations, memory, and the ratio of the first pass in bf16; `expected`: of the dry run."""
    device = policy.device
    trainer = Trainer(config, policy, {"prompt": Brightness(0), "identity": Brightness(1)}, dataset)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    runs = [trainer.train_step() for _ in range(iterations)]
    peak = torch.cuda.max_memory_allocated() if cuda else None
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
        "peak memory, GiB": None if peak is None else peak / 2**30,
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
    side = 64 if options.tiny else 512
    rollout = {
        "prompts_per_iteration": options.prompts, "group_size": options.group_size, "num_steps": options.steps,
        "shift": 3.0, "sde": "dance", "eta": 0.4, "subset": {"timestep_fraction": 0.6},
        "micro_batch": options.micro_batch,
    }  # fmt: skip
    policy = {
        "kind": "flux1-kontext", "precision": "bf16", "device": options.device, "lora_rank": options.rank,
        "lora_alpha": options.rank,
        "pipeline": {
            "height": side, "width": side, "reference_side": side, "compile": options.compile,
            "attention_backend": options.attention_backend,
        },
    }  # fmt: skip
    return Config.model_validate(
        {
            "policy": policy,
            "rewards": {
                "prompt": {"kind": "clip_t", "schedule": "early"}, "identity": {"kind": "dino", "schedule": "late"},
            },
            "rollout": rollout,
            "optimizer": {
                "learning_rate": 2e-5, "num_minibatches": options.updates, "micro_batch": options.micro_batch,
            },
        }
    )  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of a training iteration on a full-size FLUX.1.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny transformer and 64 x 64 images")
    parser.add_argument("--rank", type=int, default=512, help="rank of the LoRA factors")
    parser.add_argument("--prompts", type=int, default=1, help="prompts an iteration")
    parser.add_argument("--updates", type=int, default=3, help="optimizer steps an iteration")
    parser.add_argument("--group_size", type=int, default=12, help="images of a prompt")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--micro_batch", type=int, default=4, help="images at once, in rollout and update")
    parser.add_argument("--iterations", type=int, default=2, help="iterations, the last of which is timed")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--attention_backend", help="diffusers' attention backend")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    main()
