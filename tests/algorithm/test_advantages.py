import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from customized_grpo.algorithm import (
    NORMALISERS,
    SHAPERS,
    clamp_advantages,
    combine_advantages,
    conflict_rate,
    constant_weights,
    group_advantages,
    group_then_batch_advantages,
    hinge_rewards,
    quadrants,
    rank_advantages,
    silent_groups,
    step_advantages,
    synergy_shaping,
    table_weights,
    time_weights,
    weigh_advantages,
)

NAN = float("nan")


def zscores(values: list[float]) -> list[float]:
    """Reference: plain z-scores of at least two different numbers, sample std."""
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return [(v - mean) / (std + 1e-8) for v in values]


def over_groups(rewards: Tensor, valid: Tensor, score) -> Tensor:
    """Reference: `score` on the list of valid rewards of each group and reward, everything else 0."""
    out = torch.zeros_like(rewards, dtype=torch.float64)
    for p, r in itertools.product(range(rewards.shape[0]), range(rewards.shape[2])):
        kept = [g for g in range(rewards.shape[1]) if valid[p, g, r]]
        values = [rewards[p, g, r].item() for g in kept]
        if len(set(values)) > 1:
            for g, a in zip(kept, score(values), strict=True):
                out[p, g, r] = a
    return out


def example(seed=0, prompts=3, group=6, rewards=2, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(prompts, group, rewards, generator=generator, dtype=torch.float64) + 5
    valid = torch.rand(prompts, group, rewards, generator=generator) > 0.25
    return values.to(dtype), valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_group_advantages_are_z_scores_of_each_group(dtype, masked):
    rewards, valid = example(dtype=dtype)
    valid = valid if masked else torch.ones_like(valid)
    advantages = group_advantages(rewards, valid if masked else None)
    assert advantages.dtype == dtype
    expected = over_groups(rewards, valid, zscores)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(advantages.double(), expected, rtol=0, atol=tolerance)


def test_group_then_batch_rescales_each_reward_over_the_whole_batch():
    rewards, valid = example(prompts=4)
    rewards[1, :, 0] = 2.5
    advantages = group_then_batch_advantages(rewards, valid)
    per_group = over_groups(rewards, valid, zscores)
    for r in range(2):
        entries = valid[:, :, r].nonzero().tolist()
        scores = zscores([per_group[p, g, r].item() for p, g in entries])
        for (p, g), expected in zip(entries, scores, strict=True):
            assert advantages[p, g, r].item() == pytest.approx(expected, abs=1e-9)
    assert (advantages[1, :, 0] == 0).all() and (advantages[~valid] == 0).all()
    spoken = advantages[:, :, 0][valid[:, :, 0]]
    assert spoken.std().item() == pytest.approx(1)
    assert advantages[0, :, 0].abs().max() > group_advantages(rewards, valid)[0, :, 0].abs().max()


def test_rank_advantages_share_tied_ranks_and_have_unit_std():
    rewards = torch.tensor([[[10.0], [1000.0], [-3.0], [10.0]]])
    ranks = [1.5, 3.0, 0.0, 1.5]
    assert rank_advantages(rewards).flatten().tolist() == pytest.approx(zscores(ranks), abs=1e-6)
    same_order = torch.tensor([[[0.2], [0.3], [0.1], [0.2]]])
    torch.testing.assert_close(rank_advantages(same_order), rank_advantages(rewards))


def test_rank_advantages_leave_invalid_samples_out():
    rewards, valid = example(seed=4)
    rewards[0, 0, 0] = rewards[0, 1, 0]

    def ranked(values):
        return zscores([sum(o < v for o in values) + (values.count(v) - 1) / 2 for v in values])

    torch.testing.assert_close(rank_advantages(rewards, valid), over_groups(rewards, valid, ranked))


@pytest.mark.parametrize("name", NORMALISERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_groups_that_say_nothing_get_exactly_zero(name, dtype):
    normalise = NORMALISERS[name]
    equal = torch.full((2, 12, 2), 7).to(dtype)
    assert (normalise(equal) == 0).all()
    assert (normalise(torch.tensor([[[3, 4]]]).to(dtype)) == 0).all()
    rewards = torch.arange(8).view(1, 4, 2).to(dtype)
    assert (normalise(rewards, torch.zeros(1, 4, 2, dtype=torch.bool)) == 0).all()
    only_one = torch.zeros(1, 4, 2, dtype=torch.bool)
    only_one[0, 1] = True
    assert (normalise(rewards, only_one) == 0).all()


@pytest.mark.parametrize("name", NORMALISERS)
def test_round_off_is_not_a_difference(name):
    base = torch.full((1, 12, 1), 71.3)
    noise = torch.linspace(-1, 1, 12).view(1, 12, 1) * 2e-5
    jittered = base + noise
    assert jittered.unique().numel() > 1
    assert (NORMALISERS[name](jittered) == 0).all()
    assert (NORMALISERS[name](base + 100 * noise) != 0).any()


@pytest.mark.parametrize("name", NORMALISERS)
@pytest.mark.parametrize("junk", [NAN, float("inf"), 1e30, -4.0])
def test_what_stands_in_an_invalid_entry_does_not_matter(name, junk):
    rewards, valid = example(seed=1)
    clean = NORMALISERS[name](torch.where(valid, rewards, 0.0), valid)
    dirty = NORMALISERS[name](torch.where(valid, rewards, junk), valid)
    assert torch.equal(clean, dirty)
    assert (dirty[~valid] == 0).all() and (dirty[valid] != 0).any()


def test_invalid_samples_leave_the_group_as_if_never_drawn():
    rewards, _ = example(seed=2, prompts=1, group=7)
    valid = torch.ones_like(rewards, dtype=torch.bool)
    valid[0, [2, 5]] = False
    kept = [0, 1, 3, 4, 6]
    weights = time_weights(25)
    whole = step_advantages(rewards, gamma=0.4, weights=weights, valid=valid)
    smaller = step_advantages(rewards[:, kept], gamma=0.4, weights=weights)
    torch.testing.assert_close(whole[:, kept], smaller)


@pytest.mark.parametrize(
    ("rewards", "valid", "message"),
    [
        (torch.zeros(4, 2), None, r"\[prompts, group, rewards\], found \[4, 2\]"),
        (
            torch.zeros(1, 4, 2),
            torch.ones(1, 4, dtype=torch.bool),
            r"valid must be bool of shape \[1, 4, 2\]",
        ),
        (torch.zeros(1, 4, 2), torch.ones(1, 4, 2), "valid must be bool"),
        (torch.tensor([[[1.0, 2.0], [1.0, NAN]]]), None, r"rewards\[0, 1, 1\] is nan"),
        (torch.tensor([[[1.0, 2.0], [-float("inf"), 0.0]]]), None, r"rewards\[0, 1, 0\] is -inf"),
    ],
)
@pytest.mark.parametrize("name", NORMALISERS)
def test_normalisers_reject_nonsense(name, rewards, valid, message):
    with pytest.raises(ValueError, match=message):
        NORMALISERS[name](rewards, valid)


@pytest.mark.parametrize(
    ("prompt", "identity", "expected"),
    [(0.9, 0.5, 0.1688), (0.9, -0.7, -0.2232), (-0.7, 0.9, -0.2232), (-0.5, -0.6, -0.1165), (0.0, 0.8, 0.0)],
)
def test_synergy_of_the_worked_examples(prompt, identity, expected):
    bonus = synergy_shaping(torch.tensor([[[prompt, identity]]]), 0.4)
    assert bonus.shape == (1, 1)
    assert bonus.item() == pytest.approx(expected, abs=5e-5)


def test_synergy_of_many_rewards_is_the_mean_over_pairs():
    advantages, _ = example(rewards=4)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for p, g in itertools.product(range(3), range(6)):
        terms = []
        for a, b in itertools.combinations(advantages[p, g].tolist(), 2):
            terms.append((1 if a > 0 or b > 0 else -1) * math.tanh(a * b))
        expected[p, g] = 0.7 * sum(terms) / 6
    torch.testing.assert_close(synergy_shaping(advantages, 0.7), expected)


def test_synergy_needs_two_rewards():
    with pytest.raises(ValueError, match="at least 2, found 1"):
        synergy_shaping(torch.zeros(1, 4, 1), 0.4)


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


@pytest.mark.parametrize(
    ("name", "collapse", "renormalise"),
    [
        ("min", min, False),
        ("max", max, False),
        ("harmonic", lambda a: len(a) / sum(1 / sigmoid(x) for x in a), True),
        ("product", lambda a: math.prod(sigmoid(x) for x in a), True),
    ],
)
def test_collapsing_shapers_put_one_signal_in_every_channel(name, collapse, renormalise):
    rewards, valid = example(rewards=3)
    advantages = group_advantages(rewards, valid)
    shaped = SHAPERS[name](advantages, valid, 0.4)
    assert (shaped.bonus == 0).all() and shaped.bonus.shape == (3, 6)
    usable = valid.all(dim=-1)
    assert 2 < usable.sum() < usable.numel()
    for p in range(3):
        kept = [g for g in range(6) if usable[p, g]]
        signal = [collapse(advantages[p, g].tolist()) for g in kept]
        if renormalise:
            signal = zscores(signal) if len(kept) > 1 else [0.0] * len(kept)
        for g, e in zip(kept, signal, strict=True):
            assert shaped.advantages[p, g].tolist() == pytest.approx([e] * 3, abs=1e-9)
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]])
    weighed = weigh_advantages(shaped.advantages, weights, shaped.bonus)
    torch.testing.assert_close(weighed[..., 0], weighed[..., 1])


