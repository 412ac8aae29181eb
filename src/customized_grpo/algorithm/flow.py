"""Rectified flow, one step at a time: sigma schedule, ODE step, Gaussian transitions of the SDE samplers.

Conventions: `x = (1 - sigma) x0 + sigma x1` with data `x0`, noise `x1 ~ N(0, I)`, and velocity `v = x1 - x0`.
Sampling walks sigma from 1 (noise) down to 0 (data), so `ds = sigma_next - sigma` is negative.

Everything is computed in float32 (float64 where an input is float64), whatever precision the model ran in.
What depends on sigma alone is worked out per sample in float64 and rounded once, so that a scalar sigma, a
`[B]` sigma and any split of a batch give bitwise the same coefficients, and the first-pass ratio stays
exactly 1.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

SdeKind = Literal["dance", "flow", "cps"]
SDE_KINDS: tuple[str, ...] = get_args(SdeKind)


class SdeStep(NamedTuple):
    """One stochastic step, `next_x ~ N(mean, std^2 I)`.

    next_x: `[B, ...]` the next state, drawn or as given.
    mean: `[B, ...]` carries the gradient to the velocity.
    std: `[B, 1, ..., 1]`, broadcasts against `x`.
    log_prob: `[B]` log-density of `next_x`, the mean over its dimensions (not the sum), in nats.
    x0: `[B, ...]` the clean sample predicted from `x`.
    """

    next_x: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor
    x0: Tensor


def shift_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """Noise levels of a sampling run, `[num_steps + 1]` float32 falling from 1 to 0.

    `linspace(1, 0)` moved by `shift s / (1 + (shift - 1) s)`: a shift above 1 spends more steps at high noise
    (SD3, arXiv 2403.03206, section 5.3.2). Raises ValueError if `num_steps < 1` or `shift <= 0`.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, found {num_steps}")
    if not shift > 0:
        raise ValueError(f"shift must be greater than 0, found {shift}")
    s = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).float()


