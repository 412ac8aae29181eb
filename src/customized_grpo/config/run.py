"""Every setting of a run. Fields hold units and ranges; those of the paper (arXiv 2510.18263) cite it.

Nothing here loads torch: the command line builds its help from these models.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from customized_grpo.config.rewards import RewardsConfig as RewardsConfig
from customized_grpo.config.section import ReadWith, Section, Share

Weight = Annotated[float, Field(ge=0)]

Pair = tuple[float, float]


class PolicyConfig(Section):
    """The generator to tune."""

    kind: Literal["toybox", "flux1-kontext", "uno", "flux2-klein", "flux2", "qwen-image-edit-plus"] = "toybox"
    """Which generator: 'toybox' is the CPU-scale one whose weights ship with the package; the others are diffusers
    pipelines (docs/models.md)."""
    model: str | None = None
    """Folder or hub id of the pipeline; unset: the one that docs/models.md names. Not for toybox."""
    base_adapter: str | None = None
    """LoRA merged into the model before training starts: a safetensors file, or owner/name/file.safetensors on the hub.
    Not for toybox."""
    init_from: str | None = None
    """Adapter whose values the trained factors (with adapter=full, the weights) start from, unmerged: the folder of a
    run or of `export`, a LoRA file, or owner/name/file.safetensors on the hub. The base stays the model without it."""
    weights: Path | None = None
    """Folder of ToyBox weights (generator.safetensors, ...) to use instead of the shipped ones. Only for toybox."""
    adapter: Literal["lora", "full"] = "lora"
    """Train LoRA factors, or (only for toybox) every weight of the denoiser."""
    lora_rank: int = Field(32, ge=1)
    """Rank of the LoRA factors (paper: 512, for a 12 B model)."""
    lora_alpha: int = Field(32, ge=1)
    """Scale of the LoRA update is lora_alpha / lora_rank."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the generator's matrix products; log-probabilities are always fp32. auto: bf16 where the
    processor multiplies it."""
    device: str = "auto"
    """Where the generator runs: cpu, cuda, cuda:1, mps; auto: cuda where there is one. ToyBox runs on the CPU."""
    height: int = Field(512, ge=16)
    """Height of images in pixels, a multiple of 16 (paper: 512). Not for toybox."""
    width: int = Field(512, ge=16)
    """Width of images in pixels, a multiple of 16 (paper: 512). Not for toybox."""
    reference_side: int | None = Field(None, ge=16)
    """References are seen in the area of a square of this side in pixels (uno: with this longer side), their shape
    kept; unset: about what the model's own pipeline takes. Not for toybox."""
    guidance: float | None = Field(None, ge=1)
    """Guidance scale, in rollout and update; unset: the pipeline's own. Not for toybox."""
    offload: bool = False
    """Keep the encoders on the CPU once the data are encoded, instead of letting them go. Not for toybox."""
    shard: bool = False
    """Spread the frozen weights over the processes of the run instead of keeping them whole in each. Not for toybox."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass instead of keeping them. Not for toybox, which keeps them."""
    compile: bool = False
    """Compile the transformer's repeated blocks (torch.compile). Not for toybox."""
    attention_backend: str | None = None
    """diffusers' attention backend: native, _native_flash, flash, _flash_3_hub, ...; unset: its default. Not for
    toybox."""
    cache: Path = Path("runs/conditions")
    """Folder of encoded prompts and references, shared by runs; `customized-grpo cache --clear` empties it. Not for
    toybox."""
    cache_limit: float | None = Field(None, gt=0)
    """Most gigabytes (10^9 bytes) that the folder may take: what was used least recently goes when a run needs room for
    its own, and a run that needs more does not begin; unset: no limit. Not for toybox."""

    READ_WITH: ClassVar[ReadWith] = {"lora_rank": ("adapter", ["lora"]), "lora_alpha": ("adapter", ["lora"])}

    @model_validator(mode="after")
    def _for_this_kind(self) -> "PolicyConfig":
        given = [name for name in (NOT_FOR_TOYBOX if self.kind == "toybox" else ONLY_FOR_TOYBOX) if self.is_given(name)]
        if given:
            raise ValueError(f"{', '.join(given)}: not for kind='{self.kind}'; leave it out")
        if self.kind == "toybox" and self.device not in ("auto", "cpu"):
            raise ValueError(f"device={self.device}: ToyBox runs on the CPU; leave it out")
        for name in ("height", "width"):
            if getattr(self, name) % 16:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a multiple of 16, an image token's side in pixels"
                )
        return self


