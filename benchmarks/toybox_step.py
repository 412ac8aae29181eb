"""What one training iteration on ToyBox costs, in one run of about two minutes.

    python benchmarks/toybox_step.py [--weights DIR] [--threads N] [--repeats N] [--json]

Seconds are medians of the repeats after a warm-up; things to be compared are measured in turn, so that a slow spell of
the machine falls on both.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from customized_grpo.config.rollout import RolloutConfig, WindowConfig
from customized_grpo.config.run import Config
from customized_grpo.factory.data import load_dataset
from customized_grpo.factory.policy import build_policy
from customized_grpo.factory.rewards import build_rewards
from customized_grpo.policies.policy import Policy
from customized_grpo.rewards.reward import Reward
from customized_grpo.runtime.device import configure
from customized_grpo.toybox.export import export
from customized_grpo.toybox.network import Context
from customized_grpo.training.rollout import plan_steps, sample_groups
from customized_grpo.training.trainer import Trainer
from customized_grpo.types import PromptBatch

GEMM_SIDE = 2048
WINDOW_START, WINDOW_SIZE = 4, 4
GROUP_SIZES = (12, 24, 48)
PAIRS = 24
"""Pairs in the benchmark's data folder."""


@dataclass(frozen=True)
class Figure:
    """One measurement; `goal` in words, and whether it is met, where there is one."""

    name: str
    value: float
    unit: str = ""
    goal: str = ""
    met: bool | None = None