@pytest.mark.parametrize("name", ["harmonic", "product"])
def test_means_of_positive_numbers_rank_both_bad_last_and_survive_extremes(name):
    advantages = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]])
    valid = torch.ones_like(advantages, dtype=torch.bool)
    signal = SHAPERS[name](advantages, valid, 0.4).advantages[0, :, 0]
    assert signal[0] > signal[1] == signal[2] > signal[3]
    assert signal.mean().item() == pytest.approx(0, abs=1e-6)
    extreme = SHAPERS[name](150 * advantages, valid, 0.4).advantages
    assert extreme.isfinite().all()


def test_hinge_stops_counting_at_the_threshold():
    rewards = torch.tensor([[[1.0, 60.0], [2.0, 70.0], [3.0, 90.0]]])
    hinged = hinge_rewards(rewards, [float("inf"), 70.0])
    assert hinged.tolist() == [[[1.0, 60.0], [2.0, 70.0], [3.0, 70.0]]]
    options = {"weights": constant_weights(1, [0.0, 1.0]), "shape": "none"}
    advantages = combine_advantages(rewards, thresholds=[float("inf"), 70.0], **options)[0, :, 0]
    assert advantages[1] == advantages[2] > advantages[0]
    assert (combine_advantages(rewards, thresholds=[float("inf"), 50.0], **options) == 0).all()
    with pytest.raises(ValueError, match="each of the 2 rewards"):
        hinge_rewards(rewards, [1.0])