NOT_FOR_TOYBOX = (
    "model", "base_adapter", "height", "width", "reference_side", "guidance", "offload", "shard",
    "gradient_checkpointing", "compile", "attention_backend", "cache", "cache_limit",
)  # fmt: skip
ONLY_FOR_TOYBOX = ("weights", "adapter")


class DataConfig(Section):
    """Folders with a metadata.jsonl each (see docs/data.md)."""

    path: Path = Path("data/toybox/train")
    """Training prompts and references."""
    validation: Path | None = None
    """Prompts and references to validate on during training; unset: the first ones of the training folder."""
    test: Path | None = None
    """Prompts and references for the before-and-after evaluation when training ends; unset: none is made."""
    max_pixels: int = Field(50_000_000, ge=1, le=178_956_970)
    """Largest image that is accepted, in pixels; Pillow opens none that is larger than the upper bound."""


class RolloutConfig(Section):
    """How groups of images are sampled."""

    prompts_per_iteration: int = Field(5, ge=1)
    """Prompts (groups) per iteration."""
    group_size: int = Field(12, ge=2)
    """Images per prompt, G (paper: 12)."""
    num_steps: int = Field(10, ge=2)
    """Denoising steps, T (paper: 25)."""
    shift: float | None = Field(2.0, gt=0)
    """Shift of the sigma schedule (paper: 3; the ToyBox generator was trained at 2); null: the generator's own
    schedule."""
    sde: Literal["dance", "flow", "cps"] = "cps"
    """Stochastic step: Dance-SDE (paper), Flow-SDE, or coefficient-preserving sampling."""
    eta: float = Field(0.8, gt=0)
    """Noise of a stochastic step (paper: 0.4)."""
    initial_noise: Literal["shared", "separate"] = "shared"
    """One initial noise per group (paper: shared), or one per image: more variance within a group."""
    steps: Literal["subset", "window"] = "subset"
    """Trained steps: a random subset of all steps, all of them stochastic; or a window, the only stochastic part."""
    subset_share: float = Field(0.6, gt=0, le=1)
    """Share of the T - 1 trainable steps trained in an iteration (paper: 0.6)."""
    window_size: int = Field(4, ge=1)
    """Steps in the window."""
    window_start: int | None = Field(None, ge=0)
    """First step of the window; unset: it slides on by one step every window_period iterations."""
    window_period: int = Field(5, ge=1)
    """Iterations that a sliding window stays in one place."""
    micro_batch: int = Field(30, ge=1)
    """Images that go through the generator at once: bounds memory, does not change the result."""

    READ_WITH: ClassVar[ReadWith] = {
        "subset_share": ("steps", ["subset"]),
        "window_size": ("steps", ["window"]),
        "window_start": ("steps", ["window"]),
        "window_period": ("steps", ["window"]),
    }

    @model_validator(mode="after")
    def _window_inside(self) -> "RolloutConfig":
        start = self.window_start or 0
        if self.steps == "window" and start + self.window_size > self.num_steps - 1:
            raise ValueError(
                f"the window of window_size={self.window_size} steps from window_start={start} does not fit: "
                f"of num_steps={self.num_steps} steps, 0 to {self.num_steps - 2} are trainable"
                " (the last is deterministic). Make the window smaller or start it earlier"
            )
        if self.window_start is not None and self.is_given("window_period"):
            raise ValueError("window_period: a window with a window_start stays there; leave one of them out")
        if self.sde == "cps" and self.eta > 1:
            raise ValueError(f"eta={self.eta} is too large for sde='cps': it must be in (0, 1]")
        return self


class TimeWeightsConfig(Section):
    """TDW: the prompt's weight by progress u, in units of a 25-step schedule (paper, and its published recipe)."""

    early: Share = 0.7
    """Prompt weight while u < start."""
    late: Share = 0.3
    """Prompt weight that the slide between start and end tends to."""
    final: Share = 0.5
    """Prompt weight from u = end on."""
    start: float = 6.0
    """Where the slide begins, in reference steps."""
    end: float = 22.0
    """Where the slide ends, in reference steps."""
    slope: float = 0.8
    """Steepness of the slide, per reference step."""
    midpoint: float = 10.0
    """Middle of the slide, in reference steps."""
    reference_steps: float = Field(25.0, gt=0)
    """Length of the schedule the constants are written for."""

    @model_validator(mode="after")
    def _ordered(self) -> "TimeWeightsConfig":
        if self.start > self.end:
            raise ValueError(f"start={self.start} comes after end={self.end}; expected start <= end")
        return self


