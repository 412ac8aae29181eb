"""Names that fields had before version 0.1.0, so that an old file or option is answered with the new name."""

import re

_PIPELINE = (
    "model", "base_adapter", "height", "width", "reference_side", "gradient_checkpointing", "compile",
    "attention_backend", "cache", "cache_limit",
)  # fmt: skip

RENAMED = {
    "policy.weights": "policy.toybox.weights",
    "policy.adapter": "policy.toybox.adapter",
    **{f"policy.{name}": f"policy.pipeline.{name}" for name in _PIPELINE},
    "policy.guidance": "policy.pipeline.guidance_scale",
    "policy.offload": "policy.pipeline.text_encoders (false is now free, and true cpu)",
    "policy.shard": "policy.pipeline.fsdp",
    "rewards.prompt_model": "rewards.hpsv3.model (or clip_t, ...: the section of the reward's kind), and "
    "rewards.remote.prompt_url of a remote reward",
    "rewards.identity_model": "rewards.dino.model (or clip_i: the section of the reward's kind), and "
    "rewards.remote.identity_url of a remote reward",
    "rewards.identity_leak": "rewards.toybox.identity_leak",
    "rewards.several_references": "rewards.dino.several_references, or rewards.clip_i.several_references",
    "rewards.background": "rewards.dino.background, or rewards.clip_i.background",
    **{f"rewards.{name}": f"rewards.local.{name}" for name in ("device", "precision", "micro_batch")},
    "rewards.deadline": "rewards.remote.timeout, or rewards.vlm_judge.timeout",
    "rollout.initial_noise": "rollout.same_initial_noise (shared is now true, and separate false)",
    "rollout.steps": "rollout.trained_steps",
    "rollout.subset_share": "rollout.subset.timestep_fraction",
    "rollout.window_size": "rollout.window.size",
    "rollout.window_start": "rollout.window.start",
    "rollout.window_period": "rollout.window.period",
    "advantages.normalise": "advantages.normalize",
    "advantages.gamma": "advantages.sars.gamma",
    "advantages.gamma_penalty": "advantages.sars.gamma_penalty",
    "advantages.clamp": "advantages.clip",
    "optimizer.updates_per_iteration": "optimizer.num_minibatches",
    "evaluation.pairs": "evaluation.num_samples",
    "evaluation.test_pairs": "evaluation.num_test_samples",
    "ranks": "distributed",
    "ranks.check_every": "distributed.check_weights_every",
    "ranks.silence": "distributed.heartbeat_timeout",
    # Of `evaluate`:
    "pairs": "num_samples",
    "guidance": "guidance_scale",
    "metrics.hpsv3_weights": "metrics.hpsv3.model",
}
"""{old dotted name: the new one, with what became of its values}."""
GRID = "train."
"""Where the file of a comparison holds the fields of a run."""


def describe_rename(name: str) -> str | None:
    """Return a sentence with the new name of the field or option `name`, None if it was not renamed."""
    prefix = GRID if name.startswith(GRID) else ""
    new = RENAMED.get(name.removeprefix(prefix))
    return None if new is None else f"{name} is now {prefix}{new}"


def new_name(name: str) -> str | None:
    """Return the new name of the field or option `name` (the first, if several took its place), None without one."""
    told = describe_rename(name)
    return None if told is None else re.split(r"[ ,]", told.removeprefix(f"{name} is now "))[0]