def test_time_weights_of_the_worked_example():
    weights = time_weights(25)
    assert weights.shape == (25, 2) and weights.dtype == torch.float32
    prompt = weights[:, 0].tolist()
    assert prompt[:6] == pytest.approx([0.7] * 6, abs=1e-7)
    expected = {6: 0.6843, 10: 0.5, 14: 0.3157, 21: 0.3001, 22: 0.5, 23: 0.5, 24: 0.5}
    for i, weight in expected.items():
        assert prompt[i] == pytest.approx(weight, abs=5e-5), i
    assert (weights.sum(dim=1) - 1).abs().max() < 1e-6


def test_time_weights_keep_their_shape_at_any_number_of_steps():
    reference = time_weights(25)
    torch.testing.assert_close(time_weights(50)[::2], reference)
    torch.testing.assert_close(time_weights(100)[::4], reference)
    torch.testing.assert_close(time_weights(5), reference[::5])
    assert time_weights(1).tolist() == [pytest.approx([0.7, 0.3])]


def test_every_constant_of_time_weights_counts():
    weights = time_weights(
        10, early=0.9, late=0.1, final=0.4, start=2, end=8, slope=2.0, midpoint=5, reference_steps=10
    )[:, 0].tolist()
    for i, weight in enumerate(weights):
        slide = 0.1 + 0.8 * (1 - sigmoid(2.0 * (i - 5)))
        assert weight == pytest.approx(0.9 if i < 2 else slide if i < 8 else 0.4, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"early": 1.2}, r"early .* \[0, 1\], found 1.2"),
        ({"late": -0.1}, "late"),
        ({"final": NAN}, "final"),
        ({"start": 9.0, "end": 8.0}, "start must not come after end"),
        ({"reference_steps": 0}, "reference_steps"),
    ],
)
def test_time_weights_reject_nonsense(arguments, message):
    with pytest.raises(ValueError, match=message):
        time_weights(**({"num_steps": 25} | arguments))


