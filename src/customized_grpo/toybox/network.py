"""The ToyBox generator's network: a context tower, run once, and a small rectified-flow transformer.

The tower reads the prompt and the reference and leaves keys and values for the denoiser, so that every denoising step
and every sample of a group shares that work. Odd denoiser blocks attend to those, even ones to the image itself; a
depthwise convolution on the token grid in each makes neighbouring patches cohere.

Shape legend: B samples, D width, H heads, N = 64 image tokens, S = 64 + 20 context tokens, L context layers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from customized_grpo.toybox.drawing import SIZE
from customized_grpo.toybox.language import MAX_WORDS, PADDING, VOCABULARY

PATCH = 4
GRID = SIZE // PATCH
PIXELS = 3 * PATCH * PATCH


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network; the shipped weights have these defaults."""

    width: int = 160
    heads: int = 5
    denoiser_blocks: int = 6
    context_blocks: int = 2


@dataclass(frozen=True)
class Context:
    """What the tower leaves for the denoiser: `keys`, `values` [L, B, H, S, D/H], `bias` [B, 1, 1, S], `pooled` [B,
    D]."""

    keys: Tensor
    values: Tensor
    bias: Tensor
    pooled: Tensor

    def take(self, index: Tensor) -> "Context":
        """Return the rows `index` [N] of the batch, repeats allowed."""
        return Context(self.keys[:, index], self.values[:, index], self.bias[index], self.pooled[index])


def patchify(images: Tensor) -> Tensor:
    """Split images [B, 3, 32, 32] into tokens [B, N, PIXELS]."""
    return F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor) -> Tensor:
    """Merge tokens [B, N, PIXELS] into images [B, 3, 32, 32]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (GRID, GRID)), PATCH)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax attention over [B, H, *, D/H], with a `bias` [B, 1, 1, S] of the scores.

    It is written out: at these lengths that is faster than the fused kernel on a CPU. Scale and bias come with the
    product.
    """
    (batch, heads), size, scale = q.shape[:2], k.shape[2], q.shape[-1] ** -0.5
    queries, keys, values = (part.flatten(0, 1) for part in (q, k, v))
    added = queries.new_zeros(1, 1, 1) if bias is None else bias.expand(-1, heads, 1, size).reshape(-1, 1, size)
    scores = torch.baddbmm(added.to(queries.dtype), queries, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values).unflatten(0, (batch, heads))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split the heads: [B, *, D] -> [B, H, *, D/H]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Merge the heads: [B, H, *, D/H] -> [B, *, D]."""
    return x.transpose(1, 2).flatten(2)


def time_features(sigma: Tensor, width: int) -> Tensor:
    """Return sines and cosines [B, width] of the noise level `sigma` [B] in [0, 1]."""
    frequencies = torch.exp(-math.log(1000.0) * torch.arange(width // 2, device=sigma.device) / (width // 2))
    angles = 1000.0 * sigma[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ContextBlock(nn.Module):
    """A pre-norm transformer block over the context tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(merge_heads(attention(q, k, v, bias)))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class ContextTower(nn.Module):
    """Prompt tokens and reference pixels -> `Context`. Frozen in RL, so a group's context is computed once."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.layers = config.heads, config.denoiser_blocks // 2
        self.words = nn.Embedding(len(VOCABULARY) + 1, width)
        self.patches = nn.Linear(PIXELS, width)
        self.positions = nn.Parameter(0.02 * torch.randn(GRID * GRID + MAX_WORDS, width))
        self.blocks = nn.ModuleList(ContextBlock(width, config.heads) for _ in range(config.context_blocks))
        self.norm = nn.LayerNorm(width)
        self.keys_values = nn.Linear(width, 2 * width * self.layers)
        self.pool = nn.Linear(width, width)

    def forward(self, tokens: Tensor, reference: Tensor) -> Context:
        """Encode `tokens` [B, MAX_WORDS] int64 and `reference` [B, 3, 32, 32] in [-1, 1]."""
        x = torch.cat([self.patches(patchify(reference)), self.words(tokens)], dim=1) + self.positions
        absent = F.pad(tokens == PADDING, (GRID * GRID, 0))
        bias = torch.zeros_like(absent, dtype=torch.float32).masked_fill(absent, -1e4)[:, None, None]
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        parts = [split_heads(part, self.heads) for part in self.keys_values(x).chunk(2 * self.layers, dim=-1)]
        said = (tokens != PADDING).unsqueeze(-1).to(x.dtype)
        pooled = (x[:, GRID * GRID :] * said).sum(1) / said.sum(1)
        return Context(torch.stack(parts[::2]), torch.stack(parts[1::2]), bias, self.pool(pooled))


class DenoiserBlock(nn.Module):
    """Attention (to the image, or to the context), a depthwise convolution and an MLP, modulated by the time."""

    def __init__(self, width: int, heads: int, *, to_context: bool) -> None:
        super().__init__()
        self.heads, self.to_context = heads, to_context
        self.modulation = nn.Parameter(torch.zeros(6, width))
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.qkv = nn.Linear(width, width if to_context else 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, modulation: Tensor, context: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Update `x` [B, N, D] by `modulation` [B, 6, D] and `context`: one layer's keys, values and bias."""
        parts = (modulation + self.modulation.to(modulation.dtype)).unsqueeze(2).unbind(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = torch.addcmul(shift1, F.layer_norm(x, x.shape[-1:]), 1 + scale1)
        h = h + self._convolve(h)
        if self.to_context:
            keys, values, bias = context
            attended = attention(split_heads(self.qkv(h), self.heads), keys, values, bias)
        else:
            attended = attention(*(split_heads(part, self.heads) for part in self.qkv(h).chunk(3, dim=-1)))
        x = torch.addcmul(x, gate1, self.out(merge_heads(attended)))
        h = torch.addcmul(shift2, F.layer_norm(x, x.shape[-1:]), 1 + scale2)
        return torch.addcmul(x, gate2, self.down(F.silu(self.up(h))))

    def _convolve(self, h: Tensor) -> Tensor:
        grid = h.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        return self.conv(grid).permute(0, 2, 3, 1).flatten(1, 2)


class Denoiser(nn.Module):
    """Predicts the velocity `noise - image` of a noisy image."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.width = width
        self.patches = nn.Linear(PIXELS, width)
        self.positions = nn.Parameter(0.02 * torch.randn(GRID * GRID, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            DenoiserBlock(width, config.heads, to_context=index % 2 == 1) for index in range(config.denoiser_blocks)
        )
        self.last_modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, PIXELS)
        for layer in (self.modulation, self.last_modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, latents: Tensor, sigma: Tensor, context: Context) -> Tensor:
        """Predict the velocity [B, 3, 32, 32] float32 of `latents` [B, 3, 32, 32] at `sigma` [B] in (0, 1]."""
        x = self.patches(patchify(latents)) + self.positions
        now = F.silu(self.time(time_features(sigma, self.width)) + context.pooled)
        modulation = self.modulation(now).unflatten(-1, (6, self.width))
        for index, block in enumerate(self.blocks):
            layer = index // 2
            x = block(x, modulation, (context.keys[layer], context.values[layer], context.bias))
        shift, scale = self.last_modulation(now).unsqueeze(1).chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return unpatchify(self.last(x).float())


class Generator(nn.Module):
    """The context tower and the denoiser together: what pre-training trains and the shipped weights hold."""

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        config = config or NetworkConfig()
        self.context = ContextTower(config)
        self.denoiser = Denoiser(config)
