from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.toybox.network import Context, Generator
from customized_grpo.toybox.policy import ADAPTER_FILE, OneProduct, ToyBoxPolicy

MakePolicy = Callable[..., ToyBoxPolicy]
PROMPTS = ["a star on the beach", "a ghost in space wearing a crown"]
ADAPTERS = pytest.mark.parametrize("adapter", ["lora", "full"])


def encoded(policy: ToyBoxPolicy) -> Context:
    return policy.encode(PROMPTS, torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def velocity(policy: ToyBoxPolicy, condition: Context | None = None) -> Tensor:
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    return policy.velocity(latents, torch.tensor([0.9, 0.3]), condition or encoded(policy))


def disturb(policy: ToyBoxPolicy) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


@ADAPTERS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_training_tuned_and_untuned_are_bitwise_the_same(
    make_policy: MakePolicy, adapter: str, precision: str
) -> None:
    policy = make_policy(adapter=adapter, precision=precision)
    tuned = velocity(policy)
    with policy.base_weights():
        assert torch.equal(velocity(policy), tuned)
    assert tuned.std() > 0.1, "the comparison says nothing of a network that answers 0"


@ADAPTERS
def test_untuned_is_the_base_within_the_block_only(make_policy: MakePolicy, adapter: str) -> None:
    policy = make_policy(adapter=adapter)
    base = velocity(policy)
    disturb(policy)
    tuned = velocity(policy)
    assert not torch.allclose(tuned, base, atol=1e-3)
    with policy.base_weights():
        assert torch.equal(velocity(policy), base)
    assert torch.equal(velocity(policy), tuned)


@ADAPTERS
def test_untuned_ends_with_an_error_too(make_policy: MakePolicy, adapter: str) -> None:
    policy = make_policy(adapter=adapter)
    disturb(policy)
    tuned = velocity(policy)
    with pytest.raises(KeyError), policy.base_weights():
        raise KeyError
    assert torch.equal(velocity(policy), tuned)


@ADAPTERS
def test_an_adapter_is_read_back_bitwise(make_policy: MakePolicy, adapter: str, tmp_path: Path) -> None:
    first, second = make_policy(adapter=adapter, seed=0), make_policy(adapter=adapter, seed=1)
    disturb(first)
    first.save_adapter(tmp_path)
    second.load_adapter(tmp_path)
    assert torch.equal(velocity(second), velocity(first))
    second.save_adapter(tmp_path / "again")
    assert (tmp_path / "again" / ADAPTER_FILE).read_bytes() == (tmp_path / ADAPTER_FILE).read_bytes()


@pytest.mark.parametrize(
    ("saved", "wanted", "said"),
    [
        ({"adapter": "full"}, {"adapter": "lora"}, "set policy.toybox.adapter=full"),
        (
            {"adapter": "lora"},
            {"adapter": "full"},
            "set policy.toybox.adapter=lora, policy.lora_rank=4, policy.lora_alpha=32",
        ),
        (
            {"lora_rank": 4},
            {"lora_rank": 8},
            "set policy.toybox.adapter=lora, policy.lora_rank=4, policy.lora_alpha=32",
        ),
        ({"lora_alpha": 8}, {}, r"\(its alpha is 8, expected 32\); set .* policy.lora_alpha=8"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    make_policy: MakePolicy, tmp_path: Path, saved: dict[str, object], wanted: dict[str, object], said: str
) -> None:
    make_policy(**saved).save_adapter(tmp_path)
    with pytest.raises(UserError, match=rf"does not fit.*{said}") as caught:
        make_policy(**wanted).load_adapter(tmp_path)
    assert len(str(caught.value)) < 600, "one misfit is enough to say"


@ADAPTERS
def test_an_adapter_that_is_not_finite_is_refused(make_policy: MakePolicy, tmp_path: Path, adapter: str) -> None:
    policy = make_policy(adapter=adapter)
    policy.save_adapter(tmp_path)
    before = velocity(policy)
    state = load_file(tmp_path / ADAPTER_FILE)
    name = sorted(state)[1]
    state[name].view(-1)[0] = torch.nan
    save_file(state, tmp_path / ADAPTER_FILE)
    with pytest.raises(UserError, match=rf"{ADAPTER_FILE}: 1 of its {len(state)} tensors hold .* \({name}\)"):
        policy.load_adapter(tmp_path)
    assert torch.equal(velocity(policy), before)


def test_an_adapter_may_be_named_by_its_file(make_policy: MakePolicy, tmp_path: Path) -> None:
    first, second = make_policy(seed=0), make_policy(seed=1)
    disturb(first)
    first.save_adapter(tmp_path)
    second.load_adapter((tmp_path / ADAPTER_FILE).rename(tmp_path / "best.safetensors"))
    assert torch.equal(velocity(second), velocity(first))


def test_a_missing_or_broken_adapter_is_named(make_policy: MakePolicy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=ADAPTER_FILE):
        make_policy().load_adapter(tmp_path)
    (tmp_path / ADAPTER_FILE).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=ADAPTER_FILE):
        make_policy().load_adapter(tmp_path)


@ADAPTERS
def test_only_the_denoiser_is_trained(make_policy: MakePolicy, adapter: str) -> None:
    policy = make_policy(adapter=adapter)
    latents, condition = torch.randn(2, *policy.latent_shape), encoded(policy)
    policy.velocity(latents, torch.tensor([0.9, 0.3]), condition).square().sum().backward()
    assert all(parameter.grad is not None for _, parameter in policy.trainable_parameters())
    assert not any(p.requires_grad for p in policy._context.parameters())
    names = [name for name, _ in policy.trainable_parameters()]
    assert len(set(names)) == len(names)
    assert all("lora_" in name for name in names) == (adapter == "lora")


@ADAPTERS
def test_the_condition_does_not_depend_on_what_is_trained(make_policy: MakePolicy, adapter: str) -> None:
    policy = make_policy(adapter=adapter)
    before = encoded(policy)
    disturb(policy)
    assert all(torch.equal(value, vars(encoded(policy))[name]) for name, value in vars(before).items())


def test_taking_rows_of_a_condition_repeats_them(make_policy: MakePolicy) -> None:
    policy = make_policy()
    condition = encoded(policy)
    swapped = condition.take(torch.tensor([1, 0]))
    latents = torch.randn(2, *policy.latent_shape)
    sigma = torch.tensor([0.5, 0.5])
    with torch.no_grad():
        expected = policy.velocity(latents, sigma, condition)
        found = policy.velocity(latents.flip(0), sigma, swapped).flip(0)
    assert torch.allclose(found, expected, atol=1e-5)
    assert condition.take(torch.tensor([1, 1, 1])).pooled.unique(dim=0).shape[0] == 1


def test_prompt_and_reference_both_matter(make_policy: MakePolicy) -> None:
    policy = make_policy()
    reference = torch.rand(1, 1, 3, 32, 32)
    found = {}
    for name, prompt, picture in (
        ("first", PROMPTS[0], reference), ("prompt", PROMPTS[1], reference), ("reference", PROMPTS[0], 1 - reference),
    ):  # fmt: skip
        condition = policy.encode([prompt], picture).take(torch.tensor([0, 0]))
        found[name] = velocity(policy, condition)
    assert not torch.allclose(found["first"], found["prompt"], atol=1e-4)
    assert not torch.allclose(found["first"], found["reference"], atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_velocity_is_fp32_whatever_the_precision(make_policy: MakePolicy, precision: str) -> None:
    found = velocity(make_policy(precision=precision))
    assert found.dtype == torch.float32 and found.shape == (2, 3, 32, 32)


def test_the_seed_draws_the_lora_factors_and_nothing_else(make_policy: MakePolicy) -> None:
    def factors(seed: int) -> Tensor:
        return torch.cat([p.flatten() for _, p in make_policy(seed=seed).trainable_parameters()])

    assert torch.equal(factors(0), factors(0)) and not torch.equal(factors(0), factors(1))


def test_making_a_policy_leaves_the_global_random_state_alone() -> None:
    generator = Generator()
    before = torch.get_rng_state()
    ToyBoxPolicy(generator, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_decode_takes_latents_to_pixels(make_policy: MakePolicy) -> None:
    latents = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert make_policy().decode(latents).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_a_prompt_and_the_number_of_references_are_checked(make_policy: MakePolicy) -> None:
    policy = make_policy()
    policy.check(PROMPTS[0], 1)
    with pytest.raises(UserError, match="'dog'"):
        policy.check("a dog on the beach", 1)
    with pytest.raises(UserError, match="one reference image, not 2"):
        policy.check(PROMPTS[0], 2)


def test_one_product_is_pefts_three(make_policy: MakePolicy) -> None:
    """Velocity, gradients, and the base with the factors switched off; in bf16 PEFT's own layers stay."""
    found: list[tuple[Tensor, list[Tensor]]] = []
    for layer_type in (OneProduct, LoraLinear):
        policy = make_policy()
        disturb(policy)
        layers = [layer for layer in policy.networks[1].modules() if isinstance(layer, LoraLinear)]
        assert layers and all(type(layer) is OneProduct for layer in layers)
        for layer in layers:
            layer.__class__ = layer_type
        latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
        drawn = policy.velocity(latents, torch.tensor([0.9, 0.3]), encoded(policy))
        gradients = torch.autograd.grad(drawn.square().sum(), [p for _, p in policy.trainable_parameters()])
        found.append((drawn.detach(), list(gradients)))
        with policy.base_weights():
            untuned = velocity(policy)
        assert torch.equal(untuned, velocity(make_policy()))
    (one, its), (three, theirs) = found
    torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-5)
    for mine, other in zip(its, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4 * float(other.abs().max()), rtol=1e-4)
    assert not any(isinstance(layer, OneProduct) for layer in make_policy(precision="bf16").networks[1].modules())
