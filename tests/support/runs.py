"""Settings of a run on the second device."""

from pathlib import Path
from typing import Any

from second_device import NAME

from customized_grpo.config.run import set_dotted


def tree(dotted: dict[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, value in dotted.items():
        set_dotted(root, name, str(value) if isinstance(value, Path) else value)
    return root


def settings(kind: str, generators: dict[str, Path], models: dict[str, Path], folder: Path) -> dict[str, Any]:
    """A run on the second device, by dotted names."""
    return {
        "policy.kind": kind, "policy.device": NAME, "policy.precision": "fp32", "policy.lora_rank": 4,
        "policy.lora_alpha": 4, "policy.pipeline.model": generators[kind], "policy.pipeline.cache": folder / "cache",
        "policy.pipeline.height": 32, "policy.pipeline.width": 48, "policy.pipeline.reference_side": 32,
        "rewards.prompt.kind": "clip_t", "rewards.prompt.schedule": "early",
        "rewards.prompt.clip_t.model": models["clip"],
        "rewards.identity.kind": "dino", "rewards.identity.schedule": "late",
        "rewards.identity.dino.model": models["dino"],
        "rollout.num_steps": 3, "rollout.group_size": 3, "rollout.prompts_per_iteration": 2, "rollout.micro_batch": 3,
        "rollout.eta": 0.4, "optimizer.micro_batch": 3, "optimizer.num_minibatches": 2, "ema.decay": 0.9,
        "objective.kl_weight": 0.01,
    }  # fmt: skip
