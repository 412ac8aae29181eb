import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from customized_grpo.algorithm import SDE_KINDS, Gaussian, gaussian_kl, ode_step, sde_step, shift_sigmas, transition

ETA = {"dance": 0.4, "flow": 0.7, "cps": 0.6}


def reference_step(kind, x, v, sigma, sigma_next, eta, next_x):
    """One sample as lists of floats, straight from the papers' formulas: mean, std, x0, mean log-density."""
    ds = sigma_next - sigma
    means, x0s, densities = [], [], []
    for xi, vi, ni in zip(x, v, next_x, strict=True):
        x0 = xi - sigma * vi
        if kind == "dance":
            score = -(xi - x0 * (1 - sigma)) / sigma**2
            mean = xi + ds * vi - 0.5 * eta**2 * score * ds
            std = eta * math.sqrt(-ds)
        elif kind == "flow":
            std_t = eta * math.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma)))
            mean = xi * (1 + std_t**2 / (2 * sigma) * ds) + vi * (1 + std_t**2 * (1 - sigma) / (2 * sigma)) * ds
            std = std_t * math.sqrt(-ds)
        else:
            std = sigma_next * math.sin(eta * math.pi / 2)
            x1 = xi + (1 - sigma) * vi
            mean = (1 - sigma_next) * x0 + math.sqrt(sigma_next**2 - std**2) * x1
        means.append(mean)
        x0s.append(x0)
        densities.append(-((ni - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi)))
    return means, std, x0s, sum(densities) / len(densities)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_schedule_follows_the_shift_formula():
    sigmas = shift_sigmas(25, 3.0)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (26,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    for i, sigma in enumerate(sigmas.tolist()):
        s = 1 - i / 25
        assert sigma == pytest.approx(3 * s / (1 + 2 * s), abs=1e-7)


def test_shift_one_is_linear():
    assert shift_sigmas(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(("steps", "shift"), [(0, 3.0), (-1, 3.0), (4, 0.0), (4, float("nan"))])
def test_schedule_rejects_nonsense(steps, shift):
    with pytest.raises(ValueError, match="must be"):
        shift_sigmas(steps, shift)


def test_ode_step_with_the_true_velocity_lands_on_the_line_between_data_and_noise():
    data, noise = draw(0, 3, 2, 4, 4), draw(1, 3, 2, 4, 4)
    sigma, sigma_next = torch.tensor([0.9, 0.5, 0.3]), torch.tensor([0.4, 0.2, 0.0])

    def along(s):
        return (1 - s.view(3, 1, 1, 1)) * data + s.view(3, 1, 1, 1) * noise

    arrived = ode_step(along(sigma), noise - data, sigma, sigma_next)
    torch.testing.assert_close(arrived, along(sigma_next), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", SDE_KINDS)
def test_sde_step_agrees_with_the_formulas(kind, dtype):
    sigmas, next_sigmas = [1.0, 0.85, 0.5, 0.11], [0.9862, 0.8, 0.4375, 0.03]
    x, v, noise = (draw(seed, 4, 3, 5, dtype=dtype) for seed in range(3))
    sigma, sigma_next = torch.tensor(sigmas, dtype=dtype), torch.tensor(next_sigmas, dtype=dtype)
    step = sde_step(x, v, sigma, sigma_next, kind=kind, eta=ETA[kind], noise=noise)

    assert step.std.shape == (4, 1, 1) and step.log_prob.shape == (4,)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for b in range(4):
        rows = [t[b].double().flatten().tolist() for t in (x, v, step.next_x)]
        mean, std, x0, log_prob = reference_step(
            kind, rows[0], rows[1], sigma[b].item(), sigma_next[b].item(), ETA[kind], rows[2]
        )
        assert step.mean[b].flatten().tolist() == pytest.approx(mean, rel=tolerance, abs=tolerance)
        assert step.x0[b].flatten().tolist() == pytest.approx(x0, rel=tolerance, abs=tolerance)
        assert step.std[b].item() == pytest.approx(std, rel=tolerance)
        # float32 rounds next_x - mean to about 1e-7 in units of std 0.05: a few 1e-6 for a single dimension.
        assert step.log_prob[b].item() == pytest.approx(log_prob, abs=5 * tolerance)
    torch.testing.assert_close(step.next_x, step.mean + step.std * noise)


@pytest.mark.parametrize("kind", SDE_KINDS)
@pytest.mark.parametrize("batch", [1, 2, 5, 12, 17])
def test_scoring_a_drawn_state_is_bitwise_the_draw_for_any_form_of_sigma_and_any_split(kind, batch):
    x, v, noise = (draw(seed, batch, 3, 8, 8) for seed in range(3))
    sigmas = shift_sigmas(10)
    sigma, sigma_next = sigmas[3], sigmas[4]
    arguments = {"kind": kind, "eta": ETA[kind]}
    drawn = sde_step(x, v, sigma.item(), sigma_next.item(), noise=noise, **arguments)
    for s, s_next in [(sigma, sigma_next), (sigma.repeat(batch), sigma_next.repeat(batch))]:
        scored = sde_step(x, v, s, s_next, next_x=drawn.next_x, **arguments)
        for name in ("next_x", "mean", "std", "log_prob", "x0"):
            assert torch.equal(getattr(scored, name), getattr(drawn, name)), name
    for b in range(batch):
        one = slice(b, b + 1)
        alone = sde_step(x[one], v[one], sigma, sigma_next, next_x=drawn.next_x[one], **arguments)
        assert torch.equal(alone.mean, drawn.mean[one]) and torch.equal(alone.std, drawn.std[one])
        torch.testing.assert_close(alone.log_prob, drawn.log_prob[one], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SDE_KINDS)
def test_log_prob_is_highest_at_the_mean_and_does_not_grow_with_dimensions(kind):
    def step_at_mean(size):
        x, v = draw(0, 2, size), draw(1, 2, size)
        return sde_step(x, v, 0.8, 0.7, kind=kind, eta=ETA[kind], noise=torch.zeros_like(x))

    small, large = step_at_mean(4), step_at_mean(400)
    std = small.std[0].item()
    peak = -math.log(std * math.sqrt(2 * math.pi))
    assert small.log_prob.tolist() == pytest.approx([peak] * 2, abs=1e-6)
    assert large.log_prob.tolist() == pytest.approx([peak] * 2, abs=1e-6)
    off = sde_step(draw(0, 2, 4), draw(1, 2, 4), 0.8, 0.7, kind=kind, eta=ETA[kind], next_x=small.mean + 2 * std)
    assert off.log_prob.tolist() == pytest.approx([peak - 2.0] * 2, abs=1e-5)


@pytest.mark.parametrize("kind", SDE_KINDS)
def test_log_prob_gradient_moves_the_mean_towards_the_state(kind):
    x, noise = draw(0, 3, 6, dtype=torch.float64), draw(2, 3, 6, dtype=torch.float64)
    v = draw(1, 3, 6, dtype=torch.float64).requires_grad_()
    step = sde_step(x, v, 0.6, 0.5, kind=kind, eta=ETA[kind], noise=noise)
    (gradient,) = torch.autograd.grad(step.log_prob.sum(), v)
    assert gradient.abs().min() > 0
    with torch.no_grad():
        better = sde_step(x, v + 1e-4 * gradient, 0.6, 0.5, kind=kind, eta=ETA[kind], next_x=step.next_x.detach())
    assert (better.log_prob > step.log_prob).all()
    assert ((better.mean - step.next_x).norm(dim=1) < (step.mean - step.next_x).norm(dim=1)).all()


@pytest.mark.parametrize("kind", SDE_KINDS)
def test_vanishing_noise_is_the_ode_step(kind):
    x, v = draw(0, 2, 5, dtype=torch.float64), draw(1, 2, 5, dtype=torch.float64)
    step = sde_step(x, v, 0.8, 0.6, kind=kind, eta=1e-5, noise=torch.ones_like(x))
    torch.testing.assert_close(step.mean, ode_step(x, v, 0.8, 0.6), rtol=0, atol=1e-9)
    torch.testing.assert_close(step.next_x, step.mean, rtol=0, atol=1e-4)


def test_half_precision_inputs_are_computed_in_float32_and_doubles_stay():
    x, v, noise = (draw(seed, 2, 6).bfloat16() for seed in range(3))
    low = sde_step(x, v, 0.8, 0.7, kind="dance", eta=0.4, noise=noise)
    full = sde_step(x.float(), v.float(), 0.8, 0.7, kind="dance", eta=0.4, noise=noise.float())
    for a, b in zip(low, full, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert ode_step(x, v, 0.8, 0.7).dtype == torch.float32
    assert ode_step(x.double(), v, 0.8, 0.7).dtype == torch.float64
    assert sde_step(x, v.double(), 0.8, 0.7, kind="flow", eta=0.4, noise=noise).log_prob.dtype == torch.float64


def test_flow_kind_at_pure_noise_uses_the_next_sigma():
    x, noise = draw(0, 1, 4), draw(1, 1, 4)
    step = sde_step(x, torch.zeros_like(x), 1.0, 0.96, kind="flow", eta=0.7, noise=noise)
    assert step.std.item() == pytest.approx(0.7 * math.sqrt(1 / 0.04) * math.sqrt(0.04), rel=1e-5)
    assert step.log_prob.isfinite().all()


def test_vectors_without_trailing_dimensions_are_samples_of_one_dimension():
    x, v, noise = draw(0, 5), draw(1, 5), draw(2, 5)
    flat = sde_step(x, v, 0.8, 0.7, kind="cps", eta=0.5, noise=noise)
    column = sde_step(x[:, None], v[:, None], 0.8, 0.7, kind="cps", eta=0.5, noise=noise[:, None])
    assert flat.std.shape == (5,)
    assert torch.equal(flat.log_prob, column.log_prob) and torch.equal(flat.next_x, column.next_x[:, 0])


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "euler"}, "unknown SDE kind 'euler'; choose one of dance, flow, cps"),
        ({"next_x": X}, "exactly one of noise .* and next_x"),
        ({"noise": None}, "exactly one of noise .* and next_x"),
        ({"eta": 0.0}, "use ode_step"),
        ({"eta": -0.1}, r"eta .* \(0, inf\), found -0.1"),
        ({"kind": "cps", "eta": 1.2}, r"eta .* \(0, 1\], found 1.2"),
        ({"kind": "cps", "sigma_next": 0.0}, "use ode_step"),
        ({"kind": "cps", "sigma_next": torch.tensor([0.1, 0.0])}, "use ode_step"),
        ({"sigma": 0.5, "sigma_next": 0.5}, "0 <= sigma_next < sigma <= 1"),
        ({"sigma": 0.2}, "0 <= sigma_next < sigma <= 1"),
        ({"sigma": 1.5}, "0 <= sigma_next < sigma <= 1"),
        ({"sigma": torch.tensor([0.9, 0.1])}, "0 <= sigma_next < sigma <= 1"),
        (
            {"sigma": torch.tensor([0.9, 0.9, 0.9])},
            r"sigma must be a scalar or hold one value per sample \[2\]",
        ),
        ({"noise": torch.zeros(2, 1)}, r"noise must have .* \[2, 3\], found \[2, 1\]"),
        ({"velocity": torch.zeros(3)}, r"velocity must have .* \[2, 3\], found \[3\]"),
    ],
)
def test_sde_step_rejects_nonsense(changes, message):
    arguments = {
        "x": X,
        "velocity": X,
        "sigma": 0.9,
        "sigma_next": 0.4,
        "kind": "dance",
        "eta": 0.4,
        "noise": X,
    }
    with pytest.raises(ValueError, match=message):
        sde_step(**(arguments | changes))