def main() -> None:
    """Measure everything and print it."""
    options = _options()
    configure(options.threads)
    if options.peak_of_group is not None:
        print(_peak_megabytes(_trainer(options, options.data, group_size=options.peak_of_group)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.data = Path(folder) / "train"
        export(options.data, "train", PAIRS)
        sections = {
            "one iteration": measure_iteration(_trainer(options, options.data), options.repeats),
            "batching": measure_batching(_trainer(options, options.data), options.repeats),
            "shared prefix": measure_prefix(_trainer(options, options.data), options.repeats),
            "peak memory": measure_memory(options),
        }
    if options.json:
        measured = {title: [vars(figure) for figure in figures] for title, figures in sections.items()}
        print(json.dumps({"threads": torch.get_num_threads(), **measured}))
    else:
        _show(sections)


def measure_iteration(trainer: Trainer[Context], repeats: int) -> list[Figure]:
    """Seconds by phase, throughput, and the share of what the processor's matrix products could do."""
    trainer.train_step()
    with FlopCounterMode(display=False) as counter:
        trainer.train_step()
    runs = [trainer.train_step() for _ in range(repeats)]
    seconds = {
        phase: statistics.median(run[f"seconds/{phase}"] for run in runs)
        for phase in ("rollout", "score", "update", "total")
    }
    rollout = trainer.config.rollout
    samples = rollout.prompts_per_iteration * rollout.group_size
    flops = counter.get_total_flops()
    dtype = torch.bfloat16 if trainer.config.policy.precision == "bf16" else torch.float32
    peak = _matmul_peak(dtype, repeats)
    return [
        Figure("samples", samples),
        Figure("seconds: rollout", seconds["rollout"], "s"),
        Figure("seconds: score", seconds["score"], "s"),
        Figure("seconds: update", seconds["update"], "s"),
        Figure("seconds: total", seconds["total"], "s", "<= 2.5 s", seconds["total"] <= 2.5),
        Figure("samples per second", samples / seconds["total"]),
        Figure("forward evaluations: rollout", runs[-1]["forwards"]),
        Figure("forward and backward evaluations: update", samples * len(runs[-1]["steps"])),
        Figure("arithmetic, backward included", flops / 1e9, "GFLOP"),
        Figure("arithmetic per second", flops / seconds["total"] / 1e9, "GFLOP/s"),
        Figure(f"matmul peak, {GEMM_SIDE}^3 in {trainer.config.policy.precision}", peak / 1e9, "GFLOP/s"),
        Figure("share of the matmul peak", 100 * flops / seconds["total"] / peak, "%"),
    ]


def measure_batching(trainer: Trainer[Context], repeats: int) -> list[Figure]:
    """Sampling and scoring all groups in batches, against one image at a time."""
    policy, rollout = trainer.policy, trainer.config.rollout
    batch, condition = _encoded(trainer)

    def batched() -> torch.Tensor:
        images = _sample(policy, condition, rollout)
        _score(trainer.rewards, images, batch)
        return images

    def one_by_one() -> torch.Tensor:
        images = _sample(policy, condition, rollout.model_copy(update={"micro_batch": 1}))
        for index, group in enumerate(images):
            alone = PromptBatch([batch.prompts[index]], batch.references[index : index + 1], None)
            for image in group:
                _score(trainer.rewards, image[None, None], alone)
        return images

    distance = float((batched() - one_by_one()).abs().max())
    fast, slow = _median_seconds(repeats, batched, one_by_one)
    return [
        Figure(f"in batches of {rollout.micro_batch}", fast, "s"),
        Figure("one image at a time", slow, "s"),
        Figure("times faster", slow / fast, "x", ">= 3 x", slow / fast >= 3),
        Figure("largest difference of a pixel, of 1", distance),
    ]


def measure_prefix(trainer: Trainer[Context], repeats: int) -> list[Figure]:
    """Window rollouts whose groups walk the deterministic steps before the window as one, against each sample alone.

    The predicted saving is the share of forward evaluations that fall away.
    """
    policy = trainer.policy
    window = {"trained_steps": "window", "window": WindowConfig(start=WINDOW_START, size=WINDOW_SIZE)}
    shared = trainer.config.rollout.model_copy(update={**window, "same_initial_noise": True})
    alone = shared.model_copy(update={"same_initial_noise": False})
    _, condition = _encoded(trainer)
    with_prefix, without = _median_seconds(
        repeats, lambda: _sample(policy, condition, shared), lambda: _sample(policy, condition, alone)
    )
    groups, steps = shared.prompts_per_iteration, shared.num_steps
    samples = groups * shared.group_size
    forwards = groups * WINDOW_START + samples * (steps - WINDOW_START)
    predicted = 1 - forwards / (samples * steps)
    saved = 1 - with_prefix / without
    return [
        Figure("forward evaluations: shared", forwards),
        Figure("forward evaluations: each alone", samples * steps),
        Figure("seconds: shared", with_prefix, "s"),
        Figure("seconds: each alone", without, "s"),
        Figure("predicted saving", 100 * predicted, "%"),
        Figure("measured saving", 100 * saved, "%"),
        Figure("measured of predicted", 100 * saved / predicted, "%", ">= 90 %", saved >= 0.9 * predicted),
    ]


def measure_memory(options: argparse.Namespace) -> list[Figure]:
    """Peak resident memory of a process that does one iteration, at a fixed micro-batch, by group size."""
    peaks = []
    for group_size in GROUP_SIZES:
        command = [sys.executable, __file__, "--peak-of-group", str(group_size), "--data", str(options.data)]
        command += ["--weights", str(options.weights)] if options.weights else []
        command += ["--threads", str(options.threads)] if options.threads else []
        peaks.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    growth = peaks[-1] / peaks[0] - 1
    return [Figure(f"group size {size}", peak, "MB") for size, peak in zip(GROUP_SIZES, peaks, strict=True)] + [
        Figure("growth, trajectories included", 100 * growth, "%", "<= 10 %", growth <= 0.1)
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what one training iteration on ToyBox costs.")
    parser.add_argument("--weights", type=Path, help="folder of ToyBox weights; default: the shipped ones")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--repeats", type=int, default=5, help="repeats whose median is taken (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--peak-of-group", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats must be 1 or more, not {options.repeats}")
    return options


def _trainer(options: argparse.Namespace, data: Path, **rollout: Any) -> Trainer[Context]:
    settings = {"policy": {"toybox": {"weights": options.weights}}, "data": {"path": data}, "rollout": rollout}
    config = Config.model_validate({**settings, "threads": options.threads})
    policy = build_policy(config.policy, config.seed)
    return Trainer(config, policy, build_rewards(config), load_dataset(data, config, policy))


def _encoded(trainer: Trainer[Context]) -> tuple[PromptBatch, Context]:
    """An iteration's worth of prompts and references, and what the policy makes of them."""
    samples = list(trainer.dataset)[: trainer.config.rollout.prompts_per_iteration]
    references = trainer.dataset.references(samples, trainer.policy.prepare_reference)
    batch = PromptBatch([sample.prompt for sample in samples], references, None)
    return batch, trainer.policy.encode(batch.prompts, references)


def _sample(policy: Policy[Context], condition: Context, config: RolloutConfig) -> torch.Tensor:
    plan = plan_steps(config, policy.sigmas(config.num_steps, config.shift), seed=0, iteration=0)
    rollout = sample_groups(policy, condition, config.prompts_per_iteration, plan, config, seed=0, iteration=0)
    return rollout.images


def _score(rewards: Mapping[str, Reward], images: torch.Tensor, batch: PromptBatch) -> None:
    for reward in rewards.values():
        reward.score(images, batch)


def _median_seconds(repeats: int, *actions: Callable[[], object]) -> list[float]:
    """The median time of each action, all run once to warm up and then in turn."""
    seconds: list[list[float]] = [[] for _ in actions]
    for turn in range(repeats + 1):
        for action, taken in zip(actions, seconds, strict=True):
            start = time.perf_counter()
            action()
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def _matmul_peak(dtype: torch.dtype, repeats: int) -> float:
    """FLOP per second of a large matrix product, the best of the repeats."""
    a, b = torch.randn(2, GEMM_SIDE, GEMM_SIDE).to(dtype)
    best = float("inf")
    for _ in range(max(repeats, 3)):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return float(2 * GEMM_SIDE**3 / best)


def _peak_megabytes(trainer: Trainer[Context]) -> float:
    trainer.train_step()
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: on Linux a new process inherits that of the one that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _show(sections: dict[str, list[Figure]]) -> None:
    table = Table(title=f"ToyBox, {torch.get_num_threads()} threads", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("goal")
    for title, figures in sections.items():
        table.add_row(f"[bold]{title}")
        for figure in figures:
            value = f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.3g}"
            verdict = {None: "", True: " [green]met", False: " [red]missed"}[figure.met]
            table.add_row(f"  {figure.name}", f"{value} {figure.unit}".strip(), figure.goal + verdict)
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