def test_constant_and_table_weights():
    assert constant_weights(3, [0.4, 0.6]).tolist() == [pytest.approx([0.4, 0.6])] * 3
    table = [[1.0, 0.0], [0.0, 1.0]]
    assert table_weights(table).tolist() == table
    assert table_weights(torch.tensor(table, dtype=torch.float64)).dtype == torch.float32
    for bad in ([[1.0, 0.0], [1.0]], [1.0, 2.0], [[0.5, -0.5]], [[NAN, 1.0]], [], [["a", "b"]]):
        with pytest.raises(ValueError, match="weight"):
            table_weights(bad)
    with pytest.raises(ValueError, match="num_steps"):
        constant_weights(0, [0.5, 0.5])


def test_weighing_sums_over_rewards_and_adds_the_bonus_at_every_step():
    advantages, _ = example(rewards=3)
    weights = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    bonus = torch.arange(18, dtype=torch.float64).view(3, 6)
    weighed = weigh_advantages(advantages, weights, bonus)
    assert weighed.shape == (3, 6, 2)
    for p, g, t in itertools.product(range(3), range(6), range(2)):
        expected = sum(weights[t, r].item() * advantages[p, g, r].item() for r in range(3)) + bonus[p, g].item()
        assert weighed[p, g, t].item() == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match=r"\[steps, 3\], one column per reward, or .* found \[2, 2\]"):
        weigh_advantages(advantages, weights[:, :2])


def test_weights_may_differ_from_sample_to_sample():
    draw = torch.Generator().manual_seed(0)
    advantages, weights = torch.randn(2, 3, 2, generator=draw).double(), torch.rand(2, 3, 4, 2, generator=draw).double()
    expected = torch.einsum("pgr,pgtr->pgt", advantages, weights)
    assert torch.allclose(weigh_advantages(advantages, weights), expected)
    with pytest.raises(ValueError, match=r"weights must have the shape \[steps, 2\].* found \[3, 3, 4, 2\]"):
        weigh_advantages(advantages, torch.rand(3, 3, 4, 2))


def test_a_sample_with_any_invalid_reward_has_advantage_zero_bonus_included():
    advantages = torch.ones(1, 3, 2)
    valid = torch.tensor([[[True, True], [True, False], [False, False]]])
    weighed = weigh_advantages(advantages, torch.ones(4, 2), torch.full((1, 3), 0.4), valid)
    torch.testing.assert_close(weighed, torch.tensor([[[2.4] * 4, [0.0] * 4, [0.0] * 4]]))


def test_clamp_limits_both_sides():
    assert clamp_advantages(torch.tensor([-9.0, 0.5, 9.0])).tolist() == [-5.0, 0.5, 5.0]
    with pytest.raises(ValueError, match="clamp must be greater than 0"):
        clamp_advantages(torch.zeros(1), 0.0)


def reference_paper(rewards: Tensor, valid: Tensor, weights: Tensor, gamma: float, clamp: float) -> Tensor:
    valid = valid.all(dim=-1, keepdim=True).expand_as(valid)
    z = over_groups(rewards, valid, zscores)
    out = torch.zeros(*rewards.shape[:2], len(weights), dtype=torch.float64)
    for p, g, t in itertools.product(*map(range, out.shape)):
        if valid[p, g].all():
            a, b = z[p, g].tolist()
            synergy = (1 if max(a, b) > 0 else -1) * gamma * math.tanh(a * b)
            total = weights[t, 0].item() * a + weights[t, 1].item() * b + synergy
            out[p, g, t] = max(-clamp, min(clamp, total))
    return out


def test_a_sample_with_one_failed_reward_leaves_every_statistic_of_its_group():
    rewards, valid = example(prompts=1, group=6, rewards=2)
    valid[:] = True
    valid[0, 2, 1] = False
    weights = time_weights(5)
    found = step_advantages(rewards, gamma=0.4, weights=weights, valid=valid)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found[:, others], step_advantages(rewards[:, others], gamma=0.4, weights=weights))
    assert (found[0, 2] == 0).all()


