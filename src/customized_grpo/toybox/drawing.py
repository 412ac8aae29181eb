"""Draws ToyBox pictures: signed distances with soft edges, a whole batch at once.

Lengths are pixels of the 32 x 32 picture, x to the right and y down. A distance is negative inside. Shape legend: B
pictures, H = W = `SIZE`.
"""

import torch
from torch import Tensor

from customized_grpo.toybox.world import ACCESSORIES, POSITIONS, SCENES, Scenes, Subjects

SIZE = 32
CHUNK = 512
"""Pictures drawn at once; bounds memory."""

RADIUS = 8.0
CENTRE_X = {"left": 9.5, "middle": 16.0, "right": 22.5}
CENTRE_Y = 18.5
DARK = (0.10, 0.09, 0.16)


def render(subjects: Subjects, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Draw each subject in its setting.

    Returns images [B, 3, 32, 32] and subject masks [B, 1, 32, 32], both float32 in [0, 1]. Pure: the same batch gives
    the same pictures.
    """
    if len(subjects) != len(scenes):
        raise ValueError(f"{len(subjects)} subjects but {len(scenes)} settings; render takes one setting for each")
    parts = [
        _render_chunk(subjects.take(index), scenes.take(index)) for index in torch.arange(len(subjects)).split(CHUNK)
    ]
    return torch.cat([image for image, _ in parts]), torch.cat([mask for _, mask in parts])


def _render_chunk(subjects: Subjects, scenes: Scenes) -> tuple[Tensor, Tensor]:
    axis = torch.arange(SIZE) + 0.5
    x, y = axis.view(1, 1, SIZE), axis.view(1, SIZE, 1)
    image = _backgrounds(scenes, x, y)

    centres = torch.tensor([CENTRE_X[name] for name in POSITIONS])
    jitter = scenes.variation[:, 3:].view(-1, 3, 1, 1).unbind(1)
    radius = RADIUS * (1 + 0.06 * jitter[0])
    u = (x - centres[scenes.position].view(-1, 1, 1) - 0.8 * jitter[1]) / radius
    v = (y - CENTRE_Y - 0.8 * jitter[2]) / radius

    distance = _shape_distances(subjects.shape, u, v) * radius
    image = _over(image, _colour(DARK), _soft(distance - 0.9))
    skin = _skin(subjects, u, v)
    mask = _soft(distance)
    image = _over(image, skin, mask)
    image = _eyes(image, u, v, radius)
    image = _accessories(image, scenes.accessory, u, v, radius)
    return image, mask.unsqueeze(1)


def _soft(distance: Tensor) -> Tensor:
    """Return the coverage in [0, 1] of a region given by its signed distance in pixels."""
    return (0.5 - distance).clamp(0, 1)


def _colour(rgb: tuple[float, float, float]) -> Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1)


def _over(image: Tensor, paint: Tensor, coverage: Tensor) -> Tensor:
    return torch.lerp(image, paint.expand_as(image), coverage.unsqueeze(1).expand_as(image))


def hsv_to_rgb(hue: Tensor, saturation: float, value: float) -> Tensor:
    """Return the colors [B, 3] of `hue` [B] in turns, at one saturation and value."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue.unsqueeze(-1) * 6) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


# the subject


def _circle(u: Tensor, v: Tensor, cu: float, cv: float, r: float) -> Tensor:
    return torch.hypot(u - cu, v - cv) - r


def _shape_distances(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Approximate signed distances [B, H, W], in units of the subject's radius, of each picture's own shape."""
    draw = (_ball, _block, _star, _heart, _drop, _flower, _cloud, _ghost)
    distance = torch.empty_like(u + v)
    for index, function in enumerate(draw):
        rows = (shape == index).nonzero().squeeze(1)
        if len(rows):
            distance[rows] = function(u[rows], v[rows])
    return distance


def _ball(u: Tensor, v: Tensor) -> Tensor:
    return _circle(u, v, 0.0, 0.0, 0.92)


def _block(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot((u.abs() - 0.62).clamp(min=0), (v.abs() - 0.62).clamp(min=0)) - 0.24


def _star(u: Tensor, v: Tensor) -> Tensor:
    angle = torch.atan2(u, -v)
    sector = 2 * torch.pi / 5
    folded = ((angle + sector / 2) % sector - sector / 2).abs()
    r = torch.hypot(u, v)
    # The edge from the tip (radius 1.15, angle 0) to the notch (radius 0.6, angle 36 degrees) of one folded arm.
    px, py = r * torch.cos(folded), r * torch.sin(folded)
    tip, notch = (1.15, 0.0), (0.6 * 0.809, 0.6 * 0.588)
    ex, ey = notch[0] - tip[0], notch[1] - tip[1]
    return ((px - tip[0]) * ey - (py - tip[1]) * ex) / (ex * ex + ey * ey) ** 0.5


def _heart(u: Tensor, v: Tensor) -> Tensor:
    lobes = _circle(u.abs(), v, 0.46, -0.36, 0.52)
    slope = 0.74
    wedge = torch.maximum((u.abs() + slope * v - slope * 0.98) / (1 + slope * slope) ** 0.5, -0.12 - v)
    return torch.minimum(lobes, wedge)


def _drop(u: Tensor, v: Tensor) -> Tensor:
    body = _circle(u, v, 0.0, 0.26, 0.72)
    slope = 0.5
    cone = torch.maximum((u.abs() - slope * (v + 1.2)) / (1 + slope * slope) ** 0.5, v - 0.02)
    return torch.minimum(body, cone)


def _flower(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.86 - 0.17 * torch.cos(6 * torch.atan2(u, -v))


def _cloud(u: Tensor, v: Tensor) -> Tensor:
    puffs = torch.minimum(_circle(u.abs(), v, 0.62, 0.16, 0.46), _circle(u, v, 0.0, -0.26, 0.56))
    base = torch.maximum(u.abs() - 0.66, (v - 0.36).abs() - 0.26)
    return torch.minimum(puffs, base)


def _ghost(u: Tensor, v: Tensor) -> Tensor:
    head = _circle(u, v, 0.0, -0.24, 0.74)
    hem = 0.80 + 0.14 * torch.cos(u * 4.25 * 2)
    sheet = torch.maximum(u.abs() - 0.74, torch.maximum(v - hem, -0.24 - v))
    return torch.minimum(head, sheet)


def _skin(subjects: Subjects, u: Tensor, v: Tensor) -> Tensor:
    """Return the two-colored skin [B, 3, H, W]."""
    first = hsv_to_rgb(subjects.hues[:, 0], 0.62, 0.98).view(-1, 3, 1, 1)
    second = hsv_to_rgb(subjects.hues[:, 1], 0.95, 0.62).view(-1, 3, 1, 1)
    u, v = torch.broadcast_tensors(u, v)
    period = 0.62
    cell_u, cell_v = (u / period + 0.5) % 1.0 - 0.5, (v / period + 0.5) % 1.0 - 0.5
    patterns = (
        0.25 - ((v + u) / (1.35 * period) % 1.0 - 0.5).abs(),
        torch.hypot(cell_u, cell_v) - 0.32,
        torch.where(((u + period) / (2 * period) % 1.0 < 0.5) ^ ((v + period) / (2 * period) % 1.0 < 0.5), -1.0, 1.0),
        torch.hypot(u, (v - 0.34) / 0.9) - 0.44,
        u,
    )
    chosen = torch.stack(patterns).gather(0, subjects.pattern.view(1, -1, 1, 1).expand(1, *u.shape)).squeeze(0)
    coverage = _soft(chosen * RADIUS).unsqueeze(1)
    shade = (1.06 - 0.16 * (v + 0.5)).unsqueeze(1)
    return ((first + (second - first) * coverage) * shade).clamp(0, 1)


def _eyes(image: Tensor, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    white = torch.hypot(u.abs() - 0.27, v + 0.12) - 0.19
    pupil = torch.hypot(u.abs() - 0.25, v + 0.08) - 0.11
    image = _over(image, _colour((1.0, 1.0, 1.0)), _soft(white * radius))
    return _over(image, _colour(DARK), _soft(pupil * radius))


def _accessories(image: Tensor, accessory: Tensor, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Draw on each picture what its subject wears."""
    nowhere = torch.full_like(u + v, 9.0)

    def worn(name: str, distance: Tensor) -> Tensor:
        chosen = (accessory == ACCESSORIES.index(name)).view(-1, 1, 1)
        return _soft(torch.where(chosen, distance, nowhere) * radius)

    def box(cu: float, cv: float, hu: float, hv: float) -> Tensor:
        return torch.maximum((u - cu).abs() - hu, (v - cv).abs() - hv)

    hat = torch.minimum(box(0.0, -0.86, 0.78, 0.11), box(0.0, -1.22, 0.46, 0.34))
    image = _over(image, _colour(DARK), worn("hat", hat - 0.08))
    image = _over(image, _colour((0.90, 0.13, 0.14)), worn("hat", hat))
    image = _over(image, _colour((1.0, 0.95, 0.9)), worn("hat", box(0.0, -1.02, 0.46, 0.07)))

    scarf = torch.minimum(box(0.0, 0.60, 0.80, 0.14), box(0.46, 0.90, 0.15, 0.36))
    image = _over(image, _colour(DARK), worn("scarf", scarf - 0.07))
    image = _over(image, _colour((0.16, 0.36, 0.95)), worn("scarf", scarf))
    stripe = torch.maximum(scarf, ((u * 3.2) % 1.0 - 0.5).abs() - 0.2)
    image = _over(image, _colour((0.95, 0.97, 1.0)), worn("scarf", stripe))

    lens = torch.maximum(((u).abs() - 0.33).abs() - 0.27, (v + 0.12).abs() - 0.22)
    frame = torch.minimum(lens, box(0.0, -0.16, 0.9, 0.06))
    image = _over(image, _colour((0.03, 0.03, 0.05)), worn("glasses", frame))
    glint = torch.maximum(lens + 0.12, (u + v + 0.2).abs() - 0.06)
    image = _over(image, _colour((0.75, 0.85, 0.95)), worn("glasses", glint))

    tooth = ((u / 0.46 + 0.5) % 1.0 - 0.5).abs()
    crown = torch.maximum(u.abs() - 0.68, torch.maximum(v + 0.72, -1.38 + 0.92 * tooth - v))
    image = _over(image, _colour(DARK), worn("crown", crown - 0.08))
    image = _over(image, _colour((1.0, 0.84, 0.16)), worn("crown", crown))
    return _over(image, _colour((0.85, 0.1, 0.45)), worn("crown", torch.hypot(u, v + 0.86) - 0.11))


# the scene


def _backgrounds(scenes: Scenes, x: Tensor, y: Tensor) -> Tensor:
    """Return backgrounds [B, 3, H, W]."""
    draw = {
        "beach": _beach, "snow": _snow, "forest": _forest, "desert": _desert,
        "city": _city, "space": _space, "meadow": _meadow, "sea": _sea,
    }  # fmt: skip
    image = torch.empty(len(scenes), 3, y.shape[1], x.shape[2])
    for index, name in enumerate(SCENES):
        rows = (scenes.scene == index).nonzero().squeeze(1)
        if len(rows):
            a, b, c = scenes.variation[rows, :3].view(-1, 3, 1, 1).unbind(1)
            image[rows] = draw[name](x, y, a, b, c)
    return image


def _gradient(y: Tensor, top: tuple[float, float, float], bottom: tuple[float, float, float], rows: Tensor) -> Tensor:
    weight = (y / SIZE).unsqueeze(1).expand(len(rows), 1, y.shape[1], y.shape[1])
    return torch.lerp(_colour(top).expand(len(rows), 3, 1, 1), _colour(bottom).expand(len(rows), 3, 1, 1), weight)


def _paint(image: Tensor, rgb: tuple[float, float, float], distance: Tensor) -> Tensor:
    return _over(image, _colour(rgb), _soft(distance).expand(len(image), *image.shape[2:]))


def _beach(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    image = _gradient(y, (0.45, 0.78, 0.98), (0.80, 0.93, 1.0), a)
    image = _paint(image, (1.0, 0.88, 0.35), torch.hypot(x - 16 - 11 * a, y - 5) - 3)
    image = _paint(image, (0.13, 0.52, 0.80), 13.5 - y + 0 * x)
    image = _paint(image, (0.85, 0.95, 1.0), (y - 19.5 - 0.8 * torch.sin(x * 0.7 + 3 * b)).abs() - 0.7)
    return _paint(image, (0.95, 0.84, 0.58), 20.2 - y + 0.8 * torch.sin(x * 0.7 + 3 * b))


def _snow(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    image = _gradient(y, (0.62, 0.70, 0.82), (0.88, 0.92, 0.97), a)
    image = _paint(image, (0.97, 0.98, 1.0), 20 - y + 1.6 * torch.sin(x * 0.22 + 3 * a))
    flakes = torch.hypot((x + 1.3 * y + 5 * b) % 7.0 - 3.5, (y + 4 * c) % 6.0 - 3.0) - 0.7
    return _paint(image, (1.0, 1.0, 1.0), flakes)


def _forest(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    image = _gradient(y, (0.28, 0.46, 0.36), (0.16, 0.34, 0.22), a)
    image = _paint(image, (0.27, 0.17, 0.10), ((x + 4 * a) % 8.0 - 4.0).abs() - 0.9 + 0 * y)
    tree = torch.maximum(((x + 4 * a) % 8.0 - 4.0).abs() * 1.6 - (y + 2 * b) % 9.0 * 0.62, y - 21)
    image = _paint(image, (0.07, 0.27, 0.12), tree)
    return _paint(image, (0.20, 0.27, 0.11), 25 - y + 0.5 * torch.sin(x * 1.4 + 3 * c))


def _desert(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    image = _gradient(y, (0.99, 0.62, 0.35), (1.0, 0.86, 0.60), a)
    image = _paint(image, (0.86, 0.47, 0.22), 17 - y + 3.5 * torch.sin(x * 0.24 + 3 * a))
    image = _paint(image, (0.72, 0.35, 0.16), 23.5 - y + 2 * torch.sin(x * 0.2 + 2 + 3 * b))
    px = 16 + torch.where(c > 0, 12.5, -12.5)
    arm = torch.minimum((x - px).abs() - 1.0, torch.maximum((y - 16).abs() - 0.8, (x - px).abs() - 2.8))
    return _paint(image, (0.18, 0.42, 0.20), torch.maximum(arm, (y - 17).abs() - 6))


def _city(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    image = _gradient(y, (0.07, 0.06, 0.20), (0.32, 0.18, 0.42), a)
    shift = x + 6 * a
    height = 9 + 4 * torch.sin(torch.floor(shift / 6) * 2.4 + 6 * b)
    block = torch.maximum(height - y, (shift % 6.0 - 3.0).abs() - 2.6)
    image = _paint(image, (0.14, 0.13, 0.24), block)
    window = torch.maximum((shift % 6.0 - 3.0).abs() - 0.9, (y % 4.6 - 2.3).abs() - 0.9)
    image = _paint(image, (1.0, 0.83, 0.36), torch.maximum(window, block + 0.6))
    return _paint(image, (0.24, 0.24, 0.29), 27 - y + 0 * x + 0 * c)


def _space(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    image = _gradient(y, (0.02, 0.02, 0.08), (0.10, 0.04, 0.20), a)
    stars = torch.hypot((x + 2.3 * torch.floor(y / 6) + 4 * b) % 7.0 - 3.5, (y + 3 * c) % 6.0 - 3.0) - 0.55
    image = _paint(image, (0.95, 0.95, 1.0), stars)
    px = 16 + torch.where(a > 0, 11.0, -11.0)
    planet = torch.hypot(x - px, y - 6) - 3.4
    image = _paint(image, (0.45, 0.75, 0.75), planet)
    ring = (torch.hypot(x - px, (y - 6) * 3 + (x - px) * 0.8) - 5.2).abs() - 0.9
    return _paint(image, (0.92, 0.80, 0.60), ring)


def _meadow(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    image = _gradient(y, (0.55, 0.85, 1.0), (0.85, 0.96, 1.0), a)
    puff = torch.hypot((x - 16 - 10 * a) * 0.6, y - 5) - 2.2
    image = _paint(image, (1.0, 1.0, 1.0), puff)
    image = _paint(image, (0.42, 0.78, 0.30), 16.5 - y + 2 * torch.sin(x * 0.2 + 3 * b))
    bloom = torch.hypot((x + 2.5 * torch.floor(y / 5)) % 5.0 - 2.5, (y + 2 * c) % 5.0 - 2.5) - 0.85
    return _paint(image, (1.0, 0.55, 0.75), torch.maximum(bloom, 20 - y))


def _sea(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    image = _gradient(y, (0.10, 0.50, 0.72), (0.02, 0.16, 0.42), a)
    weed = torch.maximum(((x + 0.9 * torch.sin(y * 0.6) + 4 * a) % 9.0 - 4.5).abs() - 0.8, 15 + 4 * b - y)
    image = _paint(image, (0.05, 0.45, 0.33), weed)
    bubbles = (
        torch.hypot((x + 1.7 * torch.floor(y / 8) + 5 * c) % 9.0 - 4.5, (y + 3 * b) % 8.0 - 4.0) - 1.2
    ).abs() - 0.4
    image = _paint(image, (0.55, 0.85, 0.95), torch.maximum(bubbles, y - 22))
    return _paint(image, (0.62, 0.58, 0.42), 28.5 - y + 0.6 * torch.sin(x * 0.9))
