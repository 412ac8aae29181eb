"""What saving a checkpoint in each iteration costs, with the settings of the recipe toybox, in one run.

    python benchmarks/checkpoint_cost.py [--folder DIR] [--iterations N] [--threads N] [--json]
    python benchmarks/checkpoint_cost.py --gigabytes 14.4 [--folder DIR] [--json]

The second form saves one checkpoint of that size, about that of LoRA factors of rank 512 on FLUX.1 with their moments:
the seconds of grace that a run of such a size needs after SIGTERM, but for those of a micro-batch.

An iteration and the save after it are measured in turn, so that a slow spell of the machine falls on both. A save is
what a run does: tensors, hash, manifest, fsync, rename, and the removal of the oldest.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import yaml
from torch import nn

from customized_grpo.config.recipes import find_recipe
from customized_grpo.config.run import Config
from customized_grpo.factory.data import load_dataset
from customized_grpo.factory.policy import build_policy
from customized_grpo.factory.rewards import build_rewards
from customized_grpo.runtime.device import configure
from customized_grpo.toybox.export import export
from customized_grpo.training.checkpoint import State, prune_checkpoints, save_checkpoint
from customized_grpo.training.ema import EMA
from customized_grpo.training.resume import resume_fingerprint
from customized_grpo.training.snapshot import Snapshot
from customized_grpo.training.trainer import Trainer

SETTINGS = find_recipe("toybox")
PAIRS = 24
"""Pairs in the benchmark's data folder."""
LAYERS = 50
DECAY = 0.9
GOAL = 0.05


def main() -> None:
    """Measure, and print the figures."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.gigabytes:
            figures = measure_size(Path(folder), options.gigabytes)
        else:
            figures = measure(Path(folder), options.iterations, options.threads)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:<32} {value:.4g}")
    if not options.gigabytes:
        print(f"goal: a save in each iteration costs less than {GOAL:.0%} of it")


def measure_size(folder: Path, gigabytes: float) -> dict[str, float]:
    """Copy a trained state of this size, as each iteration does, and save it from the copy."""
    numbers = int(gigabytes * 1e9 / 12 / LAYERS)  # a weight in fp32 and its two moments
    parameters = [(f"layer{n}", nn.Parameter(torch.randn(numbers))) for n in range(LAYERS)]
    optimizer = torch.optim.AdamW([parameter for _, parameter in parameters], foreach=False)
    for _, parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    snapshot = Snapshot(State(parameters, optimizer))
    snapshot.take(1)  # memory is allocated once
    start = time.perf_counter()
    snapshot.take(1)
    middle = time.perf_counter()
    save_checkpoint(folder / "checkpoints", 1, {}, snapshot.tensors())
    end = time.perf_counter()
    size = sum(tensor.nbytes for tensor in snapshot.tensors().values())
    return {
        "size of a checkpoint, GB": size / 1e9,
        "seconds of a copy": middle - start,
        "seconds of a save": end - middle,
        "GB a second": size / 1e9 / (end - middle),
    }


def measure(folder: Path, iterations: int, threads: int | None) -> dict[str, float]:
    """Medians over `iterations`, a first one left out; the averaged weights are saved too."""
    data = folder / "train"
    export(data, "train", PAIRS)
    settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8")) | {"checkpoint": {"every": 1}}
    config = Config.model_validate(settings | {"data": {"path": data}, "threads": threads})
    configure(config.threads)
    policy = build_policy(config.policy, config.seed)
    trainer = Trainer(config, policy, build_rewards(config), load_dataset(data, config, policy))
    average = EMA(policy.trainable_parameters(), DECAY)
    state = State(list(policy.trainable_parameters()), trainer.optimizer, average)
    fields = resume_fingerprint(config, {})
    trained, saved = [], []
    for _ in range(iterations + 1):
        start = time.perf_counter()
        trainer.train_step()
        average.update(trainer.iteration)
        middle = time.perf_counter()
        save_checkpoint(folder / "checkpoints", trainer.iteration, fields, state.tensors())
        prune_checkpoints(folder / "checkpoints", trainer.iteration, config.checkpoint.keep_last, None)
        trained.append(middle - start)
        saved.append(time.perf_counter() - middle)
    seconds, save = statistics.median(trained[1:]), statistics.median(saved[1:])
    return {
        "threads": torch.get_num_threads(),
        "size of a checkpoint, MB": sum(tensor.nbytes for tensor in state.tensors().values()) / 1e6,
        "seconds of an iteration": seconds,
        "seconds of a save": save,
        "seconds of the slowest save": max(saved[1:]),
        "save / iteration, %": 100 * save / seconds,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a checkpoint in each iteration costs.")
    parser.add_argument("--folder", type=Path, help="where to save; default: the system's temporary folder")
    parser.add_argument("--iterations", type=int, default=10, help="iterations measured (default: %(default)s)")
    parser.add_argument("--gigabytes", type=float, help="measure one save of so many gigabytes instead")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.gigabytes is not None and not options.gigabytes > 0:
        parser.error(f"--gigabytes must be more than 0, not {options.gigabytes}")
    if options.iterations < 1:
        parser.error(f"--iterations must be 1 or more, not {options.iterations}")
    return options


if __name__ == "__main__":
    main()