@pytest.mark.parametrize("clamp", [5.0, 0.8])
def test_step_advantages_are_the_papers_formula(clamp):
    rewards, valid = example(prompts=5, group=8)
    rewards[2, :, 1] = 3.0
    steps = [1, 4, 7, 12, 23]
    weights = time_weights(25)[steps]
    advantages = step_advantages(rewards, gamma=0.4, weights=weights, valid=valid, clamp=clamp)
    assert advantages.shape == (5, 8, 5)
    torch.testing.assert_close(advantages, reference_paper(rewards, valid, weights, 0.4, clamp), rtol=0, atol=1e-7)
    single = step_advantages(rewards.float(), gamma=0.4, weights=weights, valid=valid, clamp=clamp)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), advantages, rtol=0, atol=1e-5)


def test_naive_grpo_is_the_weighted_sum_of_z_scores():
    rewards, valid = example()
    valid[:] = True
    advantages = combine_advantages(rewards, valid, weights=constant_weights(4, [0.5, 0.5]), shape="none")
    expected = over_groups(rewards, valid, zscores).mean(dim=-1)
    torch.testing.assert_close(advantages, expected.unsqueeze(-1).expand(3, 6, 4))


@pytest.mark.parametrize(("normalise", "shape"), list(itertools.product(NORMALISERS, SHAPERS)))
def test_every_combination_is_finite_masked_and_clamped(normalise, shape):
    rewards, valid = example(prompts=4, group=5, dtype=torch.float32)
    rewards[0] = 1.0
    valid[1] = False
    rewards[~valid] = NAN
    advantages = combine_advantages(
        rewards, valid, weights=time_weights(10), normalise=normalise, shape=shape, clamp=1.0
    )
    assert advantages.shape == (4, 5, 10) and advantages.isfinite().all()
    assert advantages.abs().max() <= 1.0 and (advantages[2:] != 0).any()
    assert (advantages[0] == 0).all() and (advantages[~valid.all(dim=-1)] == 0).all()


def test_unknown_names_are_refused_with_the_known_ones():
    rewards, _ = example()
    with pytest.raises(ValueError, match="unknown normaliser 'z'; choose one of group, group_then_batch, rank"):
        combine_advantages(rewards, weights=time_weights(4), normalise="z")
    with pytest.raises(ValueError, match="unknown shaper 'mean'; choose one of none, sars, min, max"):
        combine_advantages(rewards, weights=time_weights(4), shape="mean")


@pytest.mark.parametrize(
    ("prompt", "identity", "added"), [(0.95, 0.7, 0.301), (-0.7, 0.9, -0.66), (0.56, -0.4, -0.22), (-0.67, -0.5, -0.32)]
)
def test_the_figures_of_the_authors_examples_need_a_strength_of_their_own_for_penalties(prompt, identity, added):
    """What the figure adds, over tanh of the product, is the strength: about 0.5 for the bonus, 1 for penalties."""
    strength = abs(added) / math.tanh(abs(prompt * identity))
    assert strength == pytest.approx(
        0.517 if added > 0 else {-0.66: 1.183, -0.22: 0.999, -0.32: 0.991}[added], abs=1e-3
    )
    found = float(synergy_shaping(torch.tensor([[[prompt, identity]]]), 0.5, 1.0))
    expected = (0.5 if added > 0 else -1.0) * math.tanh(abs(prompt * identity))
    assert found == pytest.approx(expected, abs=1e-6)
    assert found == pytest.approx(added, abs=0.11)


def test_penalties_may_have_their_own_strength():
    advantages = torch.tensor([[[0.9, 0.5], [0.9, -0.7], [-0.5, -0.6], [0.0, 1.0]]], dtype=torch.float64)
    products = [math.tanh(0.45), math.tanh(0.63), math.tanh(0.3), 0.0]
    found = synergy_shaping(advantages, 0.4, 0.8)[0].tolist()
    assert found == pytest.approx([0.4 * products[0], -0.8 * products[1], -0.8 * products[2], 0.0])
    assert torch.equal(synergy_shaping(advantages, 0.4, 0.4), synergy_shaping(advantages, 0.4))
    assert synergy_shaping(advantages, 0.4, 0.0)[0, 1:].tolist() == [0.0, 0.0, 0.0]


