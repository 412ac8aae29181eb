"""Names that fields had before version 0.1.0, so that an old file or option is answered with the new name."""

import re

_PIPELINE = (
    "model", "base_adapter", "height", "width", "reference_side", "gradient_checkpointing", "compile",
    "attention_backend", "cache", "cache_limit",
)  # fmt: skip
_LOCAL = ("device", "precision", "micro_batch")
_OF_A_KIND = (
    *(f"{kind}.model" for kind in ("hpsv3", "hpsv2", "pickscore", "clip_t", "siglip", "dino", "clip_i")),
    "hpsv3.backbone", "hpsv3.instruction", "hpsv3.positions", "hpsv2.backbone",
    *(f"{kind}.{name}" for kind in ("dino", "clip_i") for name in ("background", "several_references")),
    "remote.timeout", "vlm_judge.url", "vlm_judge.model", "vlm_judge.timeout", "vlm_judge.concurrency",
    "vlm_judge.attempts", "vlm_judge.reasoning", "vlm_judge.max_tokens", "vlm_judge.max_tokens_field",
    "vlm_judge.temperature", "vlm_judge.omit", "vlm_judge.extra_body",
)  # fmt: skip
"""Settings that stood once for all rewards of a kind, and stand now below the name of each."""

RENAMED = {
    "policy.weights": "policy.toybox.weights",
    "policy.adapter": "policy.toybox.adapter",
    **{f"policy.{name}": f"policy.pipeline.{name}" for name in _PIPELINE},
    "policy.guidance": "policy.pipeline.guidance_scale",
    "policy.offload": "policy.pipeline.text_encoders (false is now free, and true cpu)",
    "policy.shard": "policy.pipeline.fsdp",
    "rewards.prompt_model": "rewards.NAME.hpsv3.model (or clip_t, ...: the section of the reward's kind)",
    "rewards.identity_model": "rewards.NAME.dino.model (or clip_i: the section of the reward's kind)",
    "rewards.identity_leak": "rewards.NAME.toybox_identity.leak",
    "rewards.toybox.identity_leak": "rewards.NAME.toybox_identity.leak",
    "rewards.identity_reference": "rewards.NAME.dino.reference (or clip_i, toybox_identity: the section of its kind)",
    "rewards.several_references": "rewards.NAME.dino.several_references (or clip_i)",
    "rewards.background": "rewards.NAME.dino.background (or clip_i)",
    **{f"rewards.{name}": f"rewards.NAME.local.{name}" for name in _LOCAL},
    **{f"rewards.local.{name}": f"rewards.NAME.local.{name}" for name in _LOCAL},
    "rewards.deadline": "rewards.NAME.remote.timeout (or vlm_judge)",
    "rewards.max_invalid_share": "rewards.NAME.max_invalid_share",
    **{f"rewards.remote.{side}_url": "rewards.NAME.remote.url" for side in ("prompt", "identity")},
    **{f"rewards.{name}": f"rewards.NAME.{name}" for name in _OF_A_KIND},
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
    "advantages.constant": "rewards.NAME.weight (with rewards.NAME.schedule=constant)",
    "advantages.thresholds": "rewards.NAME.up_to",
    "optimizer.updates_per_iteration": "optimizer.num_minibatches",
    "evaluation.pairs": "evaluation.num_samples",
    "evaluation.test_pairs": "evaluation.num_test_samples",
    "log.tensorboard": "log.report_to (true is now [tensorboard])",
    "ranks": "distributed",
    "ranks.check_every": "distributed.check_weights_every",
    "ranks.silence": "distributed.heartbeat_timeout",
    # Of `evaluate`:
    "pairs": "num_samples",
    "guidance": "guidance_scale",
    "metrics.hpsv3_weights": "metrics.hpsv3.model",
}
"""{old dotted name: the new one, with what became of its values}. NAME stands for a reward's."""
REMOVED = {
    "evaluation.judge": "ToyBox's oracle measures every run on ToyBox",
}
"""{old dotted name: why no field took its place}."""
GRID = "train."
"""Where the file of a comparison holds the fields of a run."""


def describe_rename(name: str) -> str | None:
    """Return a sentence on the field or option `name` that has a new name, or is gone; None for other names."""
    if reason := REMOVED.get(name.removeprefix(GRID)):
        return f"{name} is gone: {reason}; leave it out"
    new = RENAMED.get(name.removeprefix(GRID))
    return None if new is None else f"{name} is now {_prefix(name)}{new}; use the new name"


def new_name(name: str) -> str | None:
    """Return the new name of the field or option `name` (the first, if several took its place), None without one."""
    new = RENAMED.get(name.removeprefix(GRID))
    return None if new is None else _prefix(name) + re.split(r"[ ,]", new)[0]


def _prefix(name: str) -> str:
    return GRID if name.startswith(GRID) else ""
