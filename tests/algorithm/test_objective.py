import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_grpo.algorithm import clipped_objective


def reference(new, old, advantages, clip):
    """Losses one by one, as PPO writes them: minus the smaller of the two surrogates."""
    losses, ratios = [], []
    for n, o, a in zip(new, old, advantages, strict=True):
        ratio = math.exp(n - o)
        losses.append(-min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a))
        ratios.append(ratio)
    clipped = sum(abs(r - 1) > clip for r in ratios) / len(ratios)
    return sum(losses) / len(losses), sum(ratios) / len(ratios), min(ratios), max(ratios), clipped


def example(*shape, spread=0.2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(*shape, generator=generator, dtype=torch.float64)
    new = old + spread * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (
        new.to(dtype),
        old.to(dtype),
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype),
    )


@pytest.mark.parametrize("clip", [1e-4, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_objective_agrees_with_the_formula(clip, dtype):
    new, old, advantages = example(6, 5, dtype=dtype)
    result = clipped_objective(new, old, advantages, clip)
    expected = reference(*(t.double().flatten().tolist() for t in (new, old, advantages)), clip)
    assert [v.item() for v in result] == pytest.approx(list(expected), abs=1e-6 if dtype == torch.float32 else 1e-12)
    assert all(v.ndim == 0 and v.dtype == dtype for v in result)


lists = st.integers(1, 8).flatmap(
    lambda n: st.tuples(*(st.lists(st.floats(low, high), min_size=n, max_size=n) for low, high in ((-1, 1),) * 3))
)


@settings(deadline=None, max_examples=60)
@given(lists, st.floats(1e-4, 0.5))
def test_objective_agrees_with_the_formula_on_anything(values, clip):
    result = clipped_objective(*(torch.tensor(v, dtype=torch.float64) for v in values), clip)
    assert [v.item() for v in result[:4]] == pytest.approx(list(reference(*values, clip))[:4], abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_pass_has_ratio_exactly_one_and_the_plain_policy_gradient(dtype):
    old = example(4, 3, dtype=dtype)[1]
    advantages = example(4, 3, dtype=torch.float32)[2]
    new = old.clone().requires_grad_()
    result = clipped_objective(new, old, advantages, 1e-4)
    assert (result.ratio_mean, result.ratio_min, result.ratio_max) == (1, 1, 1)
    assert result.clip_fraction == 0 and result.loss.dtype == torch.float32
    result.loss.backward()
    torch.testing.assert_close(new.grad.float(), -advantages / 12, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("shift", "advantage", "moves"),
    [(0.0, 1.0, -1), (0.0, -1.0, 1), (0.5, 1.0, 0), (-0.5, 1.0, -1), (0.5, -1.0, 1), (-0.5, -1.0, 0)],
)
def test_gradient_pushes_good_samples_up_and_bad_ones_down_until_the_clip(shift, advantage, moves):
    new = torch.tensor([0.3 + shift], requires_grad=True)
    clipped_objective(new, torch.tensor([0.3]), torch.tensor([advantage]), 0.2).loss.backward()
    assert torch.sign(new.grad).item() == moves


def test_only_the_new_log_prob_learns_and_diagnostics_are_detached():
    new, old, advantages = (t.requires_grad_() for t in example(4))
    result = clipped_objective(new, old, advantages, 0.1)
    result.loss.backward()
    assert new.grad is not None and old.grad is None and advantages.grad is None
    assert not any(v.requires_grad for v in result[1:])


def test_micro_batches_weighted_by_size_add_up_to_the_whole():
    new, old, advantages = example(7, 4)
    kl = example(7, 4)[0].square()
    whole = clipped_objective(new, old, advantages, 0.1, kl=kl, kl_weight=0.3).loss
    parts = torch.tensor(0.0, dtype=torch.float64)
    for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):
        part = clipped_objective(new[rows], old[rows], advantages[rows], 0.1, kl=kl[rows], kl_weight=0.3)
        parts = parts + part.loss * new[rows].numel() / new.numel()
    torch.testing.assert_close(parts, whole)


def test_kl_adds_its_weighted_mean_and_its_gradient():
    new, old, advantages = example(5)
    kl = torch.arange(5.0, dtype=torch.float64).requires_grad_()
    plain = clipped_objective(new, old, advantages, 0.1)
    penalised = clipped_objective(new, old, advantages, 0.1, kl=kl, kl_weight=0.25)
    assert penalised.loss.item() == pytest.approx(plain.loss.item() + 0.25 * 2.0)
    penalised.loss.backward()
    assert kl.grad.tolist() == pytest.approx([0.05] * 5)
    assert torch.equal(clipped_objective(new, old, advantages, 0.1, kl=kl, kl_weight=0.0).loss, plain.loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"advantages": torch.zeros(3, 1)},
            r"advantages must have the shape of log_prob \[3\], found \[3, 1\]",
        ),
        ({"old_log_prob": torch.zeros(1)}, "old_log_prob must have the shape"),
        ({"kl": torch.zeros(2)}, "kl must have the shape"),
        ({"clip_range": 0.0}, "clip_range must be greater than 0"),
        ({"clip_range": float("nan")}, "clip_range must be greater than 0"),
        ({"kl_weight": -1.0}, "kl_weight must not be negative"),
        ({"kl_weight": 0.1}, "no kl was given"),
        (dict.fromkeys(("log_prob", "old_log_prob", "advantages"), torch.zeros(0)), "no elements"),
    ],
)
def test_objective_rejects_nonsense(changes, message):
    zeros = torch.zeros(3)
    arguments = {"log_prob": zeros, "old_log_prob": zeros, "advantages": zeros, "clip_range": 0.1}
    with pytest.raises(ValueError, match=message):
        clipped_objective(**(arguments | changes))
