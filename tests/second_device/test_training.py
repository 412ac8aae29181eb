"""Runs of every family on the second device: nothing meets what lies elsewhere, and results are the CPU's."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from families import EVERY_FAMILY
from PIL import Image
from runs import settings, tree
from safetensors.torch import load_file
from second_device import NAME, NEEDS_DEVICE, counting

from customized_grpo.cli.main import main
from customized_grpo.config.run import Config
from customized_grpo.data import SubjectDataset
from customized_grpo.factory.policy import build_policy
from customized_grpo.factory.rewards import build_rewards
from customized_grpo.tracking.console import Display
from customized_grpo.training.run import train
from customized_grpo.training.trainer import Trainer

pytestmark = NEEDS_DEVICE


def run(names: dict[str, Any], photographs: Path, output: Path, display: Display) -> None:
    """Train two iterations, the second one resumed, with a validation before and after."""
    clip = {"model": str(names["rewards.prompt.clip_t.model"])}
    more = {
        "output": output, "data.path": photographs, "data.validation": photographs, "threads": 1,
        "evaluation.every": 2, "evaluation.num_samples": 2, "evaluation.diversity_prompts": 1,
        "evaluation.diversity_images": 2, "evaluation.metrics": {"clip_i": {"kind": "clip_i", "clip_i": clip}},
    }  # fmt: skip
    for iterations in (1, 2):
        config = Config.model_validate(tree(names | more | {"iterations": iterations}))
        train(config, display, resume=iterations > 1)


@EVERY_FAMILY
def test_a_run_is_the_cpus(
    kind: str, generators: dict[str, Path], models: dict[str, Path], photographs: Path, tmp_path: Path,
    display: Display,
) -> None:  # fmt: skip
    adapters, logs = [], []
    for device in (NAME, "cpu"):
        output = tmp_path / device / "run"
        run(settings(kind, generators, models, output.parent) | {"policy.device": device}, photographs, output, display)
        adapters.append(load_file(output / "pytorch_lora_weights.safetensors"))
        logs.append([json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()])
    found, expected = adapters
    assert found.keys() == expected.keys()
    for name in expected:
        if "lora_B" in name:  # these factors start at 0
            assert (found[name] - expected[name]).norm() <= 0.01 * expected[name].norm(), name
    for ours, theirs in zip(*logs, strict=True):
        assert ours["grad_norm"] > 0 and ours["first_ratio/min"] == pytest.approx(1, abs=1e-6)
        for name, value in theirs.items():
            if not name.startswith(("seconds", "samples_per_second")):
                assert ours[name] == pytest.approx(value, rel=0.01, abs=1e-3), name

    main(
        ["generate", "--run", str(tmp_path / NAME / "run"), "--reference", str(photographs / "1.png"),
         "--prompt", "a toy", "--out", str(tmp_path / "drawn.png")]
    )  # fmt: skip
    assert Image.open(tmp_path / "drawn.png").size[0] > 48


def test_the_host_seldom_waits(
    generators: dict[str, Path], models: dict[str, Path], photographs: Path, tmp_path: Path
) -> None:
    def waits_of(names: dict[str, int]) -> Counter[str]:
        config = Config.model_validate(tree(settings("flux1-kontext", generators, models, tmp_path) | names))
        policy = build_policy(config.policy, config.seed)
        trainer = Trainer(config, policy, build_rewards(config), SubjectDataset.open(photographs))
        for _ in range(2):
            trainer.train_step()  # encodes all prompts, once for all
        with counting() as events:
            trainer.train_step()
        return Counter({event.removeprefix("wait "): n for event, n in events.items() if event.startswith("wait")})

    usual = waits_of({})
    finer = waits_of({"optimizer.micro_batch": 1, "rollout.num_steps": 6})
    assert usual == finer, "the host waits in every micro-batch of the update, or at every step of the rollout"
    assert sum(n for line, n in usual.items() if line.startswith(("trainer.py", "grpo.py"))) == 2  # optimizer steps
