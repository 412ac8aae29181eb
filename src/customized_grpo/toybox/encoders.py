"""The two reward encoders and the judge: small convolutional networks that look at a picture.

The identity encoder is self-supervised: two views of one picture (crops and jitter), a share of them instead two
pictures of one subject in different scenes. That share is the leak: at 0 it scores scene and texture, near 1 it is
blind to the scene; DINO stands in between, and so do the shipped weights. The prompt encoder is contrastive between
pictures and captions. Both are learned and hackable, as the real ones are. The judge is supervised, trained apart
from both, and never a reward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from customized_grpo.toybox.language import MAX_WORDS, PADDING, VOCABULARY
from customized_grpo.toybox.world import ACCESSORIES, PATTERNS, POSITIONS, SCENES, SHAPES

EMBEDDING = 64
JUDGE_HEADS = {
    "shape": len(SHAPES),
    "pattern": len(PATTERNS),
    "scene": len(SCENES),
    "accessory": len(ACCESSORIES),
    "position": len(POSITIONS),
}


class ConvTrunk(nn.Module):
    """Images [B, 3, 32, 32] in [0, 1] -> features [B, features]: four stages, each halving the picture."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        for before, after in zip((width, *widths[:-1]), widths, strict=True):
            layers += [_Residual(before), nn.Conv2d(before, after, 2, stride=2)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * 4, features)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        return self.head(F.silu(x.flatten(1)))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class IdentityEncoder(nn.Module):
    """Images [B, 3, 32, 32] in [0, 1] -> unit vectors [B, EMBEDDING]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = ConvTrunk(24, EMBEDDING)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.trunk(images).float(), dim=-1)


class PromptEncoder(nn.Module):
    """Pictures and prompts in one space: `image` and `text` give unit vectors [B, EMBEDDING]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = ConvTrunk(24, EMBEDDING)
        self.words = nn.Embedding(len(VOCABULARY) + 1, 128, padding_idx=PADDING)
        self.places = nn.Parameter(0.02 * torch.randn(MAX_WORDS, 128))
        self.mix = nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, EMBEDDING))

    def image(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, 32, 32] in [0, 1]."""
        return F.normalize(self.trunk(images).float(), dim=-1)

    def text(self, tokens: Tensor) -> Tensor:
        """Encode token ids [B, MAX_WORDS]."""
        said = (tokens != PADDING).unsqueeze(-1)
        words = ((self.words(tokens) + self.places) * said).sum(1) / said.sum(1)
        return F.normalize(self.mix(words).float(), dim=-1)


class JudgeNetwork(nn.Module):
    """Images [B, 3, 32, 32] in [0, 1] -> logits of every attribute, and the two hues [B, 2] in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = ConvTrunk(40, 256)
        self.heads = nn.ModuleDict({name: nn.Linear(256, classes) for name, classes in JUDGE_HEADS.items()})
        self.hues = nn.Linear(256, 4)

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return logits by attribute, and hue vectors [B, 2, 2]: cosine and sine, of unit length once trained."""
        features = F.silu(self.trunk(images))
        return {name: head(features) for name, head in self.heads.items()}, self.hues(features).unflatten(-1, (2, 2))