def ode_step(x: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """Take the deterministic Euler step `x + (sigma_next - sigma) velocity`, `[B, ...]` in float32 or float64.

    `sigma`, `sigma_next`: a float, a 0-d tensor or one value per sample `[B]`. Raises ValueError on unequal shapes and
    unless `0 <= sigma_next < sigma <= 1` (not checked for sigmas on an accelerator: the check would wait for it).
    """
    dtype = _compute_dtype(x, velocity)
    _check_shapes(x, velocity=velocity)
    _check_sigmas(sigma, sigma_next)
    ds = _per_sample(sigma_next, x, "sigma_next") - _per_sample(sigma, x, "sigma")
    return x.to(dtype) + ds.to(dtype) * velocity.to(dtype)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The distribution `N(mean, std^2 I)` of the next state of each sample.

    mean: `[B, ...]` float32 or float64; carries the gradient to the velocity.
    std: `[B, 1, ..., 1]` float64 (float32 on MPS), rounded to the type of `mean` where the two meet.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return the state `mean + std noise`, `[B, ...]`, for standard normal `noise` of its shape."""
        _check_shapes(self.mean, noise=noise)
        return self.mean + self.std.to(self.mean.dtype) * noise.to(self.mean.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density `[B]` of the states `x`, in nats, the mean over dimensions (not the sum).

        The gradient reaches the mean only: `x` counts as data.
        """
        _check_shapes(self.mean, x=x)
        z = (x.detach().to(self.mean.dtype) - self.mean) / self.std.to(self.mean.dtype)
        normaliser = torch.log(self.std.flatten()) + 0.5 * math.log(2 * math.pi)
        return -0.5 * _mean_over_dims(z.square()) - normaliser.to(self.mean.dtype)

    def kl(self, other: "Gaussian") -> Tensor:
        """Return the KL divergence `[B]` from `other`, which has the same std, as `gaussian_kl` does."""
        return gaussian_kl(self.mean, other.mean, self.std)


def transition(
    x: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, *, kind: str, eta: float
) -> Gaussian:
    """Return the distribution of the next state of a stochastic step from `sigma` to `sigma_next`.

    `x`, `velocity`: `[B, ...]`. `sigma`, `sigma_next`: a float, a 0-d tensor or `[B]`. `eta > 0` scales the noise;
    `kind` names the transition kernel:

    * `"dance"`: reverse SDE with constant diffusion `g = eta` (DanceGRPO, arXiv 2505.07818; the paper's, eta
      0.4);
    * `"flow"`: the same SDE with `g = eta sqrt(sigma / (1 - sigma))` (Flow-GRPO, arXiv 2505.05470, eq. 9). As
      in its published code, the pole at sigma = 1 is avoided by putting `sigma_next` under the root there;
    * `"cps"`: coefficient-preserving sampling (arXiv 2509.05952), `std = sigma_next sin(eta pi / 2)`, `0 <
      eta <= 1`. Its published code drops the normaliser and the variance from the log-probability; here it is
      the Gaussian log-density, as for the other two.

    Raises ValueError on an unknown kind, eta out of range, unequal shapes, sigmas not as in `ode_step`, and on a step
    without noise (eta 0; cps into sigma 0), which has no density.
    """
    _check_kind(kind, eta)
    _check_shapes(x, velocity=velocity)
    _check_sigmas(sigma, sigma_next)
    if kind == "cps" and _known(sigma_next) and bool((torch.as_tensor(sigma_next) == 0).any()):
        raise ValueError("a cps step to sigma_next = 0 adds no noise and has no log-probability: use ode_step for it")

    dtype = _compute_dtype(x, velocity)
    x, v = x.to(dtype), velocity.to(dtype)
    s, s_next = _per_sample(sigma, x, "sigma"), _per_sample(sigma_next, x, "sigma_next")
    x1 = x + (1 - s).to(dtype) * v
    if kind == "cps":
        x0 = x - s.to(dtype) * v
        mean = (1 - s_next).to(dtype) * x0 + (s_next * math.cos(eta * math.pi / 2)).to(dtype) * x1
        return Gaussian(mean, s_next * math.sin(eta * math.pi / 2))
    # The score is -(x - (1 - sigma) x0) / sigma^2 = -x1 / sigma; only the first cancels at small sigma.
    ds = s_next - s
    g: float | Tensor = eta if kind == "dance" else eta * torch.sqrt(s / (1 - torch.where(s == 1, s_next, s)))
    mean = x + ds.to(dtype) * v + (0.5 * g**2 * ds / s).to(dtype) * x1
    return Gaussian(mean, g * torch.sqrt(-ds))


def sde_step(
    x: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    kind: str,
    eta: float,
    noise: Tensor | None = None,
    next_x: Tensor | None = None,
) -> SdeStep:
    """Take a stochastic step, or score one taken before, with the log-probability of the state it arrives at.

    Give `noise` (standard normal, shaped as `x`) to draw the next state from `transition`, or `next_x` to score one
    drawn before: exactly one of the two. Errors as in `transition`, and ValueError on both or neither.
    """
    if (noise is None) == (next_x is None):
        raise ValueError("give exactly one of noise (to draw the next state) and next_x (to score a given one)")
    gaussian = transition(x, velocity, sigma, sigma_next, kind=kind, eta=eta)
    dtype = gaussian.mean.dtype
    if next_x is None:
        assert noise is not None
        next_x = gaussian.sample(noise)
    _check_shapes(x, next_x=next_x)
    next_x = next_x.to(dtype)
    x0 = x.to(dtype) - _per_sample(sigma, x, "sigma").to(dtype) * velocity.to(dtype)
    return SdeStep(next_x, gaussian.mean, gaussian.std.to(dtype), gaussian.log_prob(next_x), x0)


def gaussian_kl(mean_a: Tensor, mean_b: Tensor, std: float | Tensor) -> Tensor:
    """Return the KL divergence of two Gaussians with the same `std`: `mean((mean_a - mean_b)^2) / (2 std^2)`, `[B]`.

    In nats, the mean over dimensions as for log-probabilities; symmetric in the means `[B, ...]`. `std`: a
    float, a 0-d tensor, `[B]`, or `[B, 1, ..., 1]` as in a `Gaussian`. Raises ValueError on unequal
    shapes.
    """
    _check_shapes(mean_a, mean_b=mean_b)
    dtype = _compute_dtype(mean_a, mean_b)
    z = (mean_a.to(dtype) - mean_b.to(dtype)) / _per_sample(std, mean_a, "std").to(dtype)
    return 0.5 * _mean_over_dims(z.square())


def _mean_over_dims(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], -1).mean(dim=1)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _per_sample(value: float | Tensor, x: Tensor, name: str) -> Tensor:
    """Return `value` as `[B, 1, ..., 1]` on the device of `x`, in float64 (float32 on MPS, which has no float64)."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    batch, shape = x.shape[0], (x.shape[0],) + (1,) * (x.ndim - 1)
    if not isinstance(value, Tensor):
        return torch.full(shape, value, dtype=dtype, device=x.device)
    if value.ndim and value.shape not in ((batch,), shape):
        raise ValueError(f"{name} must be a scalar or hold one value per sample [{batch}], found {list(value.shape)}")
    value = value.to(x.device, dtype)
    return value.expand(shape).contiguous() if value.ndim == 0 else value.reshape(shape)


def _known(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _check_sigmas(sigma: float | Tensor, sigma_next: float | Tensor) -> None:
    if not (_known(sigma) and _known(sigma_next)):
        return
    s, s_next = torch.as_tensor(sigma).double().flatten(), torch.as_tensor(sigma_next).double().flatten()
    if not bool(((s_next >= 0) & (s_next < s) & (s <= 1)).all()):
        raise ValueError(f"expected 0 <= sigma_next < sigma <= 1, found sigma={sigma}, sigma_next={sigma_next}")


def _check_kind(kind: str, eta: float) -> None:
    if kind not in SDE_KINDS:
        raise ValueError(f"unknown SDE kind {kind!r}; choose one of {', '.join(SDE_KINDS)}")
    if eta == 0:
        raise ValueError("eta = 0 adds no noise, and a step without noise has no log-probability: use ode_step for it")
    if not 0 < eta < math.inf or (kind == "cps" and eta > 1):
        raise ValueError(f"eta for kind {kind!r} must be in {'(0, 1]' if kind == 'cps' else '(0, inf)'}, found {eta}")


def _check_shapes(x: Tensor, /, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.shape != x.shape:
            raise ValueError(
                f"{name} must have the shape of its counterpart {list(x.shape)}, found {list(other.shape)}"
            )
