"""Run folders as `train` and `evaluate` write them, with made-up but plausible numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from customized_grpo.config.run import Config
from customized_grpo.report import mean_interval

QUADRANTS = ("both_good", "only_prompt", "only_identity", "both_bad")
SCENES = ("on the beach", "in the snow", "in a forest", "under a night sky")
COLOURS = {
    "on the beach": (238, 214, 160),
    "in the snow": (226, 234, 242),
    "in a forest": (94, 140, 84),
    "under a night sky": (36, 38, 78),
}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metric_rows(iterations: int, generator: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for i in range(1, iterations + 1):
        progress = 1 - np.exp(-2.2 * i / iterations)
        quadrants = np.array([0.22 + 0.12 * progress, 0.26, 0.27 - 0.08 * progress, 0.25 - 0.04 * progress])
        quadrants = np.maximum(quadrants + generator.normal(0, 0.02, 4), 0.01)
        quadrants /= quadrants.sum()
        rollout, score, update = np.array([1.1, 0.12, 0.9]) * generator.normal(1, 0.04, 3)
        rows.append(
            {
                "iteration": i,
                "steps": sorted(generator.choice(9, 5, replace=False).tolist()),
                "reward/prompt/mean": 0.57 + 0.2 * progress + generator.normal(0, 0.03),
                "reward/prompt/std": 0.25 - 0.06 * progress,
                "reward/identity/mean": 0.46 + 0.06 * progress + generator.normal(0, 0.02),
                "reward/identity/std": 0.19 - 0.03 * progress,
                **{f"quadrant/{name}": float(v) for name, v in zip(QUADRANTS, quadrants, strict=True)},
                "conflict_rate": float(quadrants[1] + quadrants[2]),
                "invalid_share": 0.0,
                "ratio/mean": 1 + generator.normal(0, 2e-6),
                "ratio/min": 1 - abs(generator.normal(3e-4, 5e-5)),
                "ratio/max": 1 + abs(generator.normal(3e-4, 5e-5)),
                "first_ratio/min": 1 - abs(generator.normal(0, 8e-7)),
                "first_ratio/max": 1 + abs(generator.normal(0, 8e-7)),
                "clip_fraction": 0.3 * progress + abs(generator.normal(0, 0.03)),
                "loss": generator.normal(0, 3e-5),
                "kl": 0.0,
                "grad_norm": 0.5 + 0.2 * progress + abs(generator.normal(0, 0.08)),
                "seconds/rollout": rollout,
                "seconds/score": score,
                "seconds/update": update,
                "seconds/total": rollout + score + update + 0.05,
                "samples_per_second": 72 / (rollout + score + update + 0.05),
            }
        )
    return rows


def evaluation(prompt_share: float, identity_share: float, seed: int, pairs: int) -> dict[str, Any]:
    shared, own = np.random.default_rng(5).random((2, pairs)), np.random.default_rng(seed).random((2, pairs))
    difficulty = 0.75 * shared + 0.25 * own
    prompt_ok, identity_ok = (
        values < np.quantile(values, q) for values, q in zip(difficulty, (prompt_share, identity_share), strict=True)
    )
    records = [
        {
            "id": f"{n:05d}",
            "subject": "moon",
            "prompt": f"a moon {SCENES[n % 4]} wearing a red hat, on the {('left', 'right')[n % 2]}",
            "prompt_satisfied": bool(p),
            "identity_kept": bool(k),
            "joint_success": bool(p and k),
            "reward/prompt": float(0.45 + 0.3 * p + 0.1 * own[0, n]),
            "reward/identity": float(0.4 + 0.2 * k + 0.1 * own[1, n]),
        }
        for n, (p, k) in enumerate(zip(prompt_ok, identity_ok, strict=True))
    ]
    names = ("prompt_satisfied", "identity_kept", "joint_success", "reward/prompt", "reward/identity")
    summary = {
        name: dict(zip(("mean", "low", "high"), mean_interval([r[name] for r in records]), strict=True))
        for name in names
    }
    return {
        "split": "test",
        "pairs": pairs,
        "seed": 0,
        "records": records,
        "summary": summary,
        "chance": {"prompt_satisfied": 0.012, "identity_kept": 0.03, "joint_success": 0.0004},
        "ceiling": {"prompt_satisfied": 0.985, "identity_kept": 0.972, "joint_success": 0.958},
    }


def draw_pictures(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    for n, record in enumerate(records):
        scene = next(s for s in SCENES if s in record["prompt"])
        body = tuple(int(v) for v in np.random.default_rng(n).integers(60, 240, 3))
        for name in ("reference", "base", "tuned"):
            picture = Image.new("RGB", (32, 32), (170, 200, 230) if name == "reference" else COLOURS[scene])
            pen = ImageDraw.Draw(picture)
            left = {"reference": 8, "base": 8}.get(name, 3 if n % 2 == 0 else 13)
            pen.ellipse((left, 9, left + 16, 25), fill=body, outline=(20, 20, 24))
            pen.point([(left + 5, 15), (left + 11, 15)], fill=(0, 0, 0))
            if name == "tuned":
                pen.rectangle((left + 4, 4, left + 12, 9), fill=(200, 30, 40))
            picture.save(folder / f"{record['id']}_{name}.png")


def make_run(folder: Path, iterations: int = 80, pairs: int = 384, pictures: int = 24) -> Path:
    """A complete run folder."""
    generator = np.random.default_rng(0)
    (folder / "evaluation").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(Config(iterations=iterations).model_dump(mode="json"), sort_keys=False)
    )
    write_lines(folder / "metrics.jsonl", metric_rows(iterations, generator))
    checks = []
    for i in range(0, iterations + 1, max(1, iterations // 8)):
        progress = 1 - np.exp(-2.2 * i / iterations)
        prompt, identity = (
            0.52 + 0.24 * progress + generator.normal(0, 0.012),
            0.42 + 0.07 * progress + generator.normal(0, 0.012),
        )
        checks.append(
            {
                "iteration": i,
                "pairs": 96,
                "prompt_satisfied": prompt,
                "identity_kept": identity,
                "joint_success": prompt * identity + 0.02,
                "reward/prompt": 0.64 + 0.2 * progress,
                "reward/identity": 0.5 + 0.06 * progress,
            }
        )
    write_lines(folder / "evaluations.jsonl", checks)
    base, tuned = evaluation(0.53, 0.43, 1, pairs), evaluation(0.74, 0.5, 2, pairs)
    (folder / "evaluation" / "base.json").write_text(json.dumps(base))
    (folder / "evaluation" / "tuned.json").write_text(json.dumps(tuned))
    draw_pictures(folder / "evaluation" / "images", base["records"][:pictures])
    u = 2.5 * np.arange(10)
    weights = np.where(u < 6, 0.7, np.where(u < 22, 0.3 + 0.4 / (1 + np.exp(0.8 * (u - 10))), 0.5))
    s = np.linspace(1, 0, 11)
    (folder / "weights.json").write_text(
        json.dumps(
            {
                "sigmas": (2 * s / (1 + s)).tolist(),
                "weights": np.stack([weights, 1 - weights], 1).tolist(),
            }
        )
    )
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run folder, small enough to render quickly."""
    return make_run(tmp_path / "toybox", iterations=24, pairs=40, pictures=3)