def test_dance_and_flow_have_a_density_on_the_last_step():
    for kind in ("dance", "flow"):
        assert sde_step(X, X, 0.1, 0.0, kind=kind, eta=0.4, noise=X).log_prob.isfinite().all()


def test_kl_is_the_closed_form_of_two_gaussians():
    a, b = draw(0, 3, 2, 4, dtype=torch.float64), draw(1, 3, 2, 4, dtype=torch.float64)
    std = torch.tensor([0.1, 0.5, 2.0])
    kl = gaussian_kl(a, b, std)
    for i in range(3):
        p, q = (torch.distributions.Normal(mean[i], std[i].double()) for mean in (a, b))
        assert kl[i].item() == pytest.approx(torch.distributions.kl_divergence(p, q).mean().item(), rel=1e-12)
    torch.testing.assert_close(gaussian_kl(a, b, std.view(3, 1, 1)), kl)
    torch.testing.assert_close(gaussian_kl(b, a, std), kl)
    assert gaussian_kl(a, a, 0.3).tolist() == [0.0] * 3
    assert gaussian_kl(a.bfloat16(), b.bfloat16(), 0.5).dtype == torch.float32
    with pytest.raises(ValueError, match="shape"):
        gaussian_kl(a, b[:1], 0.5)


def test_kl_is_the_expected_log_ratio():
    x, v, other = (draw(seed, 1, 3, dtype=torch.float64).repeat(40_000, 1) for seed in range(3))
    step = sde_step(x, v, 0.7, 0.5, kind="dance", eta=0.9, noise=draw(3, 40_000, 3, dtype=torch.float64))
    base = sde_step(x, other, 0.7, 0.5, kind="dance", eta=0.9, next_x=step.next_x)
    kl = gaussian_kl(step.mean, base.mean, step.std)
    assert (step.log_prob - base.log_prob).mean().item() == pytest.approx(kl[0].item(), rel=0.05)


