"""Trains every network that ToyBox ships, each from a seed and on its own.

The generator is trained first on clean pairs and then for a while on noisy ones, which is what leaves RL room to
improve it (`PairNoise`). All losses are standard: rectified flow for the generator, InfoNCE for the encoders,
cross-entropy for the judge.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from customized_grpo.runtime.device import resolve_precision
from customized_grpo.toybox.encoders import IdentityEncoder, JudgeNetwork, PromptEncoder
from customized_grpo.toybox.language import tokenize
from customized_grpo.toybox.network import Generator
from customized_grpo.toybox.pairs import PairNoise, Pairs, draw_pairs

NetworkT = TypeVar("NetworkT", bound=nn.Module)
Progress = Callable[[str, int, int, float], None]
"""Called as (stage, step, steps, loss)."""

POOL_STEPS = 100
"""Pairs are drawn for this many steps at a time: drawing is cheapest in bulk."""


NOISE = PairNoise(caption=0.15, shape=0.18, pattern=0.5, hue=0.1, copy=0.14, stay=0.28)


@dataclass(frozen=True)
class GeneratorRecipe:
    """How the generator is pre-trained."""

    clean_steps: int = 4000
    noisy_steps: int = 600
    batch_size: int = 64
    matrix_lr: float = 3e-2
    other_lr: float = 2e-3
    noisy_lr_scale: float = 0.3
    ema_decay: float = 0.995
    time_shift: float = 2.0
    noise: PairNoise = NOISE


def train_clean_generator(recipe: GeneratorRecipe, seed: int, progress: Progress) -> Generator:
    """Train the first phase: a generator that follows its prompt and its reference."""
    torch.manual_seed(seed)
    steps, report = recipe.clean_steps, _named(progress, "generator, clean pairs")
    return _train_flow(Generator(), recipe, steps, 1.0, None, torch.Generator().manual_seed(seed), report)


def train_noisy_generator(model: Generator, recipe: GeneratorRecipe, seed: int, progress: Progress) -> Generator:
    """Train the second phase: `model` continues on noisy pairs and learns to err as data from the web does."""
    draw = torch.Generator().manual_seed(seed)
    steps, report = recipe.noisy_steps, _named(progress, "generator, noisy pairs")
    return _train_flow(model, recipe, steps, recipe.noisy_lr_scale, recipe.noise, draw, report)


@dataclass(frozen=True)
class EncoderRecipe:
    """How an encoder or the judge is trained."""

    steps: int
    batch_size: int
    learning_rate: float
    temperature: float = 0.1
    cross_scene: float = 0.0
    """Share of the identity encoder's positives that show one subject in two scenes: the dial of its leak."""


IDENTITY_RECIPES = {
    "low": EncoderRecipe(1200, 96, 2e-3, cross_scene=0.5),
    "medium": EncoderRecipe(1200, 96, 2e-3, cross_scene=0.03),
    "high": EncoderRecipe(1200, 96, 2e-3, cross_scene=0.0),
}
"""By leak. DINO stands somewhere in between."""
PROMPT_RECIPE = EncoderRecipe(1200, 96, 2e-3)
JUDGE_RECIPE = EncoderRecipe(1500, 64, 3e-3)
MAX_JUDGE_NOISE = 0.12
"""The judge sees pictures with up to this much Gaussian noise, so that a generator's blemishes do not blind it."""


def train_identity_encoder(
    recipe: EncoderRecipe, seed: int, progress: Progress, stage: str = "identity encoder"
) -> IdentityEncoder:
    """Train an encoder by self-supervision: two crops of one picture belong together (SimCLR, arXiv 2002.05709).

    Some pairs cross scenes.
    """

    def loss(encoder: IdentityEncoder, pairs: Pairs, draw: torch.Generator) -> Tensor:
        across = torch.rand(len(pairs.captions), 1, 1, 1, generator=draw) < recipe.cross_scene
        second = torch.where(across, pairs.references, pairs.targets)
        return _info_nce(
            encoder(crop_and_jitter(pairs.targets, draw)), encoder(crop_and_jitter(second, draw)), recipe.temperature
        )

    return _train_encoder(IdentityEncoder, loss, recipe, seed, _named(progress, stage))


def train_prompt_encoder(recipe: EncoderRecipe, seed: int, progress: Progress) -> PromptEncoder:
    """Train an encoder of pictures and captions by contrast (CLIP, arXiv 2103.00020)."""

    def loss(encoder: PromptEncoder, pairs: Pairs, draw: torch.Generator) -> Tensor:
        return _info_nce(encoder.image(pairs.targets), encoder.text(tokenize(pairs.captions)), recipe.temperature)

    return _train_encoder(PromptEncoder, loss, recipe, seed, _named(progress, "prompt encoder"))