def test_a_strength_of_penalties_reaches_the_advantages():
    rewards = torch.tensor([[[0.9, 0.5], [0.2, 0.7], [0.1, 0.3], [0.4, 0.1]]], dtype=torch.float64)
    weights = constant_weights(3, (0.5, 0.5))
    advantages = group_advantages(rewards)
    for found in (
        combine_advantages(rewards, weights=weights, gamma=0.5, gamma_penalty=1.0),
        step_advantages(rewards, weights=weights, gamma=0.5, gamma_penalty=1.0),
    ):
        expected = advantages.mean(-1) + synergy_shaping(advantages, 0.5, 1.0)
        torch.testing.assert_close(found, expected[..., None].expand(-1, -1, 3))
    with pytest.raises(ValueError, match="gamma_penalty is read by shape 'sars' only, found shape 'min'"):
        combine_advantages(rewards, weights=weights, shape="min", gamma_penalty=1.0)


def test_quadrants_and_conflict_rate_count_samples():
    advantages = torch.tensor(
        [[[1.0, 2.0], [0.5, -1.0], [-1.0, 0.2], [-1.0, -1.0]], [[0.0, 0.0], [1, 1], [2, -2], [3, 0]]]
    )
    shares = {"both_good": 2 / 8, "only_prompt": 3 / 8, "only_identity": 1 / 8, "both_bad": 2 / 8}
    assert quadrants(advantages) == shares
    assert conflict_rate(advantages) == 3 / 8
    valid = torch.ones_like(advantages, dtype=torch.bool)
    valid[0, 0, 1] = valid[1, 2] = valid[1, 3] = valid[1, 0] = False
    assert quadrants(advantages, valid) == dict.fromkeys(shares, 1 / 4)
    assert conflict_rate(advantages, valid) == 2 / 4
    nothing = torch.zeros_like(valid)
    assert all(math.isnan(share) for share in quadrants(advantages, nothing).values())
    assert math.isnan(conflict_rate(advantages, nothing))
    with pytest.raises(ValueError, match=r"names must name each of the 3 rewards, found \['prompt', 'identity'\]"):
        quadrants(torch.zeros(1, 4, 3))
    for count in (quadrants, conflict_rate):
        with pytest.raises(ValueError, match="at least 2, found 1"):
            count(torch.zeros(1, 4, 1), *([None, ["prompt"]] if count is quadrants else []))


def test_quadrants_of_three_rewards_are_those_of_each_pair():
    advantages = torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(3, 6, 3, generator=torch.Generator().manual_seed(1)) > 0.2
    names = ("prompt", "identity", "style")
    found, rates = quadrants(advantages, valid, names), []
    assert len(found) == 12
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pair = advantages[..., [i, j]], valid[..., [i, j]]
        shares = quadrants(*pair, names=(names[i], names[j]))
        assert {name: found[f"{names[i]}-{names[j]}/{name}"] for name in shares} == shares
        rates.append(conflict_rate(*pair))
    assert conflict_rate(advantages, valid) == pytest.approx(sum(rates) / 3)
    assert len(set(rates)) > 1


def test_groups_of_equal_rewards_are_in_no_quadrant():
    speaks = [[1.0, 2.0], [0.5, -1.0], [-1.0, 0.2], [-1.0, -1.0]]
    one_reward = [[1.0, 0.0], [0.5, 0.0], [-1.0, 0.0], [-0.5, 0.0]]
    advantages = torch.tensor([speaks, [[0.0, 0.0]] * 4, one_reward])
    shares = dict.fromkeys(("both_good", "only_prompt", "only_identity", "both_bad"), 1 / 4)
    assert quadrants(advantages) == shares == quadrants(advantages[:1])
    assert conflict_rate(advantages) == 2 / 4
    assert all(math.isnan(share) for share in quadrants(advantages[1:]).values())
    assert math.isnan(conflict_rate(advantages[1:]))
    # All that is left of the second group's differences is invalid.
    advantages[1, 0], valid = 1.0, torch.ones_like(advantages, dtype=torch.bool)
    valid[1, 0] = False
    assert quadrants(advantages, valid) == shares


def test_groups_whose_advantages_are_all_zero_are_silent():
    rewards = torch.tensor([[[1.0, 2.0]] * 3, [[1.0, 2.0], [1.0, 3.0], [1.0, 4.0]], [[0.1, 0.2], [0.3, 0.1], [0.2, 1]]])
    weights = constant_weights(4, (0.5, 0.5))
    assert silent_groups(combine_advantages(rewards, weights=weights)) == pytest.approx(1 / 3)
    assert silent_groups(combine_advantages(rewards, weights=constant_weights(4, (1, 0)), shape="none")) == (
        pytest.approx(2 / 3)
    )
    valid = torch.ones_like(rewards, dtype=torch.bool)
    valid[2, :2] = False
    assert silent_groups(combine_advantages(rewards, valid, weights=weights)) == pytest.approx(2 / 3)
    assert silent_groups(torch.zeros(5, 4, 3)) == 1.0


shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(2, 3))
finite = st.floats(-100, 100, allow_nan=False).map(lambda v: round(v, 3))


@st.composite
def batches(draw):
    p, g, r = draw(shapes)
    values = draw(st.lists(finite, min_size=p * g * r, max_size=p * g * r))
    flags = draw(st.lists(st.booleans(), min_size=p * g * r, max_size=p * g * r))
    return torch.tensor(values, dtype=torch.float64).view(p, g, r), torch.tensor(flags).view(p, g, r)


@settings(deadline=None, max_examples=50)
@given(batches(), st.sampled_from(list(NORMALISERS)), st.sampled_from(list(SHAPERS)), st.randoms())
def test_the_order_of_samples_does_not_matter(batch, normalise, shape, rng):
    rewards, valid = batch
    order = list(range(rewards.shape[1]))
    rng.shuffle(order)
    options = {
        "weights": constant_weights(3, [0.5] * rewards.shape[2]),
        "normalise": normalise,
        "shape": shape,
    }
    shuffled = combine_advantages(rewards[:, order], valid[:, order], **options)
    torch.testing.assert_close(shuffled, combine_advantages(rewards, valid, **options)[:, order], rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(batches(), st.floats(0.1, 100), st.floats(-100, 100), st.sampled_from(list(NORMALISERS)))
def test_the_unit_and_the_origin_of_a_reward_do_not_matter(batch, scale, shift, name):
    rewards, valid = batch
    torch.testing.assert_close(
        NORMALISERS[name](scale * rewards + shift, valid),
        NORMALISERS[name](rewards, valid),
        rtol=0,
        atol=2e-4,
    )


@settings(deadline=None, max_examples=50)
@given(batches())
def test_z_scores_have_mean_zero_and_unit_std_or_say_nothing(batch):
    rewards, valid = batch
    advantages = group_advantages(rewards, valid)
    for p, r in itertools.product(range(rewards.shape[0]), range(rewards.shape[2])):
        kept = advantages[p, valid[p, :, r], r]
        if (kept == 0).all():
            assert rewards[p, valid[p, :, r], r].unique().numel() <= 1
        else:
            assert kept.mean().item() == pytest.approx(0, abs=1e-9)
            assert kept.std().item() == pytest.approx(1, abs=1e-4)


@settings(deadline=None, max_examples=50)
@given(batches(), st.floats(0, 3))
def test_synergy_is_bounded_symmetric_and_positive_only_where_both_are_good(batch, gamma):
    advantages, _ = batch
    assert (synergy_shaping(advantages, gamma).abs() <= gamma + 1e-12).all()
    pair = synergy_shaping(advantages[..., :2], gamma)
    a, b = advantages[..., 0], advantages[..., 1]
    both_good = (a > 0) & (b > 0)
    assert (pair[both_good] >= 0).all() and (pair[~both_good] <= 0).all()
    torch.testing.assert_close(pair, synergy_shaping(advantages[..., [1, 0]], gamma))


@settings(deadline=None, max_examples=50)
@given(batches(), st.sampled_from([NAN, 1e9, -1e9]), st.sampled_from(list(SHAPERS)), st.data())
def test_an_invalid_reward_never_reaches_another_sample(batch, junk, shape, data):
    rewards, valid = batch
    assume(not valid.all())
    p, g, r = data.draw(st.sampled_from((~valid).nonzero().tolist()))
    dirty = rewards.clone()
    dirty[p, g, r] = junk
    options = {"weights": constant_weights(2, [0.5] * rewards.shape[2]), "shape": shape}
    clean = combine_advantages(rewards, valid, **options)
    assert torch.equal(clean, combine_advantages(dirty, valid, **options))
    assert (clean[p, g] == 0).all()


@settings(deadline=None, max_examples=50)
@given(batches(), st.integers(1, 40))
def test_step_advantages_agree_with_the_papers_formula(batch, steps):
    rewards, valid = batch[0][..., :2], batch[1][..., :2]
    weights = time_weights(steps)
    advantages = step_advantages(rewards, gamma=0.4, weights=weights, valid=valid)
    expected = reference_paper(rewards, valid, weights, 0.4, 5.0)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-7)