class GaussianData:
    """Data N(centre, spread^2): marginals and exact velocity are known in closed form at every sigma."""

    centre, spread = 1.5, 0.4

    def marginal(self, sigma: float) -> tuple[float, float]:
        return (1 - sigma) * self.centre, (1 - sigma) ** 2 * self.spread**2 + sigma**2

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        mean, variance = self.marginal(sigma)
        centred = (x - mean) / variance
        expected_x0 = self.centre + (1 - sigma) * self.spread**2 * centred
        expected_x1 = sigma * centred
        return expected_x1 - expected_x0


def schedule(kind: str, steps: int) -> tuple[list[float], float]:
    """Sigmas and eta. Flow-SDE starts below its pole; CPS needs its eta to shrink along with its steps."""
    top = 0.95 if kind == "flow" else 1.0
    sigmas = [top * (1 - i / steps) for i in range(steps)]
    return [*sigmas, 0.0], 0.8 if kind != "cps" else 1.5 / math.sqrt(steps)


def final_moments(kind: str, steps: int) -> tuple[float, float]:
    """Exact mean and variance at sigma 0: a step is affine in x, so two probes tell what it does to them."""
    data, (sigmas, eta) = GaussianData(), schedule(kind, steps)
    mean, variance = data.marginal(sigmas[0])
    probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for i, sigma in enumerate(sigmas[:-1]):
        velocity = data.velocity(probes, sigma)
        if kind == "ode" or sigmas[i + 1] == 0:
            arrived, noise = ode_step(probes, velocity, sigma, sigmas[i + 1]), 0.0
        else:
            step = sde_step(probes, velocity, sigma, sigmas[i + 1], kind=kind, eta=eta, noise=torch.zeros_like(probes))
            arrived, noise = step.mean, step.std[0].item()
        offset, slope = arrived[0].item(), (arrived[1] - arrived[0]).item()
        mean, variance = slope * mean + offset, slope**2 * variance + noise**2
    return mean, variance