def train_judge(recipe: EncoderRecipe, seed: int, progress: Progress) -> JudgeNetwork:
    """Train the oracle's network on the world's own labels, on targets and references, with noise."""

    def loss(judge: JudgeNetwork, pairs: Pairs, draw: torch.Generator) -> Tensor:
        count = len(pairs.captions)
        reference = torch.rand(count, generator=draw) < 0.3
        images = torch.where(reference.view(-1, 1, 1, 1), pairs.references, pairs.targets)
        level = MAX_JUDGE_NOISE * torch.rand(count, 1, 1, 1, generator=draw)
        logits, directions = judge((images + level * torch.randn(images.shape, generator=draw)).clamp(0, 1))
        labels = {"shape": pairs.subjects.shape, "pattern": pairs.subjects.pattern}
        for name in ("scene", "accessory", "position"):
            labels[name] = torch.where(
                reference, getattr(pairs.reference_scenes, name), getattr(pairs.target_scenes, name)
            )
        angle = 2 * math.pi * pairs.subjects.hues
        hue_loss = F.mse_loss(directions.float(), torch.stack([angle.cos(), angle.sin()], dim=-1))
        return 4 * hue_loss + sum(F.cross_entropy(logits[name].float(), label) for name, label in labels.items())

    return _train_encoder(JudgeNetwork, loss, recipe, seed, _named(progress, "judge"))


def _train_encoder(
    make: Callable[[], NetworkT],
    loss_of: Callable[[NetworkT, Pairs, torch.Generator], Tensor],
    recipe: EncoderRecipe,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> NetworkT:
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    network = make()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps)
    for step, pairs in enumerate(_batches(recipe.steps, recipe.batch_size, draw, None), 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=resolve_precision("auto") == "bf16"):
            loss = loss_of(network, pairs, draw)
        _step(loss, network, [optimizer], [schedule])
        progress(step, recipe.steps, loss.item())
    return network.requires_grad_(False).eval()


def _info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss, both ways, of unit vectors [B, E]: row b of `first` belongs with row b of
    `second` alone."""
    logits = first.float() @ second.float().T / temperature
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def crop_and_jitter(images: Tensor, draw: torch.Generator) -> Tensor:
    """Crop images [B, 3, H, W] in [0, 1] at random and jitter brightness and contrast.

    Crops are 60 to 100 % of the side, resized back, half of them mirrored.
    """
    count = len(images)
    side, x, y, flip, gain, lift = torch.rand(6, count, generator=draw)
    scale = 0.6 + 0.4 * side
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = scale * torch.where(flip < 0.5, 1.0, -1.0)
    theta[:, 1, 1] = scale
    theta[:, 0, 2] = (2 * x - 1) * (1 - scale)
    theta[:, 1, 2] = (2 * y - 1) * (1 - scale)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    crops = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain, lift = (0.8 + 0.4 * gain).view(-1, 1, 1, 1), (0.2 * lift - 0.1).view(-1, 1, 1, 1)
    return ((crops - 0.5) * gain + 0.5 + lift).clamp(0, 1)


def _train_flow(
    model: Generator,
    recipe: GeneratorRecipe,
    steps: int,
    lr_scale: float,
    noise: PairNoise | None,
    draw: torch.Generator,
    progress: Callable[[int, int, float], None],
) -> Generator:
    """Train a rectified flow on the velocity at logit-normal times; return the moving average of the weights."""
    optimizers = _optimizers(model, recipe.matrix_lr * lr_scale, recipe.other_lr * lr_scale)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda k: _warm_then_decay(k, steps)) for o in optimizers]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    for step, batch in enumerate(_batches(steps, recipe.batch_size, draw, noise), 1):
        image = batch.targets * 2 - 1
        start = torch.randn(image.shape, generator=draw)
        time = torch.sigmoid(torch.randn(len(image), generator=draw))
        sigma = recipe.time_shift * time / (1 + (recipe.time_shift - 1) * time)
        latents = torch.lerp(image, start, sigma.view(-1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=resolve_precision("auto") == "bf16"):
            context = model.context(tokenize(batch.captions), batch.references * 2 - 1)
            velocity = model.denoiser(latents, sigma, context)
        loss = F.mse_loss(velocity, start - image)
        _step(loss, model, optimizers, schedules)
        average.update_parameters(model)
        progress(step, steps, loss.item())
    model.load_state_dict(average.module.state_dict())
    return model


def _optimizers(model: Generator, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks and AdamW for the rest.

    The loss is a quarter lower than with AdamW alone after 300 steps.
    """
    hidden = [
        p for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2 and "modulation" not in name
    ]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(hidden, lr=matrix_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def _warm_then_decay(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 50)
    return warm * max(0.02, min(1.0, 2 * (1 - step / steps)))


def _step(
    loss: Tensor,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    schedules: Sequence[torch.optim.lr_scheduler.LRScheduler],
) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _batches(steps: int, size: int, draw: torch.Generator, noise: PairNoise | None) -> Iterator[Pairs]:
    for first in range(0, steps, POOL_STEPS):
        pool = draw_pairs(size * min(POOL_STEPS, steps - first), "train", draw, noise)
        for index in torch.arange(len(pool.captions)).split(size):
            yield pool.take(index)


def _named(progress: Progress, stage: str) -> Callable[[int, int, float], None]:
    return lambda step, steps, loss: progress(stage, step, steps, loss)