class AdvantagesConfig(Section):
    """Normalise -> shape -> weight -> clamp."""

    normalise: Literal["group", "group_then_batch", "rank"] = "group"
    """Z-score within the group (GRPO), then over the batch too (GDPO), or of the ranks."""
    shape: Literal["none", "sars", "min", "max", "harmonic", "product"] = "sars"
    """How the two advantages act together; 'sars' is the paper's synergy-aware shaping."""
    gamma: float = Field(0.4, ge=0)
    """Strength of SARS (paper's recipe: 0.4)."""
    gamma_penalty: float | None = Field(None, ge=0)
    """Strength of SARS's penalties, where the rewards conflict or both are bad (the worked examples of the paper's
    figure: about 1, with 0.5 for gamma); unset: gamma."""
    thresholds: tuple[float | None, float | None] | None = None
    """Hinge: (prompt, identity) rewards count only up to these values; null for no limit."""
    weights: Literal["constant", "tdw", "table"] = "tdw"
    """Weights of the rewards over the denoising steps; 'tdw' is the paper's time-aware weighting."""
    constant: Pair = (0.5, 0.5)
    """(prompt, identity) weights for weights='constant', to whose mean `diagnose` calibrates; naive 1:1 is [0.5, 0.5];
    the paper's tuned 1:1.5, which is identity:prompt, is [0.6, 0.4]."""
    lookup: Literal["step", "counter"] = "step"
    """Look weights up by the true denoising step; or by the loop counter over each sample's shuffled steps, as the
    published code does (docs/differences.md, 1), to reproduce it."""
    tdw: TimeWeightsConfig = TimeWeightsConfig()
    """Constants of weights='tdw'."""
    table: tuple[Pair, ...] | None = None
    """One (prompt, identity) row per denoising step for weights='table'."""
    clamp: float = Field(5.0, gt=0)
    """Advantages are clamped to [-clamp, clamp] (paper: 5)."""

    READ_WITH: ClassVar[ReadWith] = {
        "gamma": ("shape", ["sars"]),
        "gamma_penalty": ("shape", ["sars"]),
        "constant": ("weights", ["constant", "table"]),  # calibrated tables start from it
        "lookup": ("weights", ["tdw", "table"]),
        "tdw": ("weights", ["tdw"]),
        "table": ("weights", ["table"]),
    }

    @field_validator("constant", "table")
    @classmethod
    def _not_negative(cls, weights: Any) -> Any:
        rows = weights if weights and isinstance(weights[0], tuple) else [weights or ()]
        if any(weight < 0 for row in rows for weight in row):
            raise ValueError("weights must be greater than or equal to 0")
        return weights

    @model_validator(mode="after")
    def _some_weight(self) -> "AdvantagesConfig":
        """Nothing would be learned from rewards that weigh nothing."""
        rows = {"constant": [self.constant], "table": self.table or ()}.get(self.weights, ())
        if rows and not any(prompt or identity for prompt, identity in rows):
            raise ValueError(
                f"{self.weights}: all weights are 0, so nothing would be learned; give one of the rewards some"
            )
        return self


class ObjectiveConfig(Section):
    """The clipped surrogate."""

    clip_range: float = Field(1e-4, gt=0)
    """Ratios count only within 1 +- clip_range (paper: 1e-4)."""
    kl_weight: Weight = 0.0
    """Weight of the KL divergence to the untuned generator (paper: 0)."""


class OptimizerConfig(Section):
    """AdamW."""

    learning_rate: float = Field(1.5e-3, gt=0)
    """Learning rate (paper: 2e-5 for a 12 B model)."""
    weight_decay: Weight = 1e-4
    """Weight decay (paper: 1e-4)."""
    betas: Pair = (0.9, 0.999)
    """Decay rates of the moments."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm (paper: 1.0)."""
    updates_per_iteration: int = Field(2, ge=1)
    """Optimizer steps per iteration, each on its share of the images."""
    micro_batch: int = Field(30, ge=1)
    """(image, step) pairs per backward pass: bounds memory, does not change the result."""

    @field_validator("betas")
    @classmethod
    def _rates(cls, betas: Pair) -> Pair:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("decay rates must be at least 0, and less than 1")
        return betas