@pytest.mark.parametrize("kind", ["ode", *SDE_KINDS])
def test_every_sampler_converges_to_the_data_distribution(kind):
    errors = []
    for steps in (150, 600):
        mean, variance = final_moments(kind, steps)
        errors.append((abs(mean - GaussianData.centre), abs(variance - GaussianData.spread**2)))
    assert errors[1][0] < 4e-3 and errors[1][1] < 4e-3
    # First order in the step size: four times the steps, about a quarter of the error.
    assert errors[1][1] < 0.4 * errors[0][1]


@pytest.mark.parametrize("kind", SDE_KINDS)
def test_sampled_trajectories_have_the_moments_of_the_ode(kind):
    data, (sigmas, eta) = GaussianData(), schedule(kind, 200)
    generator = torch.Generator().manual_seed(7)
    mean, variance = data.marginal(sigmas[0])
    start = mean + math.sqrt(variance) * torch.randn(20_000, 1, generator=generator)
    walked = flowed = start
    for i, sigma in enumerate(sigmas[:-1]):
        flowed = ode_step(flowed, data.velocity(flowed, sigma), sigma, sigmas[i + 1])
        velocity = data.velocity(walked, sigma)
        if sigmas[i + 1] == 0:
            walked = ode_step(walked, velocity, sigma, 0.0)
            continue
        noise = torch.randn(walked.shape, generator=generator)
        walked = sde_step(walked, velocity, sigma, sigmas[i + 1], kind=kind, eta=eta, noise=noise).next_x
    assert walked.mean().item() == pytest.approx(flowed.mean().item(), abs=0.02)
    assert walked.var().item() == pytest.approx(flowed.var().item(), rel=0.06)
    # Not the same samples: the noise of the walk has replaced a good part of the starting noise.
    correlation = torch.corrcoef(torch.stack([walked[:, 0], flowed[:, 0]]))[0, 1]
    assert correlation < 0.9


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(SDE_KINDS),
    sigma=st.floats(0.05, 1.0),
    fraction=st.floats(0.05, 0.95),
    eta=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
)
def test_any_step_agrees_with_the_formulas_in_double(kind, sigma, fraction, eta, seed):
    rng = random.Random(seed)
    x, v, target = ([rng.gauss(0, 1) for _ in range(4)] for _ in range(3))
    sigma_next = sigma * fraction
    if kind == "flow" and 0.999 < sigma < 1:
        sigma = 0.999
    mean, std, x0, log_prob = reference_step(kind, x, v, sigma, sigma_next, eta, target)
    rows = [torch.tensor([row], dtype=torch.float64) for row in (x, v, target)]
    step = sde_step(rows[0], rows[1], sigma, sigma_next, kind=kind, eta=eta, next_x=rows[2])
    assert step.mean[0].tolist() == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert step.std.item() == pytest.approx(std, rel=1e-9)
    assert step.x0[0].tolist() == pytest.approx(x0, rel=1e-9, abs=1e-9)
    assert step.log_prob.item() == pytest.approx(log_prob, rel=1e-8, abs=1e-8)


