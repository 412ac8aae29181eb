"""Samples a second of two processes against one, each on a core of its own, in one run.

    python benchmarks/ranks_throughput.py [--folder DIR] [--iterations N] [--processes N] [--json]

Both train ToyBox on the same groups with one thread a process, in turn, so that a slow spell of the machine falls on
both. The ideal ratio is the number of processes; what is lost is the exchange of gradients, waiting for the slower, and
what the processes share of a machine: memory bandwidth, caches, turbo.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from customized_grpo.toybox.export import export

SETTINGS: dict[str, Any] = {
    "threads": 1,
    "rollout": {"prompts_per_iteration": 4, "micro_batch": 24},
    "optimizer": {"micro_batch": 24},
    "evaluation": {"every": 1000, "num_samples": 2, "gallery": 1},
    "checkpoint": {"every": 1000},
}
"""As the recipe `toybox`, but groups that two processes share evenly, and nothing but iterations."""
ROUNDS = 2


def main() -> None:
    """Measure, and print the figures."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = Path(folder)
        export(place / "train", "train", 24)
        seconds: dict[int, list[float]] = {1: [], options.processes: []}
        for turn in range(ROUNDS):
            for count in seconds:
                seconds[count] += measure(place / f"{count}-{turn}", place / "train", options.iterations, count)
    one, several = (statistics.median(seconds[count]) for count in (1, options.processes))
    figures = {
        "processes": options.processes,
        "seconds of an iteration, one process": one,
        "seconds of an iteration, several": several,
        "ratio of throughput": one / several,
        "share of the ideal": one / several / options.processes,
    }
    print(
        json.dumps(figures) if options.json else "\n".join(f"{name:<40} {value:.4g}" for name, value in figures.items())
    )


def measure(output: Path, data: Path, iterations: int, count: int) -> list[float]:
    """Seconds of each iteration but the first, of a run in `count` processes."""
    config = output.with_suffix(".yaml")
    settings = SETTINGS | {"iterations": iterations + 1, "output": str(output), "data": {"path": str(data)}}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "customized_grpo", "train", "--config", str(config), "--num_processes", str(count)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["seconds/total"] for row in rows[1:]]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the runs go; default: the system's folder for such")
    parser.add_argument("--iterations", type=int, default=5, help="measured, of each of two runs")
    parser.add_argument("--processes", type=int, default=2, help="held against one")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
