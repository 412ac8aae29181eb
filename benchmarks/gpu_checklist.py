"""All that wants a GPU, in calls of under ten minutes each; prints a row of docs/models.md as each is done.

    python benchmarks/gpu_checklist.py                      # all of them, one after the other
    python benchmarks/gpu_checklist.py flux1 klein          # some of them
    python benchmarks/gpu_checklist.py --list

Results are added to runs/gpu_checklist.jsonl, so that a list that was cut off goes on where it stopped. Weights are
random, and rewards cost nothing: nothing is downloaded. A call that fails says why and does not stop the others.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent
LIMIT = 600
"""Seconds of a call."""
SHORT = ["--group_size", "8", "--steps", "10", "--updates", "1", "--rank", "64", "--json"]
CALLS = {
    "flux1": [],
    "flux1-rank-512": ["--rank", "512"],
    "flux1-rank-512-adamw-8bit": ["--rank", "512", "--optimizer", "adamw_8bit"],
    "flux1-compiled": ["--compile"],
    "flux1-compiled-recomputed": ["--compile", "--old_log_probs", "recomputed"],
    "flux1-native-flash": ["--attention_backend", "_native_flash"],
    "flux1-native-cudnn": ["--attention_backend", "_native_cudnn"],
    "flux1-micro-batch-1": ["--micro_batch", "1"],
    "flux1-half-kept": ["--keep_every", "2"],
    "flux1-int8": ["--quantization", "int8"],
    "flux1-fp8": ["--quantization", "fp8"],
    "flux1-nf4": ["--quantization", "nf4"],
    "flux1-blocks-wait": ["--block_offload"],
    "flux1-int8-blocks-wait": ["--quantization", "int8", "--block_offload"],
    "klein": ["--kind", "flux2-klein"],
    "klein-compiled": ["--kind", "flux2-klein", "--compile"],
    "qwen": ["--kind", "qwen-image-edit-plus", "--micro_batch", "2"],
    "qwen-nf4": ["--kind", "qwen-image-edit-plus", "--micro_batch", "2", "--quantization", "nf4"],
}
"""Options of generator_step.py beside SHORT, by name."""
COLUMNS = {
    "seconds": "seconds: total",
    "rollout": "seconds: rollout",
    "update": "seconds: update",
    "peak, GiB": "peak memory, GiB",
    "expected, GiB": "expected peak memory, GiB",
    "MFU, %": "share of it (model-FLOPs utilisation), %",
    "ratio - 1": "first ratio - 1, equal micro-batches",
    "ratio - 1, micro-batches of 1": "first ratio - 1, micro-batches of 1 in the update",
}
"""Of a row: its heading, and the figure of generator_step.py."""


def main() -> None:
    """Run what was asked for and is not done, and print a row of each."""
    options = _options()
    if options.list:
        print("\n".join(f"{name}: {' '.join(CALLS[name]) or 'as the recipe'}" for name in CALLS))
        return
    done = _done(options.results)
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}", flush=True)
    failed = False
    for name in options.names or CALLS:
        figures = done.get(name) or _measure(name, options)
        failed |= figures is None
        if figures is not None:
            print(f"| {name} | {' | '.join(_cell(figures[key]) for key in COLUMNS.values())} |", flush=True)
    sys.exit(int(failed))


def _measure(name: str, options: argparse.Namespace) -> dict[str, object] | None:
    """Run one call and keep its figures; None, and why on stderr, where it fails."""
    where = ["--size", options.size, "--device", options.device]
    command = [sys.executable, str(ROOT / "generator_step.py"), *SHORT, *where, *CALLS[name]]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name}: not done after {LIMIT} s", file=sys.stderr, flush=True)
        return None
    if result.returncode != 0:
        last = result.stderr.strip().splitlines()[-1:] or [f"ended with {result.returncode}"]
        print(f"{name}: {last[0]}", file=sys.stderr, flush=True)
        return None
    figures: dict[str, object] = json.loads(result.stdout)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"name": name, **figures}) + "\n")
    return figures


def _done(results: Path) -> dict[str, dict[str, object]]:
    if not results.is_file():
        return {}
    return {row.pop("name"): row for row in map(json.loads, results.read_text(encoding="utf-8").splitlines())}


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="All that wants a GPU, call by call.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="calls to make; none: all")
    parser.add_argument("--list", action="store_true", help="name the calls and what they set")
    parser.add_argument("--size", default="full", choices=("full", "tiny"), help="tiny: a trial of the list itself")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=Path("runs/gpu_checklist.jsonl"))
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in CALLS]:
        parser.error(f"no call {', '.join(unknown)}; expected {', '.join(CALLS)}")
    return options


if __name__ == "__main__":
    main()