# the transition as a distribution


def gaussian(kind: str, dtype: torch.dtype = torch.float64) -> Gaussian:
    x, v = draw(0, 3, 2, 4, dtype=dtype), draw(1, 3, 2, 4, dtype=dtype)
    return transition(x, v, torch.tensor([0.9, 0.5, 0.3]), torch.tensor([0.8, 0.3, 0.1]), kind=kind, eta=ETA[kind])


@pytest.mark.parametrize("kind", SDE_KINDS)
def test_a_transition_is_torchs_normal(kind):
    found, noise, other = gaussian(kind), draw(2, 3, 2, 4, dtype=torch.float64), draw(3, 3, 2, 4, dtype=torch.float64)
    expected = torch.distributions.Normal(found.mean, found.std.expand_as(found.mean))
    torch.testing.assert_close(found.sample(noise), expected.loc + expected.scale * noise, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.log_prob(other), expected.log_prob(other).mean((1, 2)), rtol=1e-12, atol=1e-12)
    away = torch.distributions.Normal(other, expected.scale)
    kl = torch.distributions.kl_divergence(expected, away).mean((1, 2))
    torch.testing.assert_close(found.kl(Gaussian(other, found.std)), kl, rtol=1e-12, atol=1e-12)
    assert found.kl(found).tolist() == [0.0] * 3


@pytest.mark.parametrize("kind", SDE_KINDS)
def test_the_log_density_of_a_drawn_state_is_that_of_its_noise(kind):
    found, noise = gaussian(kind), draw(2, 3, 2, 4, dtype=torch.float64)
    expected = -0.5 * noise.square().mean((1, 2)) - found.std.flatten().log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(found.log_prob(found.sample(noise)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", SDE_KINDS)
def test_sde_step_is_the_transition_to_the_bit(kind, dtype):
    x, v, noise = (draw(seed, 4, 3, 5, dtype=dtype) for seed in range(3))
    v.requires_grad_()
    arguments = {"kind": kind, "eta": ETA[kind]}
    found = transition(x, v, 0.85, 0.8, **arguments)
    for state in ({"noise": noise}, {"next_x": found.sample(noise)}):
        step = sde_step(x, v, 0.85, 0.8, **arguments, **state)
        assert torch.equal(step.next_x, found.sample(noise)) and torch.equal(step.mean, found.mean)
        assert torch.equal(step.std, found.std.to(dtype)) and torch.equal(step.log_prob, found.log_prob(step.next_x))
        gradients = [torch.autograd.grad(p.sum(), v, retain_graph=True)[0]
                     for p in (step.log_prob, found.log_prob(found.sample(noise)))]  # fmt: skip
        assert torch.equal(*gradients) and gradients[0].abs().min() > 0


def test_a_state_of_another_shape_is_refused():
    found = gaussian("dance")
    for call, name in ((found.sample, "noise"), (found.log_prob, "x")):
        with pytest.raises(ValueError, match=rf"{name} must have .* \[3, 2, 4\], found \[3, 4\]"):
            call(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="shape"):
        found.kl(Gaussian(torch.zeros(3, 4), found.std))