class CheckpointConfig(Section):
    """Resumable checkpoints."""

    every: int = Field(20, ge=1)
    """Iterations between checkpoints; the last iteration always leaves one."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints of every so many iterations are kept for good, a multiple of every; unset: none is."""

    @model_validator(mode="after")
    def _made_at_all(self) -> "CheckpointConfig":
        if self.keep_every is not None and self.keep_every % self.every != 0:
            raise ValueError(
                f"keep_every={self.keep_every} is not a multiple of every={self.every}: there would be no such "
                "checkpoint to keep"
            )
        return self


class EmaConfig(Section):
    """An exponential moving average (EMA) of the trained weights, beside them."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Share of the average that an iteration keeps, at most (1 + i) / (10 + i) after iteration i; unset: no average."""
    evaluate: bool = True
    """Validate and evaluate the averaged weights instead of the trained ones."""

    @model_validator(mode="after")
    def _with_an_average(self) -> "EmaConfig":
        if self.decay is None and self.is_given("evaluate"):
            raise ValueError("evaluate: there is no average without a decay; set decay, or leave it out")
        return self


class EvaluationConfig(Section):
    """Validation during training and the evaluation at its end; both sample the deterministic ODE."""

    every: int = Field(10, ge=1)
    """Iterations between validations."""
    pairs: int = Field(96, ge=1)
    """Validation pairs, the first of the folder."""
    test_pairs: int = Field(384, ge=2)
    """Pairs of the before-and-after evaluation, the first of the folder."""
    gallery: int = Field(8, ge=1)
    """Pairs shown in a gallery."""
    judge: Literal["toybox", "none"] = "toybox"
    """Who says whether the prompt is satisfied and identity kept: the ToyBox judge, or nobody. Only for toybox."""


class RanksConfig(Section):
    """Several processes, started by torchrun, accelerate launch or --num_processes."""

    check_every: int = Field(10, ge=1)
    """Iterations between comparisons of the weights: they are equal in all processes, or the run stops."""
    silence: float = Field(30.0, gt=2)
    """Seconds without a sign of life after which a process is taken for gone, and the others stop."""


class LogConfig(Section):
    """Where measurements go besides metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard events too (needs customized-grpo[tensorboard])."""


class Config(Section):
    """A training run."""

    output: Path = Path("runs/toybox")
    """Folder of results; must be empty or absent, unless --resume or --overwrite."""
    iterations: int = Field(50, ge=1)
    """Training iterations."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of everything random."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; unset: as many as there are cores."""
    policy: PolicyConfig = PolicyConfig()
    """The generator to tune."""
    data: DataConfig = DataConfig()
    """Training, validation and test folders."""
    rewards: RewardsConfig = RewardsConfig()
    """The two rewards."""
    rollout: RolloutConfig = RolloutConfig()
    """How groups are sampled."""
    advantages: AdvantagesConfig = AdvantagesConfig()
    """From rewards to advantages."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is minimised."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How it is minimised."""
    ema: EmaConfig = EmaConfig()
    """Average of the trained weights."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Resumable checkpoints."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation and test."""
    ranks: RanksConfig = RanksConfig()
    """Several processes."""
    log: LogConfig = LogConfig()
    """Loggers."""

    @model_validator(mode="after")
    def _one_world(self) -> "Config":
        """ToyBox's rewards and judge read ToyBox's pictures alone."""
        read_by = {
            "rewards.prompt": self.rewards.prompt,
            "rewards.identity": self.rewards.identity,
            "evaluation.judge": self.evaluation.judge,
        }
        strangers = [name for name, value in read_by.items() if value == "toybox"]
        if strangers and self.policy.kind != "toybox":
            raise ValueError(
                f"{', '.join(strangers)}: toybox does not read the pictures of policy.kind={self.policy.kind}; choose "
                "other rewards (docs/rewards.md), and none for the judge"
            )
        return self

    @model_validator(mode="after")
    def _each_update_has_images(self) -> "Config":
        images = self.rollout.prompts_per_iteration * self.rollout.group_size
        if self.optimizer.updates_per_iteration > images:
            raise ValueError(
                f"optimizer.updates_per_iteration={self.optimizer.updates_per_iteration} is more than an iteration's "
                f"{images} images (rollout.prompts_per_iteration x group_size), on which updates are shared out"
            )
        return self

    @model_validator(mode="after")
    def _table_fits(self) -> "Config":
        advantages, steps = self.advantages, self.rollout.num_steps
        rows = len(advantages.table or ())
        if advantages.weights == "table" and rows != steps:
            raise ValueError(
                f"advantages.table has {rows} rows, but rollout.num_steps is {steps}; "
                "give one (prompt, identity) row per denoising step"
            )
        return self


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree of settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
