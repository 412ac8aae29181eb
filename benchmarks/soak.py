"""Training that is killed, frozen and told to end at random, again and again, against the same run left alone.

    python benchmarks/soak.py [--minutes N] [--folder DIR] [--seed N] [--processes 1 2] [--json]

An episode is a run of ToyBox in one process or two. It is started with `train --resume` until it is done; meanwhile
its processes get SIGKILL, SIGTERM, or SIGSTOP and later SIGCONT, one of them or all, at random moments. In the end its
weights, their average and its logs are compared, to the bit, with those of a run with the same settings that nobody
touched.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from customized_grpo.toybox.export import export

SETTINGS: dict[str, Any] = {
    "threads": 1,
    "policy": {"precision": "fp32"},
    "rollout": {"prompts_per_iteration": 3, "group_size": 6, "num_steps": 6, "micro_batch": 6},
    "optimizer": {"micro_batch": 6},
    "evaluation": {"every": 4, "num_samples": 4, "gallery": 2},
    "checkpoint": {"every": 3, "keep_last": 2},
    "ema": {"decay": 0.9},
    "distributed": {"check_weights_every": 1, "heartbeat_timeout": 5.0},
}
FAULTS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP")
"""Drawn from; a process that was stopped goes on after a while."""
QUIET, FROZEN = (1.0, 30.0), (1.0, 8.0)
"""Seconds from a start, or a fault, to the next fault, and from SIGSTOP to SIGCONT: bounds of what is drawn. A process
may be frozen for more than `distributed.heartbeat_timeout`: then the others give it up, and the run is started anew."""
MOST = 200
"""Starts of an episode after which it is taken to lead nowhere."""
COMPARED = ("adapter_model.safetensors", "ema/adapter_model.safetensors", "weights.json")
TIMES = ("seconds/", "samples_per_second")


def main() -> None:
    """Run episodes until the time is over; status 1 where one came to another end."""
    options = _options()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = soak(Path(folder), options, draw)
    print(json.dumps(figures) if options.json else "\n".join(f"{name:<28} {value}" for name, value in figures.items()))
    raise SystemExit(figures["episodes"] != figures["equal to the bit"])


def soak(folder: Path, options: argparse.Namespace, draw: random.Random) -> dict[str, Any]:
    """What was done, and how many episodes ended as the runs that were left alone."""
    export(folder / "train", "train", 24)
    faults: Counter[str] = Counter()
    start, episodes, equal, restarts = time.monotonic(), 0, 0, 0
    while time.monotonic() - start < 60 * options.minutes:
        count = options.processes[episodes % len(options.processes)]
        place = folder / f"episode-{episodes}"
        place.mkdir()
        own = {"iterations": options.iterations, "data": {"path": str(folder / "train")}, "seed": episodes}
        (place / "config.yaml").write_text(yaml.safe_dump(SETTINGS | own), encoding="utf-8")
        _ended(_start(place, "alone", count), wanted=0)
        starts = disturbed(place, count, draw, faults)
        difference = compare(place / "alone", place / "disturbed")
        episodes, restarts, equal = episodes + 1, restarts + starts - 1, equal + (difference is None)
        minutes = (time.monotonic() - start) / 60
        found = "equal to the bit" if difference is None else f"another {difference}"
        said = f"{minutes:5.1f} min  episode {episodes}, {count} processes: {starts} starts, {found}"
        print(f"{said}; so far {dict(faults)}", file=sys.stderr)
    return {
        "minutes": round((time.monotonic() - start) / 60, 1),
        "episodes": episodes,
        "equal to the bit": equal,
        "iterations of each": options.iterations,
        "restarts": restarts,
        **dict(sorted(faults.items())),
    }


def disturbed(place: Path, count: int, draw: random.Random, faults: Counter[str]) -> int:
    """Start the run again until it is done, and disturb it all along; returns how often it was started."""
    starts, process = 0, None
    while True:
        if process is None:
            process, starts = _start(place, "disturbed", count), starts + 1
        try:
            if process.wait(draw.uniform(*QUIET)) == 0:
                return starts
            process = None
            if starts == MOST:
                raise SystemExit(f"started {MOST} times, and not done; see {place}")
        except subprocess.TimeoutExpired:
            fault, whom = draw.choice(FAULTS), draw.randrange(count + 1) if count > 1 else 0
            faults[f"{fault} of {_whom(whom, count)}"] += 1
            _strike(process, fault, whom, draw)


def compare(alone: Path, disturbed: Path) -> str | None:
    """The first thing in which two runs differ, None where there is none."""
    galleries = [str(path.relative_to(alone)) for path in sorted((alone / "galleries").iterdir())]
    for name in (*COMPARED, *galleries):
        if (alone / name).read_bytes() != (disturbed / name).read_bytes():
            return name
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        if _rows(alone / log) != _rows(disturbed / log):
            return log
    return None


def _start(place: Path, name: str, count: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "customized_grpo", "train", "--config", str(place / "config.yaml")]
    command += ["--output", str(place / name), "--num_processes", str(count)]
    # In a group of its own, so that all of it can be killed at once.
    command += ["--resume"] if (place / name / "config.yaml").is_file() else []
    with (place / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _strike(process: "subprocess.Popen[bytes]", fault: str, whom: int, draw: random.Random) -> None:
    """`whom`: 0 all of the run's processes, otherwise the one of that number from 1."""
    number = getattr(signal, fault)
    children = _children(process.pid)
    if whom and whom <= len(children):
        _send(children[whom - 1], number)
    elif fault == "SIGTERM":
        _send(process.pid, number)  # as a scheduler does: the launcher passes it on
    else:
        os.killpg(process.pid, number)
    if fault == "SIGSTOP":
        time.sleep(draw.uniform(*FROZEN))
        os.killpg(process.pid, signal.SIGCONT)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended meanwhile


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.is_file() else []


def _ended(process: "subprocess.Popen[bytes]", wanted: int) -> None:
    if (status := process.wait()) != wanted:
        raise SystemExit(f"a run that nobody touched ended with status {status}, expected {wanted}")


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def _whom(whom: int, count: int) -> str:
    return "one process of two" if whom else ("both processes" if count > 1 else "the process")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="an episode begun before goes on to its end")
    parser.add_argument("--iterations", type=int, default=16, help="of an episode")
    parser.add_argument("--folder", type=Path, help="where the runs go; default: the system's folder for such")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of the episodes, in turn")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
