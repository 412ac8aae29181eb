"""Grids of run folders as `compare` leaves them, with made-up but plausible numbers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from customized_grpo.compare.runs import Cell

SCENES = {
    "on the beach": (238, 214, 160),
    "in the snow": (226, 234, 242),
    "in a forest": (94, 140, 84),
    "under a night sky": (36, 38, 78),
}
LEVELS = {
    "base": (0.50, 0.42, 0.16),
    "naive-1:1": (0.46, 0.55, 0.33),
    "naive-1:1.5": (0.41, 0.58, 0.38),
    "sars": (0.58, 0.53, 0.26),
    "tdw": (0.63, 0.52, 0.22),
    "customized": (0.72, 0.55, 0.17),
    "customized-published": (0.60, 0.53, 0.25),
    "customized-calibrated": (0.74, 0.56, 0.16),
    "min": (0.57, 0.47, 0.24),
    "max": (0.43, 0.52, 0.36),
    "harmonic": (0.56, 0.50, 0.25),
    "product": (0.59, 0.51, 0.24),
    "gdpo": (0.48, 0.55, 0.31),
    "hinge": (0.61, 0.49, 0.21),
}
"""Shares of prompt satisfied, identity kept, copied."""
MakeGrid = Callable[..., list[Cell]]
PRESETS = tuple(name for name in LEVELS if name != "base")


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def dump_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluation(levels: Sequence[float], generator: np.random.Generator, pairs: int, copied: bool) -> dict[str, Any]:
    difficulty = 0.7 * np.random.default_rng(5).random((3, pairs)) + 0.3 * generator.random((3, pairs))
    verdicts = [values < np.quantile(values, level) for values, level in zip(difficulty, levels, strict=True)]
    records = [
        {
            "id": f"test-{n:05d}",
            "subject": "moon",
            "prompt": f"a moon {list(SCENES)[n % 4]} wearing a red hat, on the {('left', 'right')[n % 2]}",
            "prompt_satisfied": bool(prompt),
            "identity_kept": bool(identity),
            "joint_success": bool(prompt and identity),
            **({"copied": bool(copy), "copy_score": 0.9 if copy else 0.1} if copied else {}),
            "reward/prompt": float(0.62 + 0.25 * prompt + 0.1 * difficulty[0, n]),
            "reward/identity": float(0.45 + 0.2 * identity + 0.1 * difficulty[1, n]),
        }
        for n, (prompt, identity, copy) in enumerate(zip(*verdicts, strict=True))
    ]
    return {"split": "test", "pairs": pairs, "seed": 0, "records": records, "summary": {}}


def draw_pictures(folder: Path, records: Sequence[dict[str, Any]], shift: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n, record in enumerate(records):
        scene = next(colour for name, colour in SCENES.items() if name in record["prompt"])
        body = tuple(int(v) for v in np.random.default_rng(n).integers(60, 240, 3))
        for name in ("reference", "base", "tuned"):
            picture = Image.new("RGB", (32, 32), (170, 200, 230) if name == "reference" else scene)
            pen = ImageDraw.Draw(picture)
            left = {"reference": 8, "base": 9}.get(name, 4 + shift)
            pen.ellipse((left, 9, left + 16, 25), fill=body, outline=(20, 20, 24))
            pen.point([(left + 5, 15), (left + 11, 15)], fill=(0, 0, 0))
            if name == "tuned" and record["prompt_satisfied"]:
                pen.rectangle((left + 4, 4, left + 12, 9), fill=(200, 30, 40))
            picture.save(folder / f"{record['id']}_{name}.png")


def make_run(
    cell: Cell, *, iterations: int = 60, pairs: int = 384, pictures: int = 12, boost: float = 0.0, copied: bool = True,
    best: int | None = None,
) -> None:  # fmt: skip
    """A finished run, its numbers scattered by its seed; `boost` moves prompt satisfied after training, `best` is the
    iteration of a best adapter that it kept."""
    generator = np.random.default_rng([cell.seed, sum(map(ord, cell.setting + cell.preset))])
    start, end = np.array(LEVELS["base"]), np.array(LEVELS.get(cell.preset, LEVELS["customized"]))
    end = np.clip(end + generator.normal(0, 0.02, 3) + (boost, 0, -boost / 2), 0.02, 0.98)
    base = evaluation(start, np.random.default_rng(cell.seed), pairs, copied)
    tuned = evaluation(end, generator, pairs, copied)
    dump(cell.folder / "evaluation" / "base.json", base)
    tuned["summary"] = {"texture": {"mean": 1.2 + 0.01 * cell.seed}} if best is not None else {}
    dump(cell.folder / "evaluation" / "tuned.json", tuned)
    if best is not None:
        dump(cell.folder / "best" / "best.json", {"iteration": best})
        better = evaluation(np.clip(end + np.array((0.05, 0, -0.02)), 0.02, 0.98), generator, pairs, copied)
        dump(cell.folder / "evaluation" / "best.json", better | {"summary": {"texture": {"mean": 1.1}}})
    draw_pictures(cell.folder / "evaluation" / "images", tuned["records"][:pictures], cell.seed + len(cell.preset) % 8)
    metrics, checks = [], []
    for i in range(1, iterations + 1):
        conflict = 0.5 - 0.1 * (i / iterations) * (end[0] - 0.3) + generator.normal(0, 0.02)
        good = (1 - conflict) * 0.54
        metrics.append(
            {
                "iteration": i,
                "quadrant/both_good": good,
                "quadrant/only_prompt": conflict * 0.48,
                "quadrant/only_identity": conflict * 0.52,
                "quadrant/both_bad": 1 - conflict - good,
                "conflict_rate": conflict,
                "seconds/total": 3.1 + generator.normal(0, 0.1),
            }
        )
    for i in range(0, iterations + 1, 10):
        now = start + (end - start) * (1 - np.exp(-3 * i / iterations)) + generator.normal(0, 0.015, 3)
        check = {"prompt_satisfied": now[0], "identity_kept": now[1], "joint_success": now[0] * now[1]}
        check |= {"copied": now[2]} if copied else {}
        check |= {"reward/prompt": 0.62 + 0.3 * now[0], "reward/identity": 0.45 + 0.25 * now[1]}
        check |= {"held_out_gain": now[0] - start[0]} if best is not None else {}
        checks.append({"iteration": i, "pairs": 96, **check})
    dump_lines(cell.folder / "metrics.jsonl", metrics)
    dump_lines(cell.folder / "evaluations.jsonl", checks)
    (cell.folder / "report.html").write_text("a report")


def make_cells(
    folder: Path, presets: Sequence[str] = PRESETS, seeds: int = 3, settings: Sequence[str] = ("",)
) -> list[Cell]:
    return [
        Cell(setting, preset, seed, folder / "runs" / f"{setting}{preset.replace(':', '-')}-seed{seed}")
        for seed in range(seeds)
        for setting in settings
        for preset in presets
    ]


@pytest.fixture
def small_grid(tmp_path: Path) -> MakeGrid:
    """Makes a grid of small finished runs: small_grid(presets, seeds, settings, **options of make_run)."""

    def make(presets: Sequence[str], seeds: int, settings: Sequence[str] = ("",), **options: Any) -> list[Cell]:
        cells = make_cells(tmp_path, presets, seeds, settings)
        for cell in cells:
            make_run(cell, **{"iterations": 20, "pairs": 48, "pictures": 2} | options)
        return cells

    return make


@pytest.fixture
def grid(small_grid: MakeGrid) -> list[Cell]:
    """Three presets x three seeds; the last run, customized with seed 2, is not finished."""
    cells = small_grid(("naive-1:1", "naive-1:1.5", "customized"), 3)
    (cells[-1].folder / "report.html").unlink()
    return cells
